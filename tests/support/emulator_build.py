"""Builds C++ programs and libraries that run CUDA kernels on the CPU, in several variants.

A build is cached by the content of all that went into it, under build/emulator/. Two processes may
build the same thing at once.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "emulator"
CACHE = ROOT / "build" / "emulator"

COMMON_FLAGS = (
    "-std=c++20",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    # What nvcc is told with -fmad=false: only an explicit fma is one.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-DBRAZE_EMULATOR=1",
)


@dataclass(frozen=True)
class Variant:
    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    # Of the sources under test, not of the emulator itself.
    test_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


_GCC = ("-Wno-unknown-pragmas",)
_CLANG = ("-Wno-pass-failed",)
_ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def symbolizer() -> str | None:
    """What turns addresses into lines in clang's reports."""
    return shutil.which("llvm-symbolizer-19") or shutil.which("llvm-symbolizer")


VARIANTS = {
    "native": Variant(("g++-12", "g++"), ("-O2", *_GCC)),
    "clang": Variant(("clang++-19", "clang++"), ("-O2", *_CLANG)),
    "asan": Variant(
        ("g++-12", "g++"),
        ("-O1", *_ADDRESS, *_GCC),
        link_flags=_ADDRESS,
        environment=(
            # Leaks are looked for by the Python tests, in the real library.
            ("ASAN_OPTIONS", "detect_stack_use_after_return=0:detect_leaks=0"),
            ("UBSAN_OPTIONS", "print_stacktrace=1"),
        ),
    ),
    # Happens-before comes from CUDA's barriers alone, so the emulator is not instrumented.
    "tsan": Variant(
        ("g++-12", "g++"),
        ("-O1", "-DBRAZE_EMULATOR_TSAN=1", *_GCC),
        test_flags=("-fsanitize=thread",),
        link_flags=("-fsanitize=thread",),
        environment=(("TSAN_OPTIONS", "exitcode=66:history_size=4:atexit_sleep_ms=0"),),
    ),
    # The emulator uses the C++ library, which is not instrumented either.
    "msan": Variant(
        ("clang++-19", "clang++"),
        ("-O1", "-DBRAZE_EMULATOR_MSAN=1", "-fno-omit-frame-pointer", *_CLANG),
        test_flags=("-fsanitize=memory", "-fno-sanitize-recover=all"),
        link_flags=("-fsanitize=memory",),
        # Debian's clang looks for one of its own version only, and does not depend on it.
        environment=(("MSAN_SYMBOLIZER_PATH", symbolizer() or ""),),
    ),
    "aarch64": Variant(
        ("aarch64-linux-gnu-g++",),
        ("-O2", *_GCC),
        link_flags=("-static",),
        runner=("qemu-aarch64-static",),
    ),
}


def _compiler(variant: str) -> str | None:
    found = (shutil.which(name) for name in VARIANTS[variant].compilers)
    return next((path for path in found if path), None)


@functools.cache
def have(variant: str) -> str | None:
    """None if `variant` can be built and run here, else the reason why not."""
    spec = VARIANTS[variant]
    compiler = _compiler(variant)
    if compiler is None:
        return f"the {variant} variant needs {' or '.join(spec.compilers)}, which is not installed"
    for program in spec.runner:
        if shutil.which(program) is None:
            return f"the {variant} variant needs {program}, which is not installed"
    if variant == "tsan" and platform.machine() != "x86_64":
        return "the tsan variant is made for x86-64"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n")
        target = Path(folder) / "probe"
        flags = (*spec.flags, *spec.test_flags, *spec.link_flags)
        built = subprocess.run(
            [compiler, *flags, "-o", str(target), str(source)], capture_output=True, text=True
        )
        if built.returncode != 0:
            return f"{compiler} cannot build the {variant} variant: {built.stderr.strip()[-300:]}"
        ran = subprocess.run([*spec.runner, str(target)], capture_output=True, text=True)
        if ran.returncode != 0:
            return f"a {variant} program does not run here: {ran.stderr.strip()[-300:]}"
    return None


