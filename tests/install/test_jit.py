"""``python -m braze build``: the cache, its lock and its refusals; finding nvcc. No GPU, no CUDA torch.

What needs a CUDA torch, compiling, linking and loading, is tests/install/cuda_import.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import braze
import pytest
import torch
from braze import _build, _native, _nvcc, build
from braze.__main__ import main

pytestmark = pytest.mark.cpu_only("is about the build")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, sources of our own, a torch that says it has CUDA, and a compiler that only writes."""
    sources = tmp_path / "csrc"
    (sources / "cuda").mkdir(parents=True)
    (sources / "cuda/step.cu").write_text("// kernels")
    (sources / "cuda/step.cuh").write_text("// a header")
    for name in ("TORCH_CUDA_ARCH_LIST", "BRAZE_JIT", *_nvcc.EXPLICIT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BRAZE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "_compile", fake_compile)
    return tmp_path / "cache"


def fake_compile(folder: Path, log: build.Log, _: Path) -> None:
    log("compiled")
    (folder / build.LIBRARY).write_text("library")


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


def test_built_once_then_found(cache: Path) -> None:
    lines: list[str] = []
    assert build.find_built() == (None, "")
    first = build.build(log=lines.append)
    assert first == cache / build.key() / build.LIBRARY and first.read_text() == "library"
    assert build.build(log=lines.append) == first and lines == ["compiled"]
    assert build.find_built() == (first, "")
    assert build.build(force=True, log=lines.append) == first and lines == ["compiled"] * 2
    assert cache.stat().st_mode & 0o777 == 0o700
    left = {p.name for p in cache.iterdir()}
    assert left == {build.key(), f"{build.key()}.lock"}


def test_key_says_what_it_was_built_for(cache: Path) -> None:
    start = f"{braze.__version__}-torch{torch.__version__}-cu13.0-py{sys.version_info[0]}"
    assert build.key().startswith(start) and "-80_90_100_120-" in build.key()


