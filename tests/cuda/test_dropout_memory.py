"""What each warp's memory requests of dropout's kernels cost, counted on the CPU."""

from __future__ import annotations

import functools

import emulator_build as build
import pytest
from test_kernel_memory import KERNELS, VARIANT, Counts, count_program

pytestmark = pytest.mark.cpu_only("is about the emulator")

OPERANDS = {"scale": 2, "add": 3, "activate": 2, "activate_grad": 3, "rows": 2, "channels_last": 2}
SIZES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}
ELEMENTS = 12288


@functools.cache
def counted() -> Counts:
    if (reason := build.have(VARIANT)) is not None:
        pytest.skip(reason)
    sources = [KERNELS / "dropout_memory.cpp", build.ROOT / "csrc/cuda/dropout_launch.cu"]
    return count_program(build.build_program("memory_dropout", sources, VARIANT, include=[KERNELS]))


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("step", OPERANDS)
def test_vectors_are_coalesced(step: str, dtype: str) -> None:
    """16 bytes a lane, full warps, one stretch of memory a request, no byte moved in vain."""
    places = counted()[f"{step}_{dtype}"]
    for place, (requests, lanes, sectors) in places.items():
        assert " 16 bytes: " in place, place
        assert lanes == 32 * requests and sectors == 16 * requests, place
    moved = sum(sectors for _, _, sectors in places.values()) * 32
    assert moved == ELEMENTS * SIZES[dtype] * OPERANDS[step]


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("step", OPERANDS)
def test_misaligned_tensors_are_coalesced_too(step: str, dtype: str) -> None:
    """Element by element, but a warp's requests are one stretch, one sector more than aligned."""
    places = counted()[f"{step}_{dtype}_off_by_1"]
    for place, (requests, lanes, sectors) in places.items():
        assert f" {SIZES[dtype]} bytes: " in place, place
        assert lanes == 32 * requests
        assert sectors <= (SIZES[dtype] + 1) * requests, place
    assert sum(lanes for _, lanes, _ in places.values()) == ELEMENTS * OPERANDS[step]