@functools.cache
def _compiler_identity(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return f"{os.path.realpath(compiler)}\n{version.stdout}"


def _digest(*parts: str | bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        # Released by the system however this process ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _into_place(target: Path, make: Callable[[Path], object]) -> None:
    """A file that exists is whole: it is made elsewhere and renamed."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        make(made)
        os.replace(made, target)


def _call(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed: {' '.join(command)}\n{done.stdout}{done.stderr}")


def _dependencies(depfile: str) -> list[str]:
    """The files a make rule names after its colon."""
    names = depfile.partition(":")[2].replace("\\\n", " ")
    marked = names.replace("\\ ", "\0")
    return [name.replace("\0", " ") for name in marked.split()]


def _contents(paths: Sequence[str]) -> str | None:
    """Digest of the files' contents; None if one is gone."""
    try:
        return _digest(*(Path(path).read_bytes() for path in paths))
    except OSError:
        return None


def _object(source: Path, compiler: str, flags: Sequence[str]) -> Path:
    folder = CACHE / "objects"
    key = _digest(str(source), _compiler_identity(compiler), *flags)
    listing = folder / f"{key}.files"

    def known() -> Path | None:
        if not listing.exists():
            return None
        contents = _contents(listing.read_text().split("\n"))
        path = folder / f"{key}-{contents}.o"
        return path if contents is not None and path.exists() else None

    with _locked(folder / f"{key}.lock"):
        if (found := known()) is not None:
            return found
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made, depfile = Path(scratch) / "o.o", Path(scratch) / "o.d"
            command = [compiler, *flags, "-MMD", "-MF", str(depfile)]
            command += ["-x", "c++", "-c", str(source), "-o", str(made)]
            _call(command, f"compiling {source.name}")
            paths = _dependencies(depfile.read_text())
            target = folder / f"{key}-{_contents(paths)}.o"
            for old in folder.glob(f"{key}-*.o"):
                old.unlink()
            os.replace(made, target)
            _into_place(listing, lambda path: path.write_text("\n".join(paths)))
        return target


def _runtime_source() -> Path:
    """All of the emulator as one source: a third of the time of its files one by one."""
    text = "".join(f'#include "{path}"\n' for path in sorted(EMULATOR.glob("*.cpp")))
    source = CACHE / "runtime.cpp"
    with _locked(CACHE / "runtime.lock"):
        if not source.exists() or source.read_text() != text:
            _into_place(source, lambda path: path.write_text(text))
    return source


def _build(
    name: str,
    sources: Sequence[Path | str],
    variant: str,
    defines: Sequence[str],
    include: Sequence[Path | str],
    flags: Sequence[str],
    link: Sequence[str],
) -> Path:
    if (reason := have(variant)) is not None:
        raise RuntimeError(reason)
    spec = VARIANTS[variant]
    compiler = _compiler(variant)
    assert compiler is not None
    emulator_flags = [*COMMON_FLAGS, *spec.flags, f"-I{EMULATOR / 'include'}"]
    test_flags = [*emulator_flags, *spec.test_flags, f"-I{ROOT / 'csrc'}"]
    test_flags += [f"-I{folder}" for folder in include]
    test_flags += [f"-D{define}" for define in defines] + list(flags)
    jobs = [(_runtime_source(), emulator_flags)]
    jobs += [(Path(source).resolve(), test_flags) for source in sources]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as workers:
        objects = [str(o) for o in workers.map(lambda job: _object(job[0], compiler, job[1]), jobs)]
    link_flags = [*spec.link_flags, "-pthread", *link]
    # An object's name has the digest of its content in it.
    target = CACHE / variant / f"{name}-{_digest(*objects, *link_flags)}"
    if "-shared" in link:
        target = target.with_name(f"{target.name}.so")
    with _locked(target.with_name(f"{name}.lock")):
        if not target.exists():
            for old in target.parent.glob(f"{name}-*"):
                old.unlink()
            command = [compiler, *objects, *link_flags, "-o"]
            _into_place(target, lambda path: _call([*command, str(path)], f"linking {name}"))
    return target


def build_program(
    name: str,
    sources: Sequence[Path | str],
    variant: str,
    defines: Sequence[str] = (),
    include: Sequence[Path | str] = (),
    flags: Sequence[str] = (),
) -> Path:
    """The path of a program made of `sources` (.cpp or .cu, with a main) and the emulator."""
    return _build(name, sources, variant, defines, include, flags, ())


def build_library(
    name: str,
    sources: Sequence[Path | str],
    variant: str,
    defines: Sequence[str] = (),
    include: Sequence[Path | str] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
) -> Path:
    """The path of a shared library made of `sources` and the emulator."""
    return _build(name, sources, variant, defines, include, flags, ("-shared", *link))


def variant_of(path: Path) -> str:
    """Which variant a built program is."""
    return path.parent.name


def run(
    path: Path,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs a built program with its variant's environment; `env` is added to it."""
    spec = VARIANTS[variant_of(path)]
    own = {k: v for k, v in os.environ.items() if not k.startswith("BRAZE_EMULATOR_")}
    return subprocess.run(
        [*spec.runner, str(path), *args],
        capture_output=True,
        text=True,
        env={**own, **dict(spec.environment), **(env or {})},
        timeout=timeout,
    )
