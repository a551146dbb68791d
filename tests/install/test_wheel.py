"""The tool that builds wheels: what it builds for, what it refuses, what it writes.

Nothing of braze is compiled here. Building, installing and trying a wheel is tests/install/wheels.py.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.wheel import __main__ as tool
from tools.wheel import content, rows

pytestmark = pytest.mark.cpu_only("is about the build")

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
TORCH = rows.Torch(Path("/torch"), "2.13.0+cpu", "")
CUDA_TORCH = rows.Torch(Path("/torch"), "2.14.1+cu130", "13.0")
PYTHON = rows.Python(Path("/bin/python"), "3.11", ".cpython-311-x86_64-linux-gnu.so")
ROW, CUDA_ROW = rows.Row(TORCH, PYTHON), rows.Row(CUDA_TORCH, PYTHON)


# ------------------------------------------------------------------ the rows


@pytest.mark.parametrize(
    ("asked", "version", "fit"),
    [
        ("2.13", "2.13.1", True),
        ("2.13", "2.13.0+cpu", True),
        ("2.1", "2.13.0", False),
        ("2.13.0", "2.13.0", True),
        ("2.13.0", "2.13.0+cu130", True),
        ("2.13.0", "2.13.0+cpu", False),  # or a wheel would lack CUDA where a CPU torch is nearer
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0", "2.13.1", False),
    ],
)
def test_what_a_version_asks_for(asked: str, version: str, fit: bool) -> None:
    assert rows.fits(asked, version) is fit


def test_names_are_those_that_import_looks_for() -> None:
    from braze import _native

    row = rows.Row(rows.installed_torch() or TORCH, rows.find_python(HERE))
    assert row.file("_C") == Path(_native._C.__file__).name
    assert ROW.torch.requirement == "torch===2.13.0+cpu"
    assert CUDA_ROW.torch.requirement == "torch===2.14.1"  # as the registry calls it


def test_python_by_version_and_by_path(tmp_path: Path) -> None:
    assert rows.find_python(HERE) == rows.find_python(sys.executable)
    with pytest.raises(
        rows.MissingError, match=r"Python 9\.7 is not here.*--python /path/to/python9\.7"
    ):
        rows.find_python("9.7")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(rows.MissingError):
        rows.find_python(str(broken))


def torch_wheel(folder: Path, version: str) -> Path:
    """With what a torch wheel has, and an __init__.py that must not run."""
    folder.mkdir(exist_ok=True)
    wheel = folder / f"torch-{version}-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("torch/__init__.py", "raise SystemExit('imported')")
        packed.writestr("torch/version.py", f"__version__ = {version!r}\ncuda = '13.0'\n")
        for name in (
            "include/ATen/ATen.h",
            "lib/libc10.so",
            "lib/libtorch_cuda_linalg.txt",
            "bin/x",
        ):
            packed.writestr(f"torch/{name}", "")
    return wheel


def test_torch_of_a_wheel_is_unpacked_once_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    for version in ("2.9.0", "2.9.1"):
        torch_wheel(wheels, version)
    found = rows.find_torch("2.9", wheels, cache)
    assert (found.version, found.cuda, found.minor) == ("2.9.1", "13.0", "2.9")
    held = {str(p.relative_to(found.root)) for p in found.root.rglob("*") if p.is_file()}
    assert held == {"version.py", "include/ATen/ATen.h", "lib/libc10.so"}
    assert cache.stat().st_mode & 0o777 == 0o700
    (found.root / "mark").touch()
    assert rows.find_torch("2.9.1", wheels, cache) == found and (found.root / "mark").exists()
    shutil.rmtree(wheels)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked pip again"))
    assert rows.find_torch("2.9", None, cache) == found
    unpacked = tmp_path / "unpacked"
    shutil.copytree(found.root, unpacked / "a/torch")
    assert rows.find_torch("2.9", unpacked, cache).root == unpacked / "a/torch"


def test_what_is_missing_is_an_error_or_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(asked: str, wheels: Path | None, cache: Path) -> rows.Torch:
        if asked == "2.99":
            raise rows.MissingError("no torch 2.99")
        return TORCH

    monkeypatch.setattr(rows, "find_torch", find)
    asked = (["2.13", "2.99"], [HERE, "9.7"], None, tmp_path)
    with pytest.raises(rows.MissingError) as error:
        rows.find_rows(*asked, skip=False)
    text = str(error.value)
    assert "no torch 2.99" in text and "Python 9.7 is not here" in text and "--skip-missing" in text
    found, missing = rows.find_rows(*asked, skip=True)
    assert [str(row) for row in found] == [f"torch 2.13, Python {HERE}"] and len(missing) == 2
    with pytest.raises(rows.MissingError):  # nothing is left
        rows.find_rows(["2.99"], [HERE], None, tmp_path, skip=True)

    monkeypatch.setattr(sys, "argv", ["tools.wheel", "--torch", "2.99", "--no-smoke"])
    monkeypatch.setattr(tool, "build", lambda *_: pytest.fail("built"))
    assert tool.main() == 1 and "no torch 2.99" in capsys.readouterr().err


def test_torch_is_not_built_for_a_python_that_it_is_not_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = torch_wheel(tmp_path / "wheels", "2.9.0")
    with zipfile.ZipFile(wheel, "a") as packed:
        packed.writestr("torch-2.9.0.dist-info/METADATA", "Name: torch\nRequires-Python: >=3.11\n")
    new = rows.find_torch("2.9", tmp_path / "wheels", tmp_path / "cache")
    pythons = {
        v: rows.Python(Path(v), v, f".cpython-{v.replace('.', '')}.so") for v in ("3.9", "3.11")
    }
    monkeypatch.setattr(rows, "find_torch", lambda asked, *_: {"2.9": new, "2.13": TORCH}[asked])
    monkeypatch.setattr(rows, "find_python", pythons.__getitem__)
    asked = (["2.13", "2.9"], ["3.9", "3.11"], None, tmp_path)
    with pytest.raises(rows.MissingError, match=r"torch 2\.9\.0 is not made for Python 3\.9"):
        rows.find_rows(*asked, skip=False)
    found, missing = rows.find_rows(*asked, skip=True)
    assert len(found) == 3 and len(missing) == 1
    assert tool.left_out(found) == ["2.9.cpython-39"]


# --------------------------------------------------------------- the content


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library as ours are."""
    return compiled(tmp_path_factory.mktemp("library"), "int f() { return 1; }")


