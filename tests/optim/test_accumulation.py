"""Gradient accumulation and CAG: equal to one big batch, resumable, and safe under overflow."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import braze.optim
import pytest
import torch
from micro_batches import (
    KINDS,
    TORCH_FLAGS,
    assert_close,
    assert_same,
    build,
    gradients,
    parameters,
    put,
)
from torch import Tensor
from torch.nn import Parameter


@pytest.mark.parametrize("flags", TORCH_FLAGS, ids=["native", "torch"])
@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_one_big_batch(kind: str, mode: str, flags: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    a = build(kind, ours, accumulation_steps=3, accumulation=mode, **flags)
    b = build(kind, theirs)
    for window in range(3):
        micro = [gradients(10 * window + j) for j in range(3)]
        for j, grads in enumerate(micro):
            a.zero_grad()
            put(ours, grads)
            a.step()
            assert a.updated is (j == 2)
        total = [sum(g) / (3 if mode == "mean" else 1) for g in zip(*micro, strict=True)]
        put(theirs, total)
        b.step()
        assert_close(ours, theirs)


@pytest.mark.parametrize("flags", TORCH_FLAGS, ids=["native", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_unequal_weights_equal_one_big_batch(kind: str, flags: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    a, b = build(kind, ours, **flags), build(kind, theirs)
    for window in range(3):
        weights = (17.0, 3.0, 0.5, 80.0)
        micro = [gradients(10 * window + j) for j in range(4)]
        for weight, grads in zip(weights, micro, strict=True):
            put(ours, grads)
            a.accumulate(weight)
            assert all(p.grad is None for p in ours)
        a.step()
        assert a.updated
        mean = [
            sum(w * g.double() for w, g in zip(weights, gs, strict=True)) / sum(weights)
            for gs in zip(*micro, strict=True)
        ]
        put(theirs, [m.float() for m in mean])
        b.step()
        assert_close(ours, theirs)


def test_present_gradients_join_with_weight_one() -> None:
    p = Parameter(torch.zeros(2))
    optimizer = braze.optim.SGD([p], lr=1.0)
    p.grad = torch.tensor([4.0, 8.0])
    optimizer.accumulate(3.0)
    p.grad = torch.tensor([8.0, 0.0])
    optimizer.step()
    assert p.tolist() == [-(3 * 4 + 8) / 4, -(3 * 8) / 4]


def test_parameter_without_gradient_contributes_zero() -> None:
    p, q, r = (Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = braze.optim.SGD([p, q, r], lr=1.0, momentum=0.5, accumulation_steps=2)
    p.grad = torch.ones(1)
    optimizer.step()
    q.grad = torch.ones(1)
    optimizer.step()
    assert (p.item(), q.item(), r.item()) == (-0.5, -0.5, 0.0)
    assert r not in optimizer.state and p in optimizer.state


def test_bf16_gradients_accumulate_in_fp32() -> None:
    # In bf16 256 + 1 = 256: a bf16 accumulator would lose every gradient after the first.
    p = Parameter(torch.zeros(40, dtype=torch.bfloat16))
    optimizer = braze.optim.SGD([p], lr=1.0, accumulation="sum")
    for value in [256.0] + [1.0] * 64:
        p.grad = torch.full_like(p, value)
        optimizer.accumulate()
    assert optimizer.state[p]["grad_sum"].dtype == torch.float32
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, -320.0))
    lossy = torch.zeros(1, dtype=torch.bfloat16)
    for value in [256.0] + [1.0] * 64:
        lossy += value
    assert lossy.item() == 256.0  # the control: the detector's inputs do tell the two apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_against_fp64(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    a, b = build(kind, ours, eps=1e-4) if "Adam" in kind else build(kind, ours), None
    b = build(kind, theirs, eps=1e-4) if "Adam" in kind else build(kind, theirs)
    micro = [gradients(j, dtype) for j in range(3)]
    for grads in micro:
        put(ours, grads)
        a.accumulate(2.0)
    a.step()
    mean = [sum(g.double() for g in gs) / 3 for gs in zip(*micro, strict=True)]
    for p, m in zip(theirs, mean, strict=True):
        wide = m.to(torch.float64 if dtype == torch.float64 else torch.float32)
        if wide.dtype != dtype:
            p.grad_dtype = wide.dtype
        p.grad = wide
    b.step()
    for x, y in zip(ours, theirs, strict=True):
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(x, y, rtol=2 * ulp, atol=2 * ulp)


def test_layouts_accumulate_by_logical_index() -> None:
    p = Parameter(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    g = torch.arange(120.0).reshape(2, 3, 4, 5)
    optimizer = braze.optim.SGD([p], lr=1.0, accumulation="sum")
    for grad in (g, g.contiguous(memory_format=torch.channels_last), g[:1].expand(2, 3, 4, 5)):
        p.grad = grad
        optimizer.accumulate()
    optimizer.step()
    assert torch.equal(p, -(2 * g + g[:1]))


# ------------------------------------------------------------------ windows


def test_no_trace_outside_a_window() -> None:
    params = parameters()
    optimizer = build("AdamW", params, l1=0.0, accumulation_steps=2)
    plain = torch.optim.AdamW(parameters())
    for _ in range(2):
        put(params, gradients(0))
        optimizer.step()
    put(plain.param_groups[0]["params"], gradients(0))
    plain.step()
    ours, theirs = optimizer.state_dict(), plain.state_dict()
    assert set(ours["param_groups"][0]) == set(theirs["param_groups"][0])
    assert all(set(ours["state"][k]) == set(theirs["state"][k]) for k in theirs["state"])
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("through", ["pickle", "deepcopy", "state_dict", "torch.save"])
@pytest.mark.parametrize("kind", [*KINDS, "CAG", "CAG+momentum"])
def test_killed_within_a_window_resumes_bit_for_bit(kind: str, through: str) -> None:
    options = {"CAG": {"lr": 0.1}, "CAG+momentum": {"lr": 0.1, "momentum": 0.9}}
    extra: dict[str, Any] = {"accumulation_steps": 4, **options.get(kind, KINDS.get(kind, {}))}
    cls = getattr(braze.optim, kind.split("+")[0])
    for dtype, stop in itertools.product((torch.float32, torch.bfloat16), (1, 2, 3, 5, 6)):
        straight = parameters(dtype)
        a = cls(straight, **extra)
        resumed: list[Parameter] = parameters(dtype)
        b = cls(resumed, **extra)
        for i in range(12):
            put(straight, gradients(i, dtype))
            a.step()
            if i == stop:
                resumed, b = hand_over(b, resumed, cls, extra, through)
            put(resumed, gradients(i, dtype))
            b.step()
        assert_same(straight, resumed)
        for p, q in zip(straight, resumed, strict=True):
            for key, value in a.state[p].items():
                assert torch.equal(value, b.state[q][key]), key


def hand_over(
    optimizer: Any, params: list[Parameter], cls: Any, extra: dict[str, Any], through: str
) -> tuple[list[Parameter], Any]:
    if through == "pickle":
        return pickle.loads(pickle.dumps((params, optimizer)))  # type: ignore[no-any-return]
    if through == "deepcopy":
        return copy.deepcopy((params, optimizer))
    fresh = [Parameter(p.detach().clone()) for p in params]
    other = cls(fresh, **extra)
    state = optimizer.state_dict()
    if through == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    for p in params:
        p.data.fill_(float("nan"))  # what was handed over must not alias the old tensors
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, Tensor):
                value.fill_(float("nan"))
    return fresh, other


def test_checkpoint_within_a_window_loads_into_torch() -> None:
    params = parameters()
    optimizer = build("Adam", params, accumulation_steps=2)
    put(params, gradients(0))
    optimizer.step()
    other = parameters()
    plain = torch.optim.Adam(other, **KINDS["Adam"])
    plain.load_state_dict(optimizer.state_dict())
    put(other, gradients(1))
    plain.step()
    assert all(torch.isfinite(p).all() for p in other)


def test_zero_grad_between_micro_steps_loses_nothing() -> None:
    def train(zero: bool) -> list[Parameter]:
        params = parameters()
        optimizer = build("AdamW", params, accumulation_steps=3)
        for i in range(9):
            if zero or optimizer.updated:
                optimizer.zero_grad()
            put(params, gradients(i))
            optimizer.step()
        return params

    assert_same(train(True), train(False))


@pytest.mark.parametrize("flags", TORCH_FLAGS, ids=["native", "torch"])
@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_without_gradients_is_one_with_zeros(
    kind: str, mode: str, flags: dict[str, Any]
) -> None:
    """So that the ranks of a distributed run, one of which has nothing to do, stay in step."""
    for pattern in itertools.product((True, False), repeat=3):
        empty, zero = parameters(), parameters()
        a, b = (
            build(kind, params, accumulation_steps=3, accumulation=mode, **flags)
            for params in (empty, zero)
        )
        for window in range(2):
            for j, present in enumerate(pattern):
                grads = gradients(3 * window + j)
                put(zero, [g if present else torch.zeros_like(g) for g in grads])
                put(empty, grads if present else [])
                a.step()
                b.step()
                assert a.updated is (j == 2 and any(pattern))
                assert b.updated is (j == 2)
            if any(pattern):
                assert_close(empty, zero)
            else:
                assert_same(empty, parameters())
                assert not a.state


@pytest.mark.parametrize("flags", TORCH_FLAGS, ids=["native", "torch"])
def test_the_weight_of_an_empty_accumulate_counts(flags: dict[str, Any]) -> None:
    p = Parameter(torch.zeros(1))
    optimizer = braze.optim.SGD([p], lr=1.0, **flags)
    optimizer.accumulate(3.0)
    p.grad = torch.full((1,), 8.0)
    optimizer.accumulate(1.0)
    optimizer.step()
    assert p.item() == -2.0
    optimizer.accumulate(3.0)
    optimizer.step()
    assert not optimizer.updated and p.item() == -2.0
    p.grad = torch.full((1,), 1.0)
    optimizer.step()
    assert p.item() == -3.0


def test_accumulate_then_step_counts_the_step() -> None:
    p = Parameter(torch.zeros(1))
    optimizer = braze.optim.SGD([p], lr=1.0, accumulation_steps=2)
    for weight, updated in ((1.0, False), (3.0, True)):
        p.grad = torch.full((1,), weight)
        optimizer.accumulate(weight)
        optimizer.step()
        assert optimizer.updated is updated
    assert p.item() == -(1.0 * 1 + 3.0 * 3) / 4


def test_scheduler_rate_at_the_last_call_is_used() -> None:
    p = Parameter(torch.zeros(1))
    optimizer = braze.optim.SGD([p], lr=1.0, accumulation_steps=2)
    scheduler = braze.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        p.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert p.item() == -0.5


def test_gradients_are_released_and_reach_the_caller_untouched() -> None:
    params = parameters()
    optimizer = build("SGD", params, accumulation_steps=2)
    put(params, gradients(0))
    held = [p.grad for p in params]
    versions = [g._version for g in held if g is not None]
    optimizer.step()
    assert all(p.grad is None for p in params)
    put(params, gradients(1))
    optimizer.step()
    assert [g._version for g in held if g is not None] == versions
    assert all(torch.equal(g, h) for g, h in zip(held, gradients(0), strict=True) if g is not None)


def test_steady_windows_reuse_their_buffers() -> None:
    params = parameters()
    optimizer = build("SGD", params, accumulation_steps=2)
    pointers = set()
    for i in range(8):
        put(params, gradients(i))
        optimizer.step()
        if not optimizer.updated:
            pointers.add(optimizer.state[params[0]]["grad_sum"].data_ptr())
    assert len(pointers) == 1
    assert optimizer._plan.rebuilds == 1
