"""The one door to the compiled extension: checks that it fits this torch, then loads it."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def check_torch(built: str, running: str) -> None:
    """Raises ImportError unless both torch versions share their minor.

    torch's C++ ABI changes with every minor, and a mismatch can compute garbage instead of failing.
    """
    if _minor(built) != _minor(running):
        raise ImportError(
            f"braze was built against torch {built}, but torch {running} is installed, and their "
            f"binary interfaces differ. Either install the torch it was built for "
            f"(pip install 'torch=={'.'.join(_minor(built))}.*') or rebuild braze from its source "
            f"folder against the present one: {REBUILD}"
        )


def load() -> ModuleType:
    """Returns ``braze._C``. Raises ImportError with the command that mends it."""
    try:
        build = importlib.import_module("braze._build")
    except ModuleNotFoundError:
        raise ImportError(
            "braze's compiled extension is missing: this looks like a source folder that was never "
            f"built. Run, in the folder that holds pyproject.toml: {REBUILD}"
        ) from None
    check_torch(build.TORCH_VERSION, torch.__version__)
    try:
        return importlib.import_module("braze._C")
    except ImportError as error:
        raise ImportError(
            f"braze's compiled extension does not load ({error}). Rebuild it from braze's source "
            f"folder with the Python and torch you use: {REBUILD}"
        ) from error


_C = load()
