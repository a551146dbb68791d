"""The one door to the compiled bindings: finds those for this torch and this Python, and loads them."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
BUILD = f"{os.path.basename(sys.executable or 'python')} -m braze build"

try:
    from braze import _build
except ImportError:
    raise ImportError(
        "braze's compiled extension is missing: this looks like a source folder that was never "
        f"built. Run, in the folder that holds pyproject.toml: {REBUILD}"
    ) from None
PACKAGE = Path(_build.__file__).parent
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}{sys.abiflags}"


def minor(version: str) -> str:
    """``2.13`` of ``2.13.1+cpu``: torch's C++ interface changes with every minor."""
    return ".".join(version.split("+")[0].split(".")[:2])


def bindings() -> dict[str, list[str]]:
    """The torch minors that the package has bindings for, and the Pythons of each."""
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.glob("_C.torch*.so")):
        if match := re.match(r"_C\.torch(\d+\.\d+)\.cpython-(\d)(\w+)-", file.name):
            found.setdefault(match[1], []).append(f"{match[2]}.{match[3]}")
    return found


def describe_bindings() -> str:
    """What :func:`bindings` found: ``torch 2.12 (Python 3.11), 2.13 (Python 3.10, 3.11)``."""
    parts = [f"{key} (Python {', '.join(pythons)})" for key, pythons in bindings().items()]
    return f"torch {', '.join(parts) or 'of no version'}"


def _no_binding() -> str:
    fitting = [torch_minor for torch_minor, pythons in bindings().items() if PYTHON in pythons]
    install = "install a torch that it was built for (pip install 'torch=={}.*'), or "
    return (
        f"braze was built against {describe_bindings()}, but torch {torch.__version__} is installed "
        f"in Python {PYTHON}, and their binary interfaces differ. Either "
        f"{install.format(fitting[-1]) if fitting else ''}compile what is missing ({BUILD}), or "
        f"rebuild braze from its source folder: {REBUILD}"
    )


def packaged(module: str) -> tuple[Path | None, str]:
    """The installed binding for this torch and this Python, or None and why there is none."""
    file = PACKAGE / f"{module}.torch{minor(torch.__version__)}{SUFFIX}"
    built, running = _build.CUDA_VERSION, torch.version.cuda or ""
    if module == "_cuda" and built and built.split(".")[0] != running.split(".")[0]:
        return None, f"braze was built with CUDA {built}, but torch has CUDA {running}"
    if file.is_file():
        return file, ""
    if module == "_C":
        return None, _no_binding()
    return None, _build.CUDA_MISSING or f"{file.name} is not among braze's installed files"


def _find(module: str) -> tuple[Path | None, str]:
    """The binding to load, or None and the reason; compiles it only where that is asked for."""
    path, reason = packaged(module)
    if path is None:
        from braze import build

        # python -m braze build: this runs before the command, which without _C would not be reached.
        command = module == "_C" and sys.argv == ["-m", "build"]
        command = command and sys.orig_argv[-2] in ("braze", "-mbraze")
        if command or os.environ.get("BRAZE_JIT", "0") not in ("", "0"):
            try:
                return build.build(module), ""
            except build.BuildError as error:
                if command:
                    sys.exit(f"braze: {error}")
                raise ImportError(f"BRAZE_JIT=1 asks for braze's {module}, but {error}") from error
        path, refused = build.find_built(module)
        reason = "; ".join(filter(None, [refused, reason]))
    return path, reason


def _broken(path: Path, error: Exception) -> ImportError:
    mend = (
        f"in braze's source folder: {REBUILD}"
        if path.parent == PACKAGE
        else f"rm -r '{path.parent}' && {BUILD}"
    )
    return ImportError(
        f"braze's compiled extension {path} does not load: {error}. Rebuild it with the Python and "
        f"torch you use, {mend}"
    )


def _import(module: str, path: Path) -> ModuleType:
    """Makes ``path`` the module ``braze._C`` or ``braze._cuda``. Raises ImportError."""
    name = f"braze.{module}"
    try:
        if path.parent != PACKAGE:  # it finds braze's libraries by being loaded after them
            from braze import build

            for library in build.libraries(module):
                ctypes.CDLL(str(library))
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no extension module of this Python")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except (ImportError, OSError) as error:
        raise _broken(path, error) from error
    sys.modules[name] = loaded
    setattr(sys.modules["braze"], module, loaded)
    return loaded


def load() -> ModuleType:
    """Returns ``braze._C``. Raises ImportError with the command that mends it."""
    path, reason = _find("_C")
    if path is None:
        raise ImportError(reason)
    return _import("_C", path)


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


def load_cuda(extension: ModuleType) -> tuple[Path | None, str]:
    """Gives ``extension`` the CUDA kernels. Returns their file, or None and why there are none.

    Nothing to load is no error: a CPU tensor does not need it. Raises ImportError if there is a
    ``braze._cuda`` that does not load.
    """
    if not torch.version.cuda:
        return None, f"torch {torch.__version__} is a build without CUDA"
    path, reason = _find("_cuda")
    if path is not None:
        try:
            extension.register_backend(_import("_cuda", path).backend)
        except RuntimeError as error:  # _C and _cuda are of two builds
            raise _broken(path, error) from error
    return path, reason


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
