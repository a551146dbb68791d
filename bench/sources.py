"""Which sources a measured figure depends on, and their hash. Standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

# What the extensions are compiled from.
BUILT = ("csrc/**/*", "cmake/**/*", "CMakeLists.txt")
_KERNELS = ("csrc/cuda/**/*", "csrc/math/**/*", "csrc/plan/**/*", "csrc/ops/*_cuda.*")
# What runs on the GPU in each kernel family, and what decides which work it gets.
FAMILIES: dict[str, tuple[str, ...]] = {
    "optimizer": (
        *_KERNELS,
        "csrc/ops/optim/*",
        "csrc/ops/tensor_work*",
        "csrc/ops/clip*",
        "csrc/ops/measured*",
    ),
    "batch_norm": (*_KERNELS, "csrc/ops/batch_norm*", "csrc/ops/dense*"),
    "conv": (*_KERNELS, "csrc/ops/conv*", "csrc/ops/batch_norm*"),
    "dropout": (*_KERNELS, "csrc/ops/dropout*", "csrc/ops/dense*"),
}


def find_root(start: Path | None = None) -> Path:
    """The source checkout that holds ``start`` (default: the current folder), else the one of this file.

    Raises:
        FileNotFoundError: neither is inside a checkout.
    """
    begin = (Path.cwd() if start is None else start).resolve()
    here = [] if start is not None else [Path(__file__).resolve().parents[1]]
    for folder in [begin, *begin.parents, *here]:
        project = folder / "pyproject.toml"
        if (folder / "csrc").is_dir() and project.is_file():
            if 'name = "braze"' in project.read_text():
                return folder
    raise FileNotFoundError(
        f"{begin} is not inside a source checkout of braze (a folder with csrc/ and braze's "
        "pyproject.toml), and the hashes are of its sources. Change into the checkout and try again"
    )


def files_of(root: Path, globs: Iterable[str]) -> list[Path]:
    """The files that the globs match below ``root``, each once, in a fixed order."""
    found = {p for pattern in globs for p in root.glob(pattern) if p.is_file()}
    return sorted(p for p in found if "__pycache__" not in p.parts and p.suffix != ".pyc")


def digest(root: Path, globs: Iterable[str]) -> str:
    """sha256 over names and contents of those files: equal only if no file was changed, added or moved."""
    total = hashlib.sha256()
    for path in files_of(root, globs):
        content = path.read_bytes()
        total.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()
