"""The one door to the compiled extensions: checks that they fit this torch, then loads them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
BUILD = f"{os.path.basename(sys.executable or 'python')} -m braze build"


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


def choose_instruction_set(extension: ModuleType) -> None:
    """Takes the instruction set that BRAZE_CPU_CAPABILITY names; without it the best one stays.

    Raises ImportError if this machine or build does not have it.
    """
    name = os.environ.get("BRAZE_CPU_CAPABILITY", "")
    if name and not extension.set_instruction_set(name):
        raise ImportError(
            f"BRAZE_CPU_CAPABILITY is {name!r}; this machine and this build of braze have "
            f"{', '.join(extension.available_instruction_sets())}"
        )


def _packaged(torch_cuda: str) -> tuple[Path | None, str]:
    """The ``_cuda`` that was installed with braze, if it fits; else why there is none."""
    build = importlib.import_module("braze._build")
    spec = importlib.util.find_spec("braze._cuda")
    if spec is None or spec.origin is None:
        return None, build.CUDA_MISSING or "braze._cuda is not among braze's installed files"
    if build.CUDA_VERSION.split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"braze was built with CUDA {build.CUDA_VERSION}, but torch has CUDA {torch_cuda}"
        return None, reason
    return Path(spec.origin), ""


def _find_cuda(torch_cuda: str) -> tuple[Path | None, str]:
    """The ``_cuda`` to load, or None and the reason; builds it only where BRAZE_JIT=1 asks for it."""
    if os.environ.get("BRAZE_JIT", "0") not in ("", "0"):
        from braze import build

        try:
            return build.build(), ""
        except build.BuildError as error:
            raise ImportError(f"BRAZE_JIT=1 asks for braze's CUDA kernels, but {error}") from error
    path, reason = _packaged(torch_cuda)
    if path is None:
        from braze import build

        path, refused = build.find_built()
        reason = "; ".join(filter(None, [reason, refused]))
    return path, reason


def load_cuda(extension: ModuleType) -> tuple[Path | None, str]:
    """Gives ``extension`` the CUDA kernels. Returns their file, or None and why there are none.

    Nothing to load is no error: a CPU tensor does not need it. Raises ImportError if there is a
    ``braze._cuda`` that does not load.
    """
    if not torch.version.cuda:
        return None, f"torch {torch.__version__} is a build without CUDA"
    path, reason = _find_cuda(torch.version.cuda)
    if path is None:
        return None, reason
    try:
        spec = importlib.util.spec_from_file_location("braze._cuda", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no extension module of this Python")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        extension.register_backend(module.backend)
    except (ImportError, RuntimeError) as error:  # RuntimeError: _C and _cuda are of two builds
        installed = importlib.import_module("braze._build").__file__
        mend = (
            f"in braze's source folder: {REBUILD}"
            if installed and path.parent == Path(installed).parent
            else f"rm -r '{path.parent}' && {BUILD}"
        )
        raise ImportError(
            f"braze's CUDA kernels ({path}) do not load: {error}. Rebuild them with the Python and "
            f"torch you use, {mend}"
        ) from error
    sys.modules["braze._cuda"] = module
    return path, ""


def cuda_missing() -> str:
    """Why braze has no CUDA kernels here and what to do about it; "" when they are loaded."""
    if CUDA_FILE is not None:
        return ""
    if not torch.version.cuda:
        return f"{_CUDA_REASON}; install one with CUDA (https://pytorch.org/get-started)"
    return f"{_CUDA_REASON}; build them for this torch with: {BUILD}"


_C = load()
choose_instruction_set(_C)
_C.set_memory_reuse(os.environ.get("BRAZE_REUSE_MEMORY", "") != "0")
CUDA_FILE, _CUDA_REASON = load_cuda(_C)
