"""The batch-norm kernels, run on the CPU under every schedule and sanitizer, against a reference in double.

The programs are in tests/emulator/batch_norm; BRAZE_EMULATOR_SEED chooses their data and schedules.
"""

from __future__ import annotations

from pathlib import Path

import emulator_build as build
import pytest
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

NORM = build.EMULATOR / "batch_norm"


def norm_program(variant: str, faults: bool = False) -> Path:
    sources = [together("batch_norm", sorted(NORM.glob("*.cpp")))]
    sources += [KERNELS / "harness.cpp", KERNELS / "intercept.cpp"]
    sources += sorted(CUDA.glob("batch_norm_*.cu"))
    return build_kernels("batch_norm", sources, variant, faults)


# Few blocks, so that TSan can tell all threads of a launch apart.
FEW_BLOCKS = ("few_blocks", "empty", "coefficients", "not_finite", "wanted_in_part")


def test_every_schedule() -> None:
    output = expect_silence(norm_program("native"), "--all-schedules")
    assert "10 schedules" in output


@compiled_again
def test_other_compiler() -> None:
    expect_silence(norm_program("clang"), "--small", BRAZE_EMULATOR_ORDER="pct")


@compiled_again
def test_asan() -> None:
    check_asan(norm_program("asan"), "batch_norm_units.cuh")


@compiled_again
def test_msan() -> None:
    check_msan(norm_program("msan"))


@compiled_again
@pytest.mark.parametrize("mode", ["A", "B"])
def test_tsan(mode: str) -> None:
    check_tsan(norm_program("tsan"), mode, FEW_BLOCKS, FEW_BLOCKS)
