"""Compiles what braze came without for the installed torch: ``python -m braze build``, or BRAZE_JIT=1.

That is the binding for a torch or a Python that no wheel was made for, and the CUDA kernels or, where they
are there, their binding. torch.utils.cpp_extension compiles into a private cache, where ``import braze``
finds the result; nothing is ever compiled unasked. Needs a C++ compiler, ninja and setuptools, and for CUDA
nvcc; no GPU. CUDA_HOME, CXX, TORCH_CUDA_ARCH_LIST, MAX_JOBS and BRAZE_CACHE_DIR are obeyed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from braze import _build, _cache, _native, _nvcc

SOURCES = _native.PACKAGE / "csrc"
BuildError = _nvcc.ToolkitError

# In a process of its own: torch reads CUDA_HOME when it is imported, and imports what it has built.
COMPILE = """
import ctypes, json, sys
sys.path, libraries, arguments = json.load(sys.stdin)
try:
    from torch.utils.cpp_extension import load
    for library in libraries:
        ctypes.CDLL(library)
    load(**arguments)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def libraries(module: str) -> list[Path]:
    """Those of braze's own libraries that ``module`` is linked with.

    Where libbraze_cuda is missing or of another CUDA, ``_cuda`` has its kernels inside.
    """
    if module == "_C":
        return [_native.PACKAGE / "libbraze_kernels.so"]
    versions = (_build.CUDA_VERSION, torch.version.cuda or "")
    same = len({version.split(".")[0] for version in versions}) == 1
    file = _native.PACKAGE / "libbraze_cuda.so"
    return [file] if same and file.is_file() else []


def _sources(module: str) -> list[Path]:
    files = set(SOURCES.glob("ops/*_cuda.cpp"))
    if module == "_C":
        files = {*SOURCES.glob("*.cpp"), *SOURCES.glob("ops/**/*.cpp")} - files
    elif not libraries(module):
        files |= set(SOURCES.glob("cuda/*.cu"))
    return sorted(files)