def compiled(folder: Path, text: str, *flags: str, rpath: str = "$ORIGIN") -> Path:
    if not all(map(shutil.which, ("c++", "readelf", "nm"))):
        pytest.skip("no C++ compiler, or no binutils")
    (folder / "a.cpp").write_text(text)
    out = folder / "a.so"
    command = ["c++", "-shared", "-fPIC", "a.cpp", "-o", str(out), f"-Wl,-rpath,{rpath}", *flags]
    subprocess.run(command, cwd=folder, check=True)
    return out


BASE = (
    "py.typed",
    "_build.py",
    "__init__.py",
    "csrc/bindings.cpp",
    "csrc/cuda/ptx.cuh",
    "bench/optim.py",
)
LIBRARIES = (
    "libbraze_kernels.so",
    ROW.file("_C"),
    CUDA_ROW.file("_C"),
    CUDA_ROW.file("_cuda"),
    "libbraze_cuda.so",
)


def wheel_of(folder: Path, files: dict[str, bytes]) -> Path:
    wheel = folder / "braze-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return wheel


def complete(library: Path) -> dict[str, bytes]:
    files = {f"braze/{name}": b"" for name in BASE}
    files |= {f"braze/{name}": library.read_bytes() for name in LIBRARIES}
    return files | {"braze-1.dist-info/licenses/LICENSE": b"", "braze-1.dist-info/METADATA": b""}


def problems(folder: Path, files: dict[str, bytes], limit: int = 0) -> list[str]:
    return content.check(wheel_of(folder, files), [ROW, CUDA_ROW], True, {"/home/me"}, limit)


def test_complete_wheel_passes(tmp_path: Path, library: Path) -> None:
    assert problems(tmp_path, complete(library)) == []


@pytest.mark.parametrize(
    "name",
    [
        *(f"braze/{name}" for name in LIBRARIES),
        "braze/py.typed",
        "braze/_build.py",
        "braze/csrc/bindings.cpp",
    ],
)
def test_missing_file_is_noticed(tmp_path: Path, library: Path, name: str) -> None:
    files = complete(library)
    del files[name]
    assert problems(tmp_path, files) == [f"{name} is missing"]


def test_binding_that_nobody_asked_for_is_noticed(tmp_path: Path, library: Path) -> None:
    """As a build folder that was used before may leave one, of sources that are no more."""
    stale = "braze/_C.torch2.12.cpython-311-x86_64-linux-gnu.so"
    files = complete(library) | {stale: library.read_bytes()}
    assert problems(tmp_path, files) == [f"{stale} was not asked for"]


def test_missing_licence_and_stray_files_are_noticed(tmp_path: Path, library: Path) -> None:
    files = complete(library)
    del files["braze-1.dist-info/licenses/LICENSE"]
    files |= {"braze/core.12": b"", "tests/conftest.py": b"", "braze/bench/results/a.json": b""}
    assert problems(tmp_path, files) == [
        "braze/bench/results/a.json does not belong there",
        "braze/core.12 does not belong there",
        "tests/conftest.py does not belong there",
        "LICENSE is missing",
    ]


def test_size_is_limited(tmp_path: Path, library: Path) -> None:
    size = wheel_of(tmp_path, complete(library)).stat().st_size
    assert problems(tmp_path, complete(library), size) == []
    (problem,) = problems(tmp_path, complete(library), size - 1)
    assert problem == f"the wheel has {size:,} bytes, more than {size - 1:,}"


