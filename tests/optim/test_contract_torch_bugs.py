"""Right results where the fused optimizers of torch 2.13 are silently wrong on the CPU."""

from __future__ import annotations

import math
from typing import Any

import braze.optim as optim
import pytest
import torch
from torch import Tensor, nn

EACH = pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
MOMENTUM: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {}}


def assert_close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def sgd_reference(p: Tensor, grads: list[Tensor], lr: float, momentum: float) -> Tensor:
    """16-bit parameters and momentum, fp32 arithmetic, one rounding per step and tensor."""
    p, buffer = p.clone(), None
    for grad in grads:
        g = grad.float()
        b = g if buffer is None else momentum * buffer.float() + g
        buffer = b.to(p.dtype)
        p = (p.float() - lr * b).to(p.dtype)
    return p


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 32, 37, 4096])
def test_16_bit_sgd_updates_every_element(dtype: torch.dtype, size: int) -> None:
    """torch's fused step leaves each full block of 16 as it was."""
    start = torch.linspace(1, 2, size).to(dtype)
    grads = [torch.linspace(-1 - k, 2, size).to(dtype) for k in range(4)]
    p = nn.Parameter(start.clone())
    optimizer = optim.SGD([p], lr=0.25, momentum=0.5, fused=True)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    expected = sgd_reference(start, grads, 0.25, 0.5)
    step = torch.finfo(dtype).eps * expected.abs().float().clamp(min=1)
    assert ((p.detach().float() - expected.float()).abs() <= step).all()
    assert (expected != start).float().mean() > 0.9


def test_momentum_after_an_overflow_on_the_first_step_is_not_garbage() -> None:
    """torch's fused step keeps an uninitialized buffer and uses it in the next step."""
    torch.use_deterministic_algorithms(True)  # which fills uninitialized memory with NaN
    try:
        p = nn.Parameter(torch.ones(37))
        optimizer = optim.SGD([p], lr=0.5, momentum=0.9, fused=True)
        p.grad = torch.full((37,), math.inf)
        optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
        optimizer.step()
        assert not optimizer.state
        del optimizer.found_inf
        for _ in range(2):
            p.grad = torch.full((37,), 2.0)
            optimizer.step()
        assert torch.equal(p.detach(), torch.full((37,), 1.0 - 0.5 * 2 - 0.5 * 3.8))
    finally:
        torch.use_deterministic_algorithms(False)


@EACH
@pytest.mark.parametrize("case", ["transposed gradient", "channels_last parameter", "both"])
def test_gradient_strides_may_differ_from_the_parameters(name: str, case: str) -> None:
    """torch's fused step pairs the elements by address."""
    base = torch.randn(4, 5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = torch.randn(3, 4, 5, 6, 7, dtype=torch.float64)

    def start() -> Tensor:
        if case == "transposed gradient":
            return base.clone()
        return base.clone(memory_format=torch.channels_last)

    p, q = nn.Parameter(start()), nn.Parameter(start())
    mine = getattr(optim, name)([p], lr=0.1, fused=True, **MOMENTUM[name])
    reference = getattr(torch.optim, name)([q], lr=0.1, foreach=False, **MOMENTUM[name])
    for grad in grads:
        p.grad = grad if case == "channels_last parameter" else grad.mT.contiguous().mT
        q.grad = grad.clone(memory_format=torch.preserve_format)
        assert p.grad.stride() != p.stride()
        mine.step()
        reference.step()
    assert_close(p.detach(), q.detach())


@EACH
def test_a_view_with_gaps_leaves_its_neighbours_alone(name: str) -> None:
    """torch's fused step writes numel elements from the first one on."""
    whole = torch.linspace(-1, 1, 60, dtype=torch.float64).view(20, 3)
    untouched = whole.clone()
    column = whole[:, 0]
    copied = nn.Parameter(column.clone())
    column.requires_grad_()
    grad = torch.linspace(1, 2, 20, dtype=torch.float64)
    column.grad, copied.grad = grad.clone(), grad.clone()
    getattr(optim, name)([column], lr=0.1, fused=True, **MOMENTUM[name]).step()
    getattr(torch.optim, name)([copied], lr=0.1, foreach=False, **MOMENTUM[name]).step()
    assert torch.equal(whole[:, 1:], untouched[:, 1:])
    assert_close(whole[:, 0].detach(), copied.detach())