def key(module: str, architectures: str = "") -> str:
    """The name of this build's folder in the cache: equal names mean interchangeable builds.

    The digest is of everything that goes into a build except the compiler, which the log in it names.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(SOURCES)}\0".encode() + file.read_bytes() + b"\0")
    own = [library.name for library in libraries(module)]
    facts = (own, _build.INTERFACE, _build.CXX_FLAGS, _build.NVCC_FLAGS)
    digest.update(repr(facts).encode())
    parts = [module, _build.VERSION, f"torch{torch.__version__}", sysconfig.get_config_var("SOABI")]
    if module == "_cuda":
        parts.append(f"cu{torch.version.cuda}")
    if not own:
        parts.append(architectures or "_".join(_nvcc.architectures()).replace("-real", ""))
    return "-".join([*parts, digest.hexdigest()[:16]])


def check_private(folder: Path) -> None:
    """Raises BuildError unless only this user can write to ``folder``: what is in it is executed."""
    if problem := _cache.not_private(folder):
        raise BuildError(
            f"{folder} {problem}, so code in it could be someone else's and is not run. Remove it, set "
            f"its mode with chmod 700, or choose another folder with BRAZE_CACHE_DIR."
        )


def find_built(module: str) -> tuple[Path | None, str]:
    """The cached build for this torch and these sources, or None and what spoke against one.

    Any architectures will do unless TORCH_CUDA_ARCH_LIST names some.
    """
    root = _cache.root()
    try:
        if root.is_dir():
            check_private(root)
            name = key(module, "" if os.environ.get("TORCH_CUDA_ARCH_LIST") else "*")
            found = root.glob(f"{name}/{module}.so")
            for library in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
                check_private(library.parent)
                return library, ""
    except (BuildError, OSError) as error:
        return None, str(error)
    return None, ""


def say(text: str) -> None:
    """Progress, apart from the paths that are the output."""
    print(f"braze: {text}", file=sys.stderr, flush=True)


def _waits() -> None:
    say("another process is building the same; waiting for it")


def build(module: str, force: bool = False) -> Path:
    """Returns the compiled ``_C`` or ``_cuda``, from the cache if it is there. Raises :class:`BuildError`."""
    if not _sources(module):
        raise BuildError(f"the sources of {module} are missing from {SOURCES}. Reinstall braze.")
    root, name = _cache.root(), key(module)
    library = root / name / f"{module}.so"
    try:
        _cache.make(root)
        check_private(root)
        with _cache.locked(root / f"{name}.lock", _waits):
            if library.is_file() and not force:
                check_private(library.parent)
                return library
            for left_over in root.glob(f"{name}.tmp*"):  # of a build that was killed
                shutil.rmtree(left_over)
            folder = Path(tempfile.mkdtemp(prefix=f"{name}.tmp", dir=root))
            try:
                _compile(module, folder, root / f"{name}.log")
                shutil.rmtree(library.parent, ignore_errors=True)
                folder.rename(library.parent)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return library
    except OSError as error:
        raise BuildError(
            f"the cache {root} cannot be used: {error}. Mend it, or choose another folder with "
            f"BRAZE_CACHE_DIR."
        ) from error


def _compile(module: str, folder: Path, output: Path) -> None:
    """Puts the module and the log of its making into ``folder``; if it fails, the log is ``output``."""
    tools = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if not shutil.which("ninja", path=tools) or not importlib.util.find_spec("setuptools"):
        raise BuildError("torch compiles with ninja and setuptools: pip install ninja setuptools")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise BuildError("no C++ compiler was found. Install g++ 12 or newer, or set CXX to one.")
    environ = {**os.environ, "PATH": tools, "CXX": compiler, "CC": compiler}  # CC: nvcc's
    work = folder / "work"
    work.mkdir()
    if module == "_cuda":
        toolkit = _nvcc.find(torch.version.cuda or "")
        environ["CUDA_HOME"] = str(toolkit.root)
        environ["TORCH_CUDA_ARCH_LIST"] = ";".join(_nvcc.listed())
        # A CUDA runtime of its own, as in libbraze_cuda; torch links with the shared one.
        (work / "libcudart.so").write_text(f'INPUT("{toolkit.cudart_static}" -lrt -ldl -lpthread)')
    own = [str(library) for library in libraries(module)]
    link = ["-s", "-L.", "-fopenmp", "-Wl,--exclude-libs,ALL", *map(shlex.quote, own)]
    common = ["-O3", "-DNDEBUG", "-std=c++20", f"'-DBRAZE_INTERFACE=\"{_build.INTERFACE}\"'"]
    arguments = {
        "name": module,
        "sources": [str(file) for file in _sources(module)],
        "extra_cflags": [*_build.CXX_FLAGS, *common, "-fvisibility=hidden", "-fopenmp"],
        "extra_cuda_cflags": [*_build.NVCC_FLAGS, *common, "-Xcompiler=-fvisibility=hidden"],
        "extra_ldflags": link,
        "build_directory": str(work),
        "with_cuda": module == "_cuda",
        "verbose": True,
    }
    say(f"compiling {module} for torch {torch.__version__}; the output goes to {output}")
    started = time.monotonic()
    with output.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-I", "-c", COMPILE],
            input=json.dumps([sys.path, own, arguments]).encode(),
            stdout=file,
            stderr=file,
            env=environ,
            cwd=work,
        )
    if done.returncode:
        tail = "\n".join(output.read_text(errors="replace").splitlines()[-30:])
        raise BuildError(
            f"{module} did not compile. The last lines are below, everything is in {output}\n{tail}"
        )
    (work / f"{module}.so").rename(folder / f"{module}.so")
    output.rename(folder / "build.log")
    shutil.rmtree(work)
    say(f"built in {time.monotonic() - started:.0f} s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="build again what is in the cache")


def run(arguments: argparse.Namespace) -> int:
    """Builds what the package lacks, and prints where all is. Returns 0, or 1 after saying what went wrong."""
    try:
        if not torch.version.cuda and _native.packaged("_C")[0]:
            raise BuildError(
                f"torch {torch.__version__} is a build without CUDA, so there is nothing to compile "
                f"for. Install a torch with CUDA first (https://pytorch.org/get-started)."
            )
        for module in ("_C", "_cuda") if torch.version.cuda else ("_C",):
            installed, _ = _native.packaged(module)
            print(installed or build(module, arguments.force))
    except BuildError as error:
        print(f"braze: {error}", file=sys.stderr)
        return 1
    return 0