@pytest.mark.parametrize(
    ("text", "flags", "rpath", "said"),
    [
        ("int f();", [], "/opt/lib", "its RPATH is ['/opt/lib'], not $ORIGIN"),
        ("int f();", ["-Wl,--no-as-needed", "-lresolv"], "$ORIGIN", "it needs libresolv.so.2"),
        ("auto f() { return __FILE__; }", [], "$ORIGIN", "it names /home/me"),
        (
            "namespace c10 { int g(); } int f() { return c10::g(); }",
            [],
            "$ORIGIN",
            "it needs c10::g(), and must know neither torch nor Python",
        ),
    ],
)
def test_wrong_library_is_noticed(
    tmp_path: Path, library: Path, text: str, flags: list[str], rpath: str, said: str
) -> None:
    """Each loads where it was built and fails, or tells of the builder's machine, elsewhere."""
    if "__FILE__" in text:
        flags = [
            f"-ffile-prefix-map={tmp_path}=/home/me",
            "-fmacro-prefix-map=a.cpp=/home/me/a.cpp",
        ]
    wrong = compiled(tmp_path, text, *flags, rpath=rpath).read_bytes()
    assert problems(tmp_path, {**complete(library), "braze/libbraze_kernels.so": wrong}) == [
        f"libbraze_kernels.so: {said}"
    ]


# ------------------------------------------------------------- what is written


def test_pip_installs_from_the_index(tmp_path: Path) -> None:
    wheel = tmp_path / "braze-7-py3-none-any.whl"
    info = {
        "METADATA": "Metadata-Version: 2.1\nName: braze\nVersion: 7\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as packed:
        for name, text in info.items():
            packed.writestr(f"braze-7.dist-info/{name}", text)
    content.write_index(tmp_path)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text() == f"{digest}  {wheel.name}\n"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environ |= {"PIP_CONFIG_FILE": os.devnull}

    def download() -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "braze==7"]
        index = ["--index-url", (tmp_path / "index").as_uri(), "--dest", str(tmp_path / "got")]
        return subprocess.run([*pip, *index], capture_output=True, text=True, env=environ)

    assert download().returncode == 0
    shutil.rmtree(tmp_path / "got")
    with zipfile.ZipFile(wheel, "a") as packed:
        packed.writestr("more.py", "")  # no longer the one that was listed
    run = download()
    assert run.returncode != 0 and "DO NOT MATCH THE HASHES" in run.stderr


def test_sources_that_are_as_they_were_are_not_compiled_again(tmp_path: Path) -> None:
    def pack(files: dict[str, bytes]) -> Path:
        sdist = tmp_path / "braze-1.tar.gz"
        with tarfile.open(sdist, "w:gz") as packed:
            for name, data in files.items():
                member = tarfile.TarInfo(f"braze-1/{name}")
                member.size = len(data)
                packed.addfile(member, io.BytesIO(data))
        return sdist

    folder = tmp_path / "source"
    tool.unpack(pack({"a": b"1", "b/c": b"2", "gone": b"3"}), folder)
    for name in ("a", "b/c"):
        os.utime(folder / name, (1, 1))
    tool.unpack(pack({"a": b"1", "b/c": b"4"}), folder)
    assert (folder / "a").stat().st_mtime == 1 and (folder / "b/c").stat().st_mtime > 1
    assert (folder / "b/c").read_bytes() == b"4" and not (folder / "gone").exists()


def test_time_of_the_sources_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "315532800")
    assert tool.epoch() == "315532800"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert tool.epoch() == tool.epoch() and int(tool.epoch()) > 1_700_000_000


def test_options_of_an_earlier_wheel_are_forgotten(tmp_path: Path) -> None:
    """Or a wheel would be what the last check of the tool was: for one GPU, and not optimised."""
    if not all(map(shutil.which, ("cmake", "ninja"))):
        pytest.skip("no CMake, or no ninja")
    (tmp_path / "CMakeLists.txt").write_text(
        'cmake_minimum_required(VERSION 3.20)\nproject(p NONE)\nmessage(STATUS "OPTION=${OPTION}.")'
    )
    configure = ["cmake", "-G", "Ninja", "-S", str(tmp_path), "-B", str(tmp_path / "build")]

    def option(*defines: str) -> str:
        done = subprocess.run([*configure, *defines], capture_output=True, text=True, check=True)
        return done.stdout.partition("OPTION=")[2].partition(".")[0]

    assert option("-DOPTION=90") == option() == "90"
    tool.forget(tmp_path / "build")
    assert option() == ""


def test_seconds_are_those_of_the_last_compilation(tmp_path: Path) -> None:
    lines = ["# ninja log v7"]
    for name, start, end in (("x", 0, 9000), ("y", 0, 1000), ("gone", 0, 500), ("x", 10, 2010)):
        lines.append(f"{start}\t{end}\t0\tCMakeFiles/ops.dir/{name}.cpp.o\tabc")
    rules = "".join(f"build CMakeFiles/ops.dir/{name}.cpp.o: CXX a.cpp\n" for name in "xy")
    (tmp_path / "build.ninja").write_text(rules)
    (tmp_path / ".ninja_log").write_text("\n".join(lines) + "\n")
    assert tool.seconds(tmp_path) == {"ops": 3.0}
    assert tool.seconds(tmp_path / "none") == {}
