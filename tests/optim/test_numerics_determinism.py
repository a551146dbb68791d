"""The same bits for any number of threads and for every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from braze import optim
from braze._native import _C
from reference import Flags, bits
from test_numerics import CASES, DTYPES, case_id, make_optimizer
from test_numerics_values import specials
from torch import Tensor
from torch.nn import Parameter

pytestmark = pytest.mark.cpu_only("compares CPU threads and instruction sets")

STEPS = 3
# Large enough to be split, around the sizes of blocks and chunks, and one with a long tail.
SIZES = (1, 15, 16, 17, 511, 513, 16384, 16385, 50001)
MANY = 100


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads, instruction_set = torch.get_num_threads(), _C.instruction_set()
    yield
    torch.set_num_threads(threads)
    assert _C.set_instruction_set(instruction_set)


def make_tensors(dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [draw(size) for size in SIZES]
    tensors += [draw(1 + i % 40) for i in range(MANY)]
    tensors += [draw(130, 70).t(), draw(90, 61)[:, ::2], draw(4, 3, 9, 9)[..., 0]]
    tensors += [draw(2, 8, 13, 11).to(memory_format=torch.channels_last)]
    if not dtype.is_complex:
        values = specials(dtype)
        tensors.append(values.repeat_interleave(values.numel()))
    return tensors


def run(kind: str, flags: Flags, dtype: torch.dtype, *, skew: float = 0.0) -> list[Tensor]:
    """Bits of all parameters and state after some steps from a fixed start."""
    generator = torch.Generator().manual_seed(11)
    params = [Parameter(t) for t in make_tensors(dtype, generator)]
    optimizer = make_optimizer(kind, params, flags)
    for step in range(STEPS):
        for p in params:
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            # Strides differ between parameter and gradient for the strided ones.
            p.grad = grad
        if not dtype.is_complex:
            values = specials(dtype)
            params[-1].grad = values.roll(step).repeat(values.numel())
        if skew and step == 0:
            assert params[0].grad is not None
            params[0].grad[0] += skew
        optimizer.step()
    result = [bits(p) for p in params]
    for p in params:
        result += [bits(v) for k, v in optimizer.state.get(p, {}).items() if k != "step"]
    return result


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"tensor {i}: {int((a != b).sum())} of {a.numel()} differ"


ALL_DTYPES = (*DTYPES, torch.complex64)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=case_id)
@pytest.mark.parametrize(("kind", "flags"), CASES, ids=case_id)
def test_same_bits_everywhere(kind: str, flags: Flags, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    want = run(kind, flags, dtype)
    torch.set_num_threads(2)
    assert_same(run(kind, flags, dtype), want)
    for name in _C.available_instruction_sets():
        assert _C.set_instruction_set(name)
        assert _C.instruction_set() == name
        assert_same(run(kind, flags, dtype), want)


def test_comparison_sees_one_different_bit() -> None:
    kind, flags = CASES[1]
    want = run(kind, flags, torch.float32)
    assert_same(run(kind, flags, torch.float32), want)
    with pytest.raises(AssertionError, match="tensor 0: 1 of 1 differ"):
        assert_same(run(kind, flags, torch.float32, skew=1e-6), want)


def accumulated(dtype: torch.dtype, cls: Any, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(12)
    params = [Parameter(t) for t in make_tensors(dtype, generator)]
    optimizer = cls(params, lr=0.05, accumulation_steps=3, **options)
    for _ in range(6):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
    assert optimizer.updated
    return [bits(p) for p in params]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=case_id)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "CAG"])
def test_accumulation_has_the_same_bits_everywhere(name: str, dtype: torch.dtype) -> None:
    options = {} if name == "AdamW" else {"momentum": 0.9}
    cls = getattr(optim, name)
    torch.set_num_threads(1)
    want = accumulated(dtype, cls, **options)
    torch.set_num_threads(2)
    assert_same(accumulated(dtype, cls, **options), want)
    for instruction_set in _C.available_instruction_sets():
        assert _C.set_instruction_set(instruction_set)
        assert_same(accumulated(dtype, cls, **options), want)


def test_unknown_instruction_set_is_refused() -> None:
    before = _C.instruction_set()
    assert not _C.set_instruction_set("mmx")
    assert _C.instruction_set() == before
