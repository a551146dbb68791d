"""Compiles braze's CUDA kernels for the installed torch: ``python -m braze build``, or BRAZE_JIT=1.

For an installation without them, such as a wheel made for another CUDA. The result goes to a private cache,
where ``import braze`` finds it; nothing is ever compiled unasked. Needs nvcc and a C++ compiler, no GPU.
CUDA_HOME, CXX, TORCH_CUDA_ARCH_LIST, MAX_JOBS and BRAZE_CACHE_DIR are obeyed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from braze import _build, _nvcc

SOURCES = Path(_build.__file__ or "").parent / "csrc"
LIBRARY = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
Log = Callable[[str], None]
BuildError = _nvcc.ToolkitError


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("cuda/*.cu"), *SOURCES.glob("ops/*_cuda.cpp")])


def _stem() -> str:
    tag = f"py{sys.version_info[0]}{sys.version_info[1]}"
    return f"{_build.VERSION}-torch{torch.__version__}-cu{torch.version.cuda}-{tag}"


def _digest() -> str:
    """Of everything that goes into a build except the compiler, which the record in it names."""
    digest = hashlib.sha256(repr((_build.CXX_FLAGS, _build.NVCC_FLAGS, LIBRARY)).encode())
    for file in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(SOURCES)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def key() -> str:
    """The name of this build's folder in the cache: equal names mean interchangeable builds."""
    names = "_".join(_nvcc.architectures()).replace("-real", "").replace("-virtual", "v")
    return f"{_stem()}-{names}-{_digest()}"


def cache_root() -> Path:
    """BRAZE_CACHE_DIR, or ~/.cache/braze."""
    named = os.environ.get("BRAZE_CACHE_DIR")
    return Path(named).absolute() if named else Path.home() / ".cache" / "braze"


def check_private(folder: Path) -> None:
    """Raises BuildError unless only this user can write to ``folder``: what is in it is executed."""
    info = os.lstat(folder)
    if stat.S_ISLNK(info.st_mode):
        problem = "is a symbolic link"
    elif not stat.S_ISDIR(info.st_mode):
        problem = "is not a folder"
    elif info.st_uid != os.geteuid():
        problem = f"belongs to user {info.st_uid}, and this is user {os.geteuid()}"
    elif info.st_mode & 0o022:
        problem = f"can be written by others (mode {stat.S_IMODE(info.st_mode):04o})"
    else:
        return
    raise BuildError(
        f"{folder} {problem}, so code in it could be someone else's and is not run. Remove it, set "
        f"its mode with chmod 700, or choose another folder with BRAZE_CACHE_DIR."
    )


def find_built() -> tuple[Path | None, str]:
    """The cached build for this torch and these sources, or None and what spoke against one.

    Any architectures will do unless TORCH_CUDA_ARCH_LIST names some.
    """
    root = cache_root()
    try:
        if not root.is_dir() or not SOURCES.is_dir():
            return None, ""
        check_private(root)
        exact = root / key()
        others = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else _like(root)
        for folder in [exact, *others]:
            if (folder / LIBRARY).is_file():
                check_private(folder)
                return folder / LIBRARY, ""
    except (BuildError, OSError) as error:
        return None, str(error)
    return None, ""


def _like(root: Path) -> list[Path]:
    start, end = f"{_stem()}-", f"-{_digest()}"
    matches = [p for p in root.iterdir() if p.name.startswith(start) and p.name.endswith(end)]
    return sorted(matches, key=lambda p: p.lstat().st_mtime, reverse=True)


