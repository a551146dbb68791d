"""The batch-norm kernels, run on the CPU under every schedule and sanitizer, against a reference in double.

The programs are in tests/emulator/batch_norm; BRAZE_EMULATOR_SEED chooses their data and schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import emulator_build as build
import pytest
from test_emulated_kernels import FLAGS, KERNELS, expect_silence, run

NORM = build.EMULATOR / "batch_norm"
CUDA = build.ROOT / "csrc" / "cuda"


def norm_program(
    variant: str, cuda: Path = CUDA, name: str = "batch_norm", include: Sequence[Path] = ()
) -> Path:
    if (reason := build.have(variant)) is not None:
        pytest.skip(reason)
    sources = [*sorted(NORM.glob("*.cpp")), KERNELS / "harness.cpp", KERNELS / "intercept.cpp"]
    sources += sorted(cuda.glob("batch_norm_*.cu"))
    return build.build_program(
        name, sources, variant, include=(*include, NORM, KERNELS), flags=FLAGS
    )
