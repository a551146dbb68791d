"""Parameters, gradients and state in any strided layout: every element is found by its logical index."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from braze import optim
from reference import same_bits, ulp_distance
from test_numerics import case_id
from torch import Tensor
from torch.nn import Parameter

STEPS = 3
OPTIMIZERS = ["SGD", "AdamW"]
DTYPES = [torch.float32, torch.bfloat16]
# Byte patterns no update can leave in place by accident.
GUARD = 12345.0


def make(name: str, params: list[Parameter]) -> torch.optim.Optimizer:
    if name == "SGD":
        return optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)
    return optim.AdamW(params, lr=0.01, weight_decay=0.1)


def offset(t: Tensor, elements: int) -> Tensor:
    """The same values at a storage offset: a base address that is not aligned."""
    storage = torch.full((t.numel() + 2 * elements,), GUARD, dtype=t.dtype)
    view = storage[elements : elements + t.numel()].view(t.shape)
    return view.copy_(t)


def gapped(t: Tensor) -> Tensor:
    """The same values with a guard after every element of the last dimension."""
    storage = torch.full((*t.shape[:-1], t.shape[-1], 2), GUARD, dtype=t.dtype)
    return storage[..., 0].copy_(t)


def order(*dims: int) -> Callable[[Tensor], Tensor]:
    """The same values, stored with the dimensions in another order."""
    inverse = [dims.index(d) for d in range(len(dims))]
    return lambda t: t.permute(dims).contiguous().permute(inverse)


def memory_format(fmt: torch.memory_format) -> Callable[[Tensor], Tensor]:
    return lambda t: t.contiguous(memory_format=fmt)


def dense(t: Tensor) -> Tensor:
    return t.contiguous()


def expanded(t: Tensor) -> Tensor:
    """Stride 0 in the first dimension: what ``sum().backward()`` makes."""
    return t[:1].clone().expand(t.shape)


def odd_strides(t: Tensor) -> Tensor:
    """Dimensions of size 1 with a stride that says nothing."""
    strides = [7777 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.contiguous().as_strided(t.shape, strides)


LAST = memory_format(torch.channels_last)
LAST_3D = memory_format(torch.channels_last_3d)
# name: shape, layout of the parameter, of the gradient, of the state (None: the optimizer's own)
CASES: dict[str, tuple[tuple[int, ...], Callable, Callable, Callable | None]] = {
    "contiguous": ((33, 65), dense, dense, None),
    "transposed parameter": ((33, 65), order(1, 0), dense, None),
    "transposed gradient": ((33, 65), dense, order(1, 0), None),
    "both transposed": ((33, 65), order(1, 0), order(1, 0), None),
    "channels_last parameter": ((9, 5, 7, 6), LAST, dense, None),
    "channels_last gradient": ((9, 5, 7, 6), dense, LAST, None),
    "channels_last_3d parameter": ((4, 5, 3, 7, 6), LAST_3D, dense, None),
    "channels_last_3d gradient": ((4, 5, 3, 7, 6), dense, LAST_3D, None),
    "channels_last of one channel": ((9, 1, 7, 6), LAST, dense, None),
    "channels_last of one pixel": ((9, 5, 1, 1), dense, LAST, None),
    "odd strides of size 1": ((1, 33, 1, 20), odd_strides, dense, None),
    "odd strides of the gradient": ((1, 33, 1, 20), dense, odd_strides, odd_strides),
    "expanded gradient": ((33, 65), dense, expanded, None),
    "expanded gradient, transposed": ((33, 65), order(1, 0), expanded, None),
    "offset 1": ((1031,), lambda t: offset(t, 1), dense, None),
    "offset 2": ((1031,), lambda t: offset(t, 2), lambda t: offset(t, 1), None),
    "offset 3": ((1031,), lambda t: offset(t, 3), lambda t: offset(t, 3), None),
    "offset state": ((1031,), dense, lambda t: offset(t, 1), lambda t: offset(t, 3)),
    "gapped parameter": ((33, 65), gapped, dense, None),
    "gapped gradient": ((33, 65), dense, gapped, None),
    "gapped state": ((33, 65), dense, dense, gapped),
    "transposed state": ((33, 65), dense, dense, order(1, 0)),
    "all different": ((9, 5, 7, 6), LAST, order(3, 2, 1, 0), gapped),
    "long rows": ((2, 5001), gapped, dense, None),
    "larger than a chunk": ((150, 151), order(1, 0), dense, None),
    "0-dim": ((), dense, dense, None),
    "one element": ((1, 1, 1), dense, odd_strides, None),
    "empty": ((0, 4), dense, order(1, 0), None),
    "6-d": ((2, 3, 4, 2, 3, 5), order(5, 0, 3, 1, 4, 2), dense, None),
    "8-d": (
        (2, 1, 3, 2, 2, 1, 3, 2),
        order(7, 0, 6, 1, 5, 2, 4, 3),
        order(3, 1, 0, 2, 7, 4, 5, 6),
        None,
    ),
    "12-d": ((2,) * 12, order(*range(0, 12, 2), *range(11, 0, -2)), dense, gapped),
}


def check_layout(
    name: str,
    values: Tensor,
    param_layout: Callable,
    grad_layout: Callable,
    state_layout: Callable | None,
) -> None:
    """The strided parameter against a contiguous one that sees the same numbers."""
    generator = torch.Generator().manual_seed(21)
    plain = Parameter(values.clone())
    strided = Parameter(param_layout(values.clone()))
    assert torch.equal(plain, strided)
    reference, optimizer = make(name, [plain]), make(name, [strided])
    for step in range(STEPS):
        drawn = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        grad = grad_layout(drawn.to(values.dtype))
        strided.grad = grad
        plain.grad = grad.contiguous().clone()
        reference.step()
        optimizer.step()
        if step == 0 and state_layout is not None:
            entry = optimizer.state[strided]
            for key in entry.keys() - {"step"}:
                entry[key] = state_layout(entry[key])
    assert same_bits(strided.detach(), plain.detach())
    for key, value in reference.state[plain].items():
        assert same_bits(optimizer.state[strided][key], value), key


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_layout(case: str, name: str, dtype: torch.dtype) -> None:
    """Bit-identical to the contiguous step, which is itself checked against the formulas."""
    shape, *layouts = CASES[case]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(20)).to(dtype)
    check_layout(name, values, *layouts)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "case",
    ["transposed parameter", "gapped parameter", "gapped state", "channels_last gradient", "6-d"],
)
def test_complex_layout(case: str, name: str) -> None:
    shape, *layouts = CASES[case]
    generator = torch.Generator().manual_seed(22)
    check_layout(name, torch.randn(shape, generator=generator, dtype=torch.complex64), *layouts)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_strided_step_equals_torch(name: str) -> None:
    """An anchor outside braze for what the other tests compare with each other."""
    generator = torch.Generator().manual_seed(23)
    start = torch.randn(9, 5, 7, 6, generator=generator, dtype=torch.float64)
    ours = Parameter(start.clone(memory_format=torch.channels_last))
    theirs = Parameter(start.clone())
    mine = make(name, [ours])
    model: torch.optim.Optimizer
    if name == "SGD":
        model = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False)
    else:
        model = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, foreach=False)
    for _ in range(STEPS):
        ours.grad = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        mine.step()
        model.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-13, atol=1e-13)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "first column": lambda x: x[..., 0],
    "every other": lambda x: x[..., ::2],
    "rows 1 to 3": lambda x: x[:, 1:3],
    "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "transposed block": lambda x: x[1:, :, 2:5].transpose(0, 2),
}


def untouched(storage: Tensor, before: Tensor, view: Callable[[Tensor], Tensor]) -> bool:
    """Whether everything outside the view kept its bits."""
    outside = torch.ones_like(storage, dtype=torch.bool)
    view(outside).fill_(False)
    return same_bits(storage[outside], before[outside])


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", VIEWS)
def test_neighbours_of_a_view_keep_their_bits(case: str, name: str, dtype: torch.dtype) -> None:
    view = VIEWS[case]
    generator = torch.Generator().manual_seed(24)
    storage = torch.randn(30, 7, 8, generator=generator).to(dtype)
    storage[0, 0, 1] = torch.nan
    before = storage.clone()
    p = Parameter(view(storage))
    optimizer = make(name, [p])
    for _ in range(STEPS):
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    assert untouched(storage, before, view)
    inside = view(storage)
    assert torch.equal(inside.isnan(), view(before).isnan())
    changed = ulp_distance(inside, view(before)) > 0
    assert bool(changed[~inside.isnan()].float().mean() > 0.9)


def test_neighbour_detector_sees_a_touched_neighbour() -> None:
    storage = torch.zeros(3, 7, 8)
    before = storage.clone()
    view = VIEWS["every other"]
    view(storage).fill_(1.0)
    assert untouched(storage, before, view)
    storage[2, 6, 7] = -0.0
    assert not untouched(storage, before, view)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_interleaved_views_of_one_storage(name: str, dtype: torch.dtype) -> None:
    """Two parameters that share a storage but no element are updated independently."""
    generator = torch.Generator().manual_seed(25)
    storage = torch.randn(40, 6, generator=generator).to(dtype)
    apart = [Parameter(storage[:, i::2].clone()) for i in range(2)]
    shared = [Parameter(storage[:, i::2]) for i in range(2)]
    reference, optimizer = make(name, apart), make(name, shared)
    for _ in range(STEPS):
        for p, q in zip(shared, apart, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.clone()
        reference.step()
        optimizer.step()
    for p, q in zip(shared, apart, strict=True):
        assert same_bits(p.detach(), q.detach())
    assert same_bits(storage[:, ::2], apart[0].detach())