@contextmanager
def _locked(file: Path, log: Log) -> Iterator[None]:
    """Holds the build's lock. The kernel releases it with the process, so it cannot go stale."""
    import fcntl

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(file, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("braze: another process is building the same kernels; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _quiet(_: str) -> None: ...


def build(force: bool = False, log: Log = _quiet) -> Path:
    """Returns the compiled ``_cuda``, from the cache if it is there. Raises :class:`BuildError`."""
    if not torch.version.cuda:
        raise BuildError(
            f"torch {torch.__version__} is a build without CUDA, so there is nothing to compile for. "
            f"Install a torch with CUDA first (https://pytorch.org/get-started)."
        )
    if not _sources():
        raise BuildError(
            f"the sources of the CUDA kernels are missing from {SOURCES}. Reinstall braze."
        )
    root, name = cache_root(), key()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        check_private(root)
        with _locked(root / f"{name}.lock", log):
            target = root / name
            if (target / LIBRARY).is_file() and not force:
                check_private(target)
                return target / LIBRARY
            for left_over in root.glob(f"{name}.tmp*"):  # of a build that was killed
                shutil.rmtree(left_over)
            folder = Path(tempfile.mkdtemp(prefix=f"{name}.tmp", dir=root))
            try:
                _compile(folder, log, root / f"{name}.log")
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return target / LIBRARY
    except OSError as error:
        raise BuildError(
            f"the cache {root} cannot be used: {error}. Mend it, or choose another folder with "
            f"BRAZE_CACHE_DIR."
        ) from error


def commands(folder: Path, toolkit: _nvcc.Toolkit) -> tuple[list[list[str]], list[str]]:
    """The compiler calls, which may run at the same time, and the linker call that follows them."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise BuildError("no C++ compiler was found. Install g++ 12 or newer, or set CXX to one.")
    cxx = shlex.split(compiler)
    torch_root = Path(torch.__file__).parent
    includes = [
        toolkit.root / "include",
        Path(sysconfig.get_path("include")),
        torch_root / "include",
        torch_root / "include/torch/csrc/api/include",
    ]
    common = [
        "-O3",
        "-DNDEBUG",
        "-std=c++20",
        *(word for folder in includes for word in ("-isystem", str(folder))),
    ]
    nvcc = [str(toolkit.nvcc), *common, *_nvcc.gencode(_nvcc.architectures()), *_build.NVCC_FLAGS]
    nvcc += ["-ccbin", cxx[0], "-Xcompiler=-fPIC,-fvisibility=hidden"]
    host = [*cxx, *common, *_build.CXX_FLAGS, "-fPIC", "-fvisibility=hidden"]
    calls, objects = [], []
    for source in _sources():
        objects.append(str(folder / f"{source.name}.o"))
        first = nvcc if source.suffix == ".cu" else host
        calls.append([*first, "-c", str(source), "-o", objects[-1]])
    major = (torch.version.cuda or "").split(".")[0]
    pip = [torch_root.parent / "nvidia" / p / "lib" for p in (f"cu{major}", "cuda_runtime")]
    cudart = next((f for p in pip for f in p.glob("libcudart.so.*")), toolkit.cudart)
    if cudart is None:
        raise BuildError(
            f"libcudart.so, the CUDA runtime, is neither beside torch nor in {toolkit.root}. Install "
            f"it: pip install 'nvidia-cuda-runtime=={torch.version.cuda}.*'"
        )
    libraries = ["c10", "torch_cpu", "torch", "torch_python", "c10_cuda", "torch_cuda"]
    link = [*cxx, "-shared", "-s", *objects, f"-L{torch_root / 'lib'}"]
    link += [*(f"-l{name}" for name in libraries), str(cudart)]
    link += [f"-Wl,-rpath,{torch_root / 'lib'}:{cudart.parent}", "-o", str(folder / LIBRARY)]
    return calls, link


def _compile(folder: Path, log: Log, failure_log: Path) -> None:
    toolkit = _nvcc.find(torch.version.cuda or "")
    calls, link = commands(folder, toolkit)
    log(
        f"braze: compiling {len(calls)} files with {toolkit.nvcc} (CUDA {toolkit.release}) for "
        f"{' '.join(_nvcc.architectures())}"
    )

    def run(call: list[str]) -> tuple[int, str]:
        done = subprocess.run(
            call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        return done.returncode, f"$ {shlex.join(call)}\n{done.stdout}"

    started = time.monotonic()
    workers = int(os.environ.get("MAX_JOBS") or min(len(calls), os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(run, calls))
    if not any(code for code, _ in results):
        results.append(run(link))
    output = "".join(text for _, text in results)
    failed = "".join(text for code, text in results if code)
    if failed:
        failure_log.write_text(output)
        tail = "\n".join(failed.splitlines()[-30:])
        raise BuildError(
            f"the CUDA kernels did not compile. The last lines are below, everything is in "
            f"{failure_log}\n{tail}"
        )
    for file in folder.glob("*.o"):
        file.unlink()
    failure_log.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    (folder / "build.log").write_text(output)
    host = subprocess.run([link[0], "--version"], capture_output=True, text=True).stdout
    record = {
        "nvcc": f"{toolkit.nvcc} {toolkit.release}",
        "compiler": host.splitlines()[0] if host else link[0],
        "architectures": _nvcc.architectures(),
        "seconds": round(seconds, 1),
    }
    (folder / "build.json").write_text(json.dumps(record, indent=1) + "\n")
    log(f"braze: built in {seconds:.0f} s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="build again even if it is there")


def run(arguments: argparse.Namespace) -> int:
    """Builds, and prints where the result is. Returns 0, or 1 after saying what went wrong."""
    try:
        print(build(arguments.force, lambda text: print(text, flush=True)))
    except BuildError as error:
        print(f"braze: {error}", file=sys.stderr)
        return 1
    return 0
