"""The rows of a wheel: which torches and which CPythons it has bindings for, and where those are found."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

# What bindings are compiled and linked with; the rest of a torch wheel is left in it.
NEEDED = re.compile(
    r"torch/(version\.py|include/.*|lib/lib(c10|c10_cuda|torch|torch_\w+)\.so)|torch-[^/]*\.dist-info/METADATA"
)
T = TypeVar("T")
ASK = "import sys, sysconfig as s; print(*sys.version_info[:2], s.get_config_var('EXT_SUFFIX'))"


class WheelError(RuntimeError):
    """No wheel, or none that may be used; the text says why."""


class MissingError(WheelError):
    """A torch or a Python cannot be had; the text says which and how to get it."""


@dataclass(frozen=True)
class Torch:
    """The folder of a torch package, of any CPython, which is never imported."""

    root: Path
    version: str  # 2.13.0+cpu
    cuda: str  # 13.0, or ""
    oldest_python: tuple[int, ...] = ()  # that it is made for

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])

    @property
    def requirement(self) -> str:
        """What pip installs to have it: builds with CUDA have no local version there."""
        return f"torch==={self.version.partition('+')[0] if self.cuda else self.version}"


@dataclass(frozen=True)
class Python:
    executable: Path
    version: str  # 3.11
    suffix: str  # .cpython-311-x86_64-linux-gnu.so

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))


@dataclass(frozen=True)
class Row:
    """One binding, and with a torch that has CUDA one of _cuda."""

    torch: Torch
    python: Python

    def __str__(self) -> str:
        return f"torch {self.torch.minor}, Python {self.python.version}"

    def file(self, module: str) -> str:
        return f"{module}.torch{self.torch.minor}{self.python.suffix}"


def ask_python(executable: Path) -> Python | None:
    """What ``executable`` is; None if it does not run."""
    try:
        done = subprocess.run([executable, "-c", ASK], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    major, minor, suffix = done.stdout.split()
    return Python(executable, f"{major}.{minor}", suffix)


def find_python(asked: str) -> Python:
    """``asked``: a version such as 3.11, or the path of an interpreter. Raises :class:`MissingError`."""
    if os.sep in asked:
        candidates: Iterable[Path] = [Path(asked)]
    else:
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        on_path = shutil.which(f"python{asked}")
        candidates = [
            Path(sys.executable),
            *([Path(on_path)] if on_path else []),
            *sorted(pyenv.glob(f"{asked}.*/bin/python"), reverse=True),
        ]
    for candidate in candidates:
        python = ask_python(candidate)
        if python is not None and (os.sep in asked or python.version == asked):
            return python
    raise MissingError(
        f"Python {asked} is not here: python{asked} is neither on PATH nor among pyenv's versions. Install "
        f"it with its headers, or name its path: --python /path/to/python{asked}"
    )


def read_torch(root: Path) -> Torch | None:
    """The torch whose package is the folder ``root``; None if it is none."""
    if not (root / "version.py").is_file():
        return None
    facts = runpy.run_path(str(root / "version.py"))
    version = facts["__version__"]
    base = version.partition("+")[0]
    files = [root / "METADATA", *root.parent.glob(f"torch-{base}*.dist-info/METADATA")]
    text = next((file.read_text() for file in files if file.is_file()), "")
    oldest = re.search(r"^Requires-Python: >=([\d.]+)", text, re.MULTILINE)
    numbers = tuple(map(int, oldest[1].split("."))) if oldest else ()
    return Torch(root, version, facts.get("cuda") or "", numbers)


def fits(asked: str, version: str) -> bool:
    """2.13 asks for any 2.13, 2.13.0 for that one and none with another name, such as 2.13.0+cpu."""
    if asked.count(".") < 2:
        return version.split(".")[:2] == asked.split(".")
    return version == asked or (version.partition("+")[0] == asked and "+cpu" not in version)


def installed_torch() -> Torch | None:
    spec = importlib.util.find_spec("torch")
    return read_torch(Path(spec.origin).parent) if spec and spec.origin else None


def unpack(wheel: Path, cache: Path) -> Torch:
    """What bindings need of a torch wheel, kept in ``cache``."""
    folder = cache / wheel.stem
    if not zipfile.is_zipfile(wheel):
        raise MissingError(f"{wheel} is no wheel, or not all of one: get it anew")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as part, zipfile.ZipFile(wheel) as packed:
            packed.extractall(part, [name for name in packed.namelist() if NEEDED.match(name)])
            for metadata in Path(part).glob("torch-*/METADATA"):
                metadata.rename(Path(part, "torch/METADATA"))
            Path(part, "torch").rename(folder)
    torch = read_torch(folder)
    if torch is None:
        raise MissingError(f"{wheel} holds no torch package")
    return torch


def find_torch(asked: str, wheels: Path | None, cache: Path) -> Torch:
    """``asked``: 2.13, 2.13.0 or "" for the installed one. Raises :class:`MissingError`.

    Looked for here, in ``wheels`` (torch wheels, or folders into which they were unpacked), in ``cache``, and
    through pip.
    """
    installed = installed_torch()
    if installed and (not asked or fits(asked, installed.version)):
        return installed
    if not asked:
        raise MissingError("no torch is installed; name one: --torch 2.13")
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)

    def unpacked(folder: Path, pattern: str) -> Torch | None:
        for file in sorted(folder.glob(pattern), reverse=True):
            found = read_torch(file.parent)
            if found and fits(asked, found.version):
                return found
        return None

    def packed(folder: Path) -> Torch | None:
        for wheel in sorted(folder.glob("torch-*.whl"), reverse=True):
            if fits(asked, wheel.name.split("-")[1]):
                return unpack(wheel, cache)
        return None

    if wheels and (found := unpacked(wheels, "**/torch/version.py") or packed(wheels)):
        return found
    if found := unpacked(cache, "*/version.py"):
        return found
    exact = f"torch=={asked}.*" if asked.count(".") < 2 else f"torch==={asked}"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ]
        done = subprocess.run(
            [*pip, "--dest", folder, exact],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode == 0 and (found := packed(Path(folder))):
            return found
    raise MissingError(
        f"torch {asked} is not installed, not in --torch-wheels, and pip does not get it: put its wheel, "
        f"of any Python, into a folder and name that: --torch-wheels DIR. pip says:\n"
        + done.stdout.strip()[-500:]
    )


def find_rows(
    torches: list[str], pythons: list[str], wheels: Path | None, cache: Path, skip: bool
) -> tuple[list[Row], list[str]]:
    """All pairs, and why some cannot be built. Raises :class:`MissingError` instead unless ``skip``."""
    missing: list[str] = []

    def found(find: Callable[[str], T], asked: list[str]) -> Iterator[T]:
        for each in asked:
            try:
                yield find(each)
            except MissingError as error:
                missing.append(str(error))

    has_torches = list(found(lambda asked: find_torch(asked, wheels, cache), torches))
    has_pythons = list(found(find_python, pythons))
    rows = []
    for row in (Row(torch, python) for torch in has_torches for python in has_pythons):
        if row.python.numbers < row.torch.oldest_python:
            missing.append(f"torch {row.torch.version} is not made for Python {row.python.version}")
        else:
            rows.append(row)
    if missing and (not skip or not rows):
        raise MissingError("\n".join([*missing, "To build the rest alone: --skip-missing"]))
    return rows, missing
