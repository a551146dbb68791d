"""``python -m braze build``: the cache, its lock and its refusals; finding nvcc. No GPU, no CUDA torch.

What needs a CUDA torch, linking and loading _cuda, is tested where there is one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path

import braze
import pytest
import torch
from braze import _build, _cache, _native, _nvcc, build
from braze.__main__ import main

pytestmark = pytest.mark.cpu_only("is about the build")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, sources of our own, a torch that says it has CUDA, and a compiler that only writes."""
    sources = tmp_path / "csrc"
    for folder in ("cuda", "ops"):
        (sources / folder).mkdir(parents=True)
    (sources / "cuda/step.cu").write_text("// kernels")
    (sources / "cuda/step.cuh").write_text("// a header")
    (sources / "ops/step.cpp").write_text("// a binding")
    for name in ("TORCH_CUDA_ARCH_LIST", "BRAZE_JIT", *_nvcc.EXPLICIT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BRAZE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_build, "CUDA_VERSION", "")
    monkeypatch.setattr(build, "_compile", fake_compile)
    return tmp_path / "cache"


def fake_compile(module: str, folder: Path, _: Path) -> None:
    build.say("compiled")
    (folder / f"{module}.so").write_text("library")


def give_kernels(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes ``package`` braze's, with CUDA kernels that fit the torch."""
    monkeypatch.setattr(_native, "PACKAGE", package)
    monkeypatch.setattr(_build, "CUDA_VERSION", "13.1")
    file = package / "libbraze_cuda.so"
    file.touch()
    return file


def fake_nvcc(folder: Path, release: str, works: bool = True) -> Path:
    """A toolkit whose compiler is a script: enough to be found, not enough to compile."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f'--dryrun) echo "#$ _HERE_={folder}/bin" >&2;;\n'
        '*) for i in $(seq 40); do echo "step.cu($i): error: no" >&2; done; exit 1;;\nesac\n'
        if works
        else "#!/bin/sh\nexit 3\n"
    )
    nvcc.chmod(0o755)
    return nvcc


# --------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    ("environ", "root"),
    [
        ({}, "/home/me/.cache/braze"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/braze"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/braze"),
        ({"XDG_CACHE_HOME": "/xdg", "BRAZE_CACHE_DIR": "/named"}, "/named"),
        ({"BRAZE_CACHE_DIR": ""}, "/home/me/.cache/braze"),
    ],
)
def test_root(environ: dict[str, str], root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRAZE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environ}.items():
        monkeypatch.setenv(name, value)
    assert _cache.root() == Path(root)


@pytest.mark.parametrize("module", ["_C", "_cuda"])
def test_built_once_then_found(module: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(build, "say", lines.append)
    assert build.find_built(module) == (None, "")
    first, key = build.build(module), build.key(module)
    assert first == cache / key / f"{module}.so" and first.read_text() == "library"
    assert build.build(module) == first and lines == ["compiled"]
    assert build.find_built(module) == (first, "")
    assert build.build(module, force=True) == first and lines == ["compiled"] * 2
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {p.name for p in cache.iterdir()} == {key, f"{key}.lock"}


def test_key_says_what_it_was_built_for(cache: Path) -> None:
    start = f"{braze.__version__}-torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}-"
    assert build.key("_C").startswith(f"_C-{start}")
    assert build.key("_cuda").startswith(f"_cuda-{start}cu13.0-80_90_100_120-")


@pytest.mark.parametrize("module", ["_C", "_cuda"])
@pytest.mark.parametrize(
    "change",
    [
        "source",
        "header",
        "new",
        "flags",
        "interface",
        "torch",
        "python",
        "cuda",
        "kernels",
        "archs",
    ],
)
def test_key_changes_with(
    change: str, module: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build.key(module)
    build.build(module)
    if change == "source":
        (build.SOURCES / "cuda/step.cu").write_text("// kernelz")
    elif change == "header":
        (build.SOURCES / "cuda/step.cuh").write_text("// another header")
    elif change == "new":
        (build.SOURCES / "cuda/more.cu").touch()
    elif change == "flags":
        monkeypatch.setattr(_build, "NVCC_FLAGS", [*_build.NVCC_FLAGS, "-G"])
    elif change == "interface":
        monkeypatch.setattr(_build, "INTERFACE", "another")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.13.7")
    elif change == "python":
        monkeypatch.setattr(sysconfig, "get_config_var", {"SOABI": "cpython-399"}.get)
    elif change == "cuda":
        monkeypatch.setattr(torch.version, "cuda", "12.8")
    elif change == "kernels":
        give_kernels(cache.parent, monkeypatch)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    same = module == "_C" and change in ("cuda", "kernels", "archs")
    assert (build.key(module) == before) == same
    assert (build.find_built(module) == (None, "")) != same


def test_kernels_are_compiled_where_the_package_has_none_for_this_cuda(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (build.SOURCES / "ops/step_cuda.cpp").touch()
    (build.SOURCES / "bindings.cpp").touch()

    def names(files: list[Path]) -> list[str]:
        return [file.name for file in files]

    file = give_kernels(cache.parent, monkeypatch)
    for installed, there in (("", False), ("12.8", True), ("13.1", False)):
        monkeypatch.setattr(_build, "CUDA_VERSION", installed)
        file.touch() if there else file.unlink(missing_ok=True)
        assert names(build._sources("_cuda")) == ["step.cu", "step_cuda.cpp"]
        assert build.libraries("_cuda") == []
    file.touch()
    assert names(build._sources("_cuda")) == ["step_cuda.cpp"]
    assert names(build.libraries("_cuda")) == ["libbraze_cuda.so"]
    assert names(build._sources("_C")) == ["bindings.cpp", "step.cpp"]
    assert names(build.libraries("_C")) == ["libbraze_kernels.so"]


def test_other_architectures_are_found_unless_some_are_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    hopper = build.build("_cuda")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert build.find_built("_cuda") == (hopper, "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build.find_built("_cuda") == (None, "")


@pytest.mark.parametrize("where", ["root", "build"])
@pytest.mark.parametrize("problem", ["group", "world", "link", "owner"])
def test_cache_that_others_could_write_is_refused(
    problem: str, where: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build("_cuda")
    folder = cache if where == "root" else cache / build.key("_cuda")
    if problem in ("group", "world"):
        folder.chmod(0o770 if problem == "group" else 0o707)
        said = "can be written by others"
    elif problem == "link":
        folder.rename(folder.with_name("elsewhere"))
        folder.symlink_to(folder.with_name("elsewhere"))
        said = "is a symbolic link"
    else:
        real = os.lstat

        def lstat(path: str | Path) -> os.stat_result:
            info = real(path)
            other = info.st_uid + (Path(path) == folder)
            return os.stat_result((*info[:4], other, *info[5:]))

        monkeypatch.setattr(build.os, "lstat", lstat)
        said = "belongs to user"
    found, reason = build.find_built("_cuda")
    assert found is None and str(folder) in reason and said in reason
    with pytest.raises(build.BuildError) as error:
        build.build("_cuda")
    assert said in str(error.value) and "BRAZE_CACHE_DIR" in str(error.value)


def test_what_a_killed_build_left_is_cleared(cache: Path) -> None:
    build.build("_cuda")
    left_over = cache / f"{build.key('_cuda')}.tmpkilled"
    left_over.mkdir()
    build.build("_cuda", force=True)
    assert not left_over.exists()


def test_failed_build_leaves_nothing_to_load(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str, folder: Path, _: Path) -> None:
        (folder / f"{module}.so").write_text("half")
        raise build.BuildError("no")

    monkeypatch.setattr(build, "_compile", fail)
    with pytest.raises(build.BuildError, match="no"):
        build.build("_cuda")
    assert build.find_built("_cuda") == (None, "")
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


WORKER = """
import sys, time, torch
from pathlib import Path
torch.version.cuda = "13.0"
from braze import _build, build
_build.CUDA_VERSION = ""
build.SOURCES = Path(sys.argv[1])
def compile(module, folder, _):
    print("compiling", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    (folder / f"{module}.so").write_text("library")
build._compile = compile
build.say = lambda text: print(text, flush=True)
print(build.build("_cuda"))
"""


def test_others_wait_and_use_the_first_ones_result(cache: Path) -> None:
    finish = cache.parent / "finish"
    command = [sys.executable, "-c", WORKER, str(build.SOURCES), str(finish)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
            )
            for _ in range(8)
        ]
        says = sorted(worker.stdout.readline() for worker in workers if worker.stdout)
        assert all("another process is building" in line for line in says[:7])
        assert says[7] == "compiling\n"
        finish.touch()
        results = [worker.communicate(timeout=60)[0] for worker in workers]
    assert results == [f"{cache / build.key('_cuda') / '_cuda.so'}\n"] * 8


def test_lock_of_a_killed_process_does_not_hold(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", WORKER, str(build.SOURCES), "/never"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout and process.stdout.readline() == "compiling\n"
        process.kill()
    started = time.monotonic()
    lines: list[str] = []
    monkeypatch.setattr(build, "say", lines.append)
    build.build("_cuda")
    assert lines == ["compiled"] and time.monotonic() - started < 5


# -------------------------------------------------------------- the errors


def test_nothing_to_build_for_a_cpu_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["build"]) == 1
    err = capsys.readouterr().err
    assert "is a build without CUDA" in err and err.count("\n") == 1


def test_cpu_torch_says_why_there_are_no_kernels() -> None:
    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    assert "is a build without CUDA" in _native.cuda_missing()


def test_missing_kernels_name_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "CUDA_MISSING", "built against a torch without CUDA")
    path, reason = _native.load_cuda(_native._C)
    assert path is None and reason == "built against a torch without CUDA"
    monkeypatch.setattr(_native, "CUDA_FILE", None)
    monkeypatch.setattr(_native, "_CUDA_REASON", reason)
    assert _native.cuda_missing() == f"{reason}; build them for this torch with: {_native.BUILD}"


def test_kernels_of_another_cuda_are_not_taken(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    file = tmp_path / f"_cuda.torch{_native.minor(torch.__version__)}{_native.SUFFIX}"
    file.touch()
    monkeypatch.setattr(_build, "CUDA_VERSION", "13.2")
    assert _native.packaged("_cuda") == (file, "")
    monkeypatch.setattr(_build, "CUDA_VERSION", "12.8")
    said = "braze was built with CUDA 12.8, but torch has CUDA 13.0"
    assert _native.packaged("_cuda") == (None, said)


def test_kernels_that_do_not_load_are_an_import_error(cache: Path) -> None:
    library = build.build("_cuda")
    with pytest.raises(ImportError) as error:
        _native.load_cuda(_native._C)
    text = str(error.value)
    assert str(library) in text and f"rm -r '{library.parent}' && {_native.BUILD}" in text


def test_jit_that_fails_is_an_import_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAZE_JIT", "1")
    monkeypatch.setenv("BRAZE_CACHE_DIR", "/dev/null/cache")
    with pytest.raises(ImportError, match=r"BRAZE_JIT=1 asks for .* cache /dev/null/cache cannot"):
        _native.load_cuda(_native._C)


def fake_build(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles as it really does, with an nvcc that fails, the kernels of a package that has a _C."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_build, "CUDA_VERSION", "")
    monkeypatch.setenv("BRAZE_CACHE_DIR", str(cache))
    monkeypatch.setattr(build, "SOURCES", cache.parent / "csrc")
    # A torch without CUDA does not read it.
    with_cuda = "import os, torch.utils.cpp_extension as e; e.CUDA_HOME = os.environ['CUDA_HOME']"
    monkeypatch.setattr(build, "COMPILE", f"{with_cuda}\n{build.COMPILE}")
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(cache.parent / "toolkit", "13.0")))
    (cache.parent / "toolkit/lib").mkdir()
    (cache.parent / "toolkit/lib/libcudart_static.a").touch()


def test_failed_compilation_shows_its_end_and_its_log(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_build(cache, monkeypatch)
    assert main(["build"]) == 1
    err = capsys.readouterr().err
    (log,) = map(Path, re.findall(r"everything is in\s+(\S+)", err))
    assert "step.cu(40): error" in err and "step.cu(10): error" not in err
    text = log.read_text()
    assert "step.cu(10): error" in text and log.parent == cache
    for option in ("compute_80,code=compute_80", "sm_120", "-fmad=false", "-std=c++20", "-O3"):
        assert option in text
    assert f'-DBRAZE_INTERFACE="{_build.INTERFACE}"' in text
    assert build.find_built("_cuda") == (None, "")


@pytest.mark.parametrize("tool", ["ninja", "setuptools", "compiler", "runtime"])
def test_missing_tool_is_named(
    tool: str, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_build(cache, monkeypatch)
    which, find = shutil.which, importlib.util.find_spec
    compilers = ("c++", "g++")
    hidden = compilers if tool == "compiler" else (tool,)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(
        build.shutil, "which", lambda name, **options: name not in hidden and which(name, **options)
    )
    monkeypatch.setattr(
        build.importlib.util, "find_spec", lambda name: find(name) if name != tool else None
    )
    if tool == "runtime":
        (cache.parent / "toolkit/lib/libcudart_static.a").unlink()
    assert main(["build"]) == 1
    said = {"compiler": "no C++ compiler", "runtime": "pip install 'nvidia-cuda-runtime==13.0.*'"}
    assert said.get(tool, "pip install ninja setuptools") in capsys.readouterr().err


# ------------------------------------------------------------ finding nvcc


def test_explicit_toolkit_is_obeyed_in_order(tmp_path: Path) -> None:
    one, two = fake_nvcc(tmp_path / "one", "13.0"), fake_nvcc(tmp_path / "two", "13.1")
    assert _nvcc.find("13.0", {"CUDA_HOME": str(tmp_path / "two")}).release == "13.1"
    both = {"CUDACXX": str(one), "CUDA_HOME": str(tmp_path / "two")}
    assert _nvcc.find("13.0", both) == _nvcc.Toolkit(one, tmp_path / "one", "13.0")
    assert _nvcc.find("", {"CUDACXX": str(two)}).root == tmp_path / "two"


def test_script_on_path_leads_to_the_toolkit(tmp_path: Path) -> None:
    real = fake_nvcc(tmp_path / "toolkit", "13.0")
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    found = _nvcc.probe(wrapper)
    assert found is not None and found.nvcc == real and found.root == tmp_path / "toolkit"


@pytest.mark.parametrize(
    ("release", "torch_cuda", "said"),
    [
        ("12.8", "13.0", "is 12.8 .* torch was built for CUDA 13.0 .* CUDA 13.x"),
        ("13.0", "12.9", "is 13.0 .* torch was built for CUDA 12.9 .* CUDA 12.x"),
        ("12.4", "12.8", "is 12.4 .*at least 12.8"),
        ("12.4", "", "is 12.4 .* 12.8 or newer"),
    ],
)
def test_toolkit_that_does_not_fit(
    release: str, torch_cuda: str, said: str, tmp_path: Path
) -> None:
    nvcc = fake_nvcc(tmp_path / "toolkit", release)
    with pytest.raises(_nvcc.ToolkitError, match=said):
        _nvcc.find(torch_cuda, {"CUDACXX": str(nvcc)})


def test_broken_toolkit_names_its_variable(tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "toolkit", "13.0", works=False)
    with pytest.raises(_nvcc.ToolkitError, match=r"CUDA_PATH=.* does not lead to a working CUDA"):
        _nvcc.find("13.0", {"CUDA_PATH": str(tmp_path / "toolkit")})


def test_no_toolkit_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvcc, "_found", lambda torch_cuda: iter(()))
    with pytest.raises(
        _nvcc.ToolkitError, match=r"13.x and point CUDA_HOME .* pip install 'nvidia"
    ):
        _nvcc.find("13.0", {})
    with pytest.raises(_nvcc.ToolkitError) as error:  # pip has no nvcc of CUDA 12
        _nvcc.find("12.8", {})
    assert "pip" not in str(error.value)


def test_architectures() -> None:
    def listed(text: str) -> list[str]:
        return _nvcc.architectures({"TORCH_CUDA_ARCH_LIST": text})

    assert listed("8.0;9.0a 10.0+PTX") == ["80-real", "90a-real", "100"]
    assert listed("") == listed(" ; ") == _nvcc.architectures({})
    assert listed("") == ["80", "90-real", "100-real", "120-real"]
    with pytest.raises(_nvcc.ToolkitError, match="'Hopper', which is no compute capability"):
        listed("8.0;Hopper")


# -------------------------------------- a torch that the package is not for


def test_sources_are_installed() -> None:
    installed = _native.PACKAGE / "csrc"
    for pattern in ("*.cpp", "cuda/*", "ops/*", "ops/optim/*", "math/*.h", "plan/*.h", "cpu/*.h"):
        names = {p.name for p in (ROOT / "csrc").glob(pattern)}
        assert names and names <= {p.name for p in installed.glob(pattern)}


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """The environment of a braze that has a binding for torch 2.1 alone, and an empty cache."""
    package = tmp_path / "site/braze"
    package.mkdir(parents=True)
    for entry in _native.PACKAGE.iterdir():
        if not re.match(r"_C\.torch|_cuda\.torch|__pycache__", entry.name):
            (package / entry.name).symlink_to(entry)
    (package / f"_C.torch2.1{_native.SUFFIX}").touch()
    environ = {k: v for k, v in os.environ.items() if k != "BRAZE_JIT"}
    cache = str(tmp_path / "cache")
    return {**environ, "PYTHONPATH": str(package.parent), "BRAZE_CACHE_DIR": cache}


def python(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environ)


@pytest.mark.parametrize(
    "command",
    ["-m braze info", "-m braze build --help", "-m braze build --force", "-c import\tbraze build"],
)
def test_nothing_is_compiled_unasked(command: str, without: dict[str, str]) -> None:
    done = python(without, *command.split(" "))
    assert done.returncode == 1 and not Path(without["BRAZE_CACHE_DIR"]).exists()
    assert "ImportError: braze was built against torch 2.1 (Python " in done.stderr


@pytest.mark.parametrize("command", [["-m", "braze", "build"], ["-mbraze", "build"]])
def test_command_runs_without_a_binding(command: list[str], without: dict[str, str]) -> None:
    done = python({**without, "BRAZE_CACHE_DIR": "/dev/null/cache"}, *command)
    assert done.returncode == 1
    assert done.stderr.startswith("braze: the cache /dev/null/cache cannot be used")
    assert done.stderr.count("\n") == 1


def test_jit_without_a_binding_that_fails_is_an_import_error(without: dict[str, str]) -> None:
    environ = {**without, "BRAZE_JIT": "1", "BRAZE_CACHE_DIR": "/dev/null/cache"}
    done = python(environ, "-c", "import braze")
    said = "ImportError: BRAZE_JIT=1 asks for braze's _C, but the cache /dev/null/cache cannot"
    assert done.returncode == 1 and said in done.stderr
