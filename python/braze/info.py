"""What is built and what runs where: ``python -m braze info``."""

from __future__ import annotations

import os
import platform

import torch

from braze import _native
from braze._native import _C
from braze.nn import _conv_choice


def _cuda() -> str:
    if missing := _native.cuda_missing():
        return f"none: {missing}"
    return f"loaded from {_native.CUDA_FILE}, torch's CUDA {torch.version.cuda}"


def _instruction_set() -> str:
    name = _C.instruction_set()
    asked = " by BRAZE_CPU_CAPABILITY" if os.environ.get("BRAZE_CPU_CAPABILITY") == name else ""
    available = ", ".join(_C.available_instruction_sets())
    return (
        f"{name}{asked} (available: {available}); torch's {torch.backends.cpu.get_cpu_capability()}"
    )


def build_info() -> dict[str, str]:
    """Versions and capabilities, one line each, to paste into a bug report. Never raises."""
    from braze import __version__, _build

    return {
        "braze": __version__,
        "torch": f"{torch.__version__} (built against {_C.TORCH_VERSION})",
        "binding": f"{_C.__file__}; installed are those for {_native.describe_bindings()}",
        "python": platform.python_version(),
        "compiler": _build.COMPILER,
        "machine": platform.machine(),
        "instruction set": _instruction_set(),
        "threads": str(torch.get_num_threads()),
        "CPU kernels": "SGD, Adam, AdamW, RMSprop, CAG, Lion, gradient accumulation: fp32 fp64 bf16 fp16 "
        "complex; "
        "batch norm + activation, dropout: fp32 fp64 bf16 fp16",
        "CUDA kernels": _cuda(),
        "convolutions": _conv_choice.describe(),
    }


def run(_: object) -> int:
    """Prints :func:`build_info`. Returns 0."""
    for key, value in build_info().items():
        print(f"{key:16} {value}")
    return 0
