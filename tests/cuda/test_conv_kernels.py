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
    compiled_again,
    expect_silence,
    run,
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
    program = conv_program("asan")
    expect_silence(program, "--small", BRAZE_EMULATOR_ORDER="random")
    status, output = run(program, "seeded_short_buffer")
    assert status != 0 and "AddressSanitizer: heap-buffer-overflow" in output, output
    assert "conv_" in output, output


@compiled_again
def test_msan() -> None:
    program = conv_program("msan")
    expect_silence(program, "--small", BRAZE_EMULATOR_ORDER="reverse")
    status, output = run(program, "seeded_fresh_buffer")
    assert status != 0 and "MemorySanitizer: use-of-uninitialized-value" in output, output


@compiled_again
@pytest.mark.parametrize("mode", ["A", "B"])
def test_tsan(mode: str) -> None:
    program = conv_program("tsan")
    env = {"BRAZE_EMULATOR_TSAN_MODE": mode}
    output = expect_silence(program, "--small", "--barriers", *FEW_BLOCKS, **env)
    sites = [line.split()[1] for line in output.splitlines() if line.startswith("barrier")]
    status, output = run(
        program, "--small", *FEW_BLOCKS, BRAZE_EMULATOR_DROP_BARRIER=sites[0], **env
    )
    assert status != 0 and "WARNING: ThreadSanitizer: data race" in output, output
