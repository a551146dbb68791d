"""The convolution kernels, run on the CPU under every schedule and sanitizer, against a reference in double.

The programs are in tests/emulator/conv; BRAZE_EMULATOR_SEED chooses their data and schedules.
"""

from __future__ import annotations

from pathlib import Path

import emulator_build as build
import pytest
from test_batch_norm_kernels import NORM
from test_emulated_kernels import (
    CUDA,
    KERNELS,
    build_kernels,
    check_asan,
    check_msan,
    check_tsan,
    compiled_again,
    expect_silence,
    together,
)

pytestmark = pytest.mark.cpu_only("is about the emulator")

CONV = build.EMULATOR / "conv"


def conv_program(variant: str, faults: bool = False) -> Path:
    # The batch norms before and after, without their kernels.
    shared = [NORM / f"{name}.cpp" for name in ("norm", "problem")]
    sources = [together("conv", [*shared, *sorted(CONV.glob("*.cpp"))])]
    sources += [KERNELS / "harness.cpp", KERNELS / "intercept.cpp"]
    sources += [CUDA / "batch_norm_grid.cu", *sorted(CUDA.glob("conv_*.cu"))]
    return build_kernels("conv", sources, variant, faults)


# Few blocks, so that TSan can tell all threads of a launch apart.
FEW_BLOCKS = ("few_tiles", "empty", "wanted_in_part")


def test_every_schedule() -> None:
    output = expect_silence(conv_program("native"), "--all-schedules")
    assert "10 schedules" in output


@compiled_again
def test_other_compiler() -> None:
    expect_silence(conv_program("clang"), "--small", BRAZE_EMULATOR_ORDER="pct")


@compiled_again
def test_asan() -> None:
    check_asan(conv_program("asan"), "conv_")


@compiled_again
def test_msan() -> None:
    check_msan(conv_program("msan"))


@compiled_again
@pytest.mark.parametrize("mode", ["A", "B"])
def test_tsan(mode: str) -> None:
    check_tsan(conv_program("tsan"), mode, FEW_BLOCKS, FEW_BLOCKS)