@pytest.mark.parametrize("change", ["source", "header", "new", "flags", "torch", "cuda", "archs"])
def test_key_changes_with(change: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.key()
    build.build()
    if change == "source":
        (build.SOURCES / "cuda/step.cu").write_text("// kernelz")
    elif change == "header":
        (build.SOURCES / "cuda/step.cuh").write_text("// another header")
    elif change == "new":
        (build.SOURCES / "cuda/more.cu").touch()
    elif change == "flags":
        monkeypatch.setattr(_build, "NVCC_FLAGS", [*_build.NVCC_FLAGS, "-G"])
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.13.7")
    elif change == "cuda":
        monkeypatch.setattr(torch.version, "cuda", "12.8")
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert build.key() != before
    assert build.find_built() == (None, "")


def test_other_architectures_are_found_unless_some_are_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    hopper = build.build()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert build.find_built() == (hopper, "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build.find_built() == (None, "")


@pytest.mark.parametrize("where", ["root", "build"])
@pytest.mark.parametrize("problem", ["group", "world", "link", "owner"])
def test_cache_that_others_could_write_is_refused(
    problem: str, where: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build()
    folder = cache if where == "root" else cache / build.key()
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
    found, reason = build.find_built()
    assert found is None and str(folder) in reason and said in reason
    with pytest.raises(build.BuildError) as error:
        build.build()
    assert said in str(error.value) and "BRAZE_CACHE_DIR" in str(error.value)


def test_what_a_killed_build_left_is_cleared(cache: Path) -> None:
    build.build()
    left_over = cache / f"{build.key()}.tmpkilled"
    left_over.mkdir()
    build.build(force=True)
    assert not left_over.exists()


def test_failed_build_leaves_nothing_to_load(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, log: build.Log, _: Path) -> None:
        (folder / build.LIBRARY).write_text("half")
        raise build.BuildError("no")

    monkeypatch.setattr(build, "_compile", fail)
    with pytest.raises(build.BuildError, match="no"):
        build.build()
    assert build.find_built() == (None, "")
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


WORKER = """
import sys, time, torch
from pathlib import Path
torch.version.cuda = "13.0"
from braze import build
build.SOURCES = Path(sys.argv[1])
def compile(folder, log, _):
    print("compiling", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    (folder / build.LIBRARY).write_text("library")
build._compile = compile
print(build.build(log=lambda text: print(text, flush=True)))
"""


def test_second_process_waits_and_uses_the_first_ones_result(cache: Path) -> None:
    finish = cache.parent / "finish"
    command = [sys.executable, "-c", WORKER, str(build.SOURCES), str(finish)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")

    with start() as first, start() as second:
        assert first.stdout and second.stdout
        says = sorted([first.stdout.readline(), second.stdout.readline()])
        assert "another process is building" in says[0] and says[1] == "compiling\n"
        finish.touch()
        results = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert results == [f"{cache / build.key() / build.LIBRARY}\n"] * 2


def test_lock_of_a_killed_process_does_not_hold(cache: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(build.SOURCES), "/never"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout and process.stdout.readline() == "compiling\n"
        process.kill()
    started = time.monotonic()
    lines: list[str] = []
    build.build(log=lines.append)
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
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: None)
    path, reason = _native.load_cuda(_native._C)
    assert path is None and reason == "built against a torch without CUDA"
    monkeypatch.setattr(_native, "CUDA_FILE", None)
    monkeypatch.setattr(_native, "_CUDA_REASON", reason)
    assert _native.cuda_missing() == f"{reason}; build them for this torch with: {_native.BUILD}"


def test_kernels_that_do_not_load_are_an_import_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: None)
    library = build.build()
    with pytest.raises(ImportError) as error:
        _native.load_cuda(_native._C)
    text = str(error.value)
    assert str(library) in text and f"rm -r '{library.parent}' && {_native.BUILD}" in text


def test_jit_that_fails_is_an_import_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAZE_JIT", "1")
    monkeypatch.setenv("BRAZE_CACHE_DIR", "/dev/null/cache")
    with pytest.raises(ImportError, match=r"BRAZE_JIT=1 asks for .* cache /dev/null/cache cannot"):
        _native.load_cuda(_native._C)


def test_failed_compilation_shows_its_end_and_its_log(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("BRAZE_CACHE_DIR", str(cache))
    monkeypatch.setattr(build, "SOURCES", cache.parent / "csrc")
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(cache.parent / "toolkit", "13.0")))
    (cache.parent / "toolkit/lib").mkdir()
    (cache.parent / "toolkit/lib/libcudart.so.13").touch()
    assert main(["build"]) == 1
    err = capsys.readouterr().err
    (log,) = map(Path, re.findall(r"everything is in\s+(\S+)", err))
    assert "step.cu(40): error" in err and "step.cu(10): error" not in err
    assert "step.cu(10): error" in log.read_text() and log.parent == cache
    assert build.find_built() == (None, "")


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
    assert listed("") == listed(" ; ") == list(_nvcc.ARCHITECTURES) == _nvcc.architectures({})
    assert _nvcc.gencode(["80", "90-real"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    with pytest.raises(_nvcc.ToolkitError, match="'Hopper', which is no compute capability"):
        listed("8.0;Hopper")


# ------------------------------------------ the same options as CMake's


def test_sources_are_installed() -> None:
    installed = Path(_build.__file__ or "").parent / "csrc"
    for pattern in ("cuda/*", "ops/*_cuda.cpp", "math/*.h", "plan/*.h", "ops/*.h"):
        names = {p.name for p in (ROOT / "csrc").glob(pattern)}
        assert names and names <= {p.name for p in installed.glob(pattern)}


@pytest.mark.slow("makes the build of all CUDA kernels ready")
def test_options_are_cmakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda_gates

    if reason := cuda_gates.no_nvcc():
        pytest.skip(reason)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    calls, _ = build.commands(tmp_path, _nvcc.find(""))
    ours = {Path(call[call.index("-c") + 1]).name: set(call) for call in calls}
    for command in cuda_gates.compile_objects():
        theirs = command["command"].replace("-Xcompiler=-fPIC -Xcompiler=", "-Xcompiler=-fPIC,")
        kind = r"-(f|O|D|W|std|-compress|Xcompiler|Xptxas)"
        checks = ("-Werror", "-Xptxas=-warn-spills", "-Xcompiler=-Werror")
        ignored = ("-forward-unknown", "-fvisibility-inlines", *checks)
        options = {w for w in theirs.split() if re.match(kind, w) and not w.startswith(ignored)}
        assert options and options <= ours[Path(command["file"]).name]
