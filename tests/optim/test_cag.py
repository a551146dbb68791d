"""CAG, accumulation under a GradScaler, and the errors of accumulation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import braze.optim
import pytest
import torch
from micro_batches import (
    KINDS,
    assert_close,
    build,
    gradients,
    parameters,
    put,
)
from torch.nn import Parameter

# ----------------------------------------------------------------- overflow


def overflow_batches() -> Iterator[tuple[int, bool]]:
    for i in range(12):
        yield i, i in (0, 3, 4, 9)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [*((kind, flags) for kind in KINDS for flags in ({}, {"fused": True})), ("CAG", {})],
    ids=str,
)
def test_overflowing_micro_batch_is_left_out(kind: str, flags: dict[str, Any]) -> None:
    cls = getattr(braze.optim, kind.split("+")[0])
    extra = {"accumulation_steps": 2, **KINDS.get(kind, {"lr": 0.1, "momentum": 0.9}), **flags}
    scaled, plain = parameters(), parameters()
    a, b = cls(scaled, **extra), cls(plain, **extra)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i, overflow in overflow_batches():
        grads = gradients(i)
        a.zero_grad()
        scale = scaler.scale(torch.ones(())).item()
        put(scaled, [g * scale * (float("inf") if overflow else 1.0) for g in grads])
        before, updated = copy.deepcopy(a.state_dict()), a.updated
        scaler.step(a)
        scaler.update()
        if overflow:
            # With fused=True step() sees the overflow; else the scaler does not call it, and touches nothing.
            assert a.updated is (False if flags else updated)
            assert all((p.grad is None) is bool(flags) for p in scaled)
            after = a.state_dict()
            assert after["param_groups"] == before["param_groups"]
            assert str(after["state"]) == str(before["state"])
            continue
        put(plain, grads)
        b.step()
        assert a.updated == b.updated
    assert_close(scaled, plain)


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_scaler_refuses_gradients_accumulated_with_their_scale(flags: dict[str, Any]) -> None:
    params = parameters()
    optimizer = build("SGD", params, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    put(params, gradients(0))
    optimizer.accumulate()
    put(params, gradients(1))
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="accumulation_steps=J"):
        scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
def test_gradients_unscaled_before_they_accumulate(flags: dict[str, Any]) -> None:
    scaled, plain = parameters(), parameters()
    a, b = build("SGD", scaled, **flags), build("SGD", plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in range(3):
        scale = scaler.scale(torch.ones(())).item()
        put(scaled, [g * scale for g in gradients(seed)])
        scaler.unscale_(a)
        a.accumulate(seed + 1.0)
        scaler.update()
        put(plain, gradients(seed))
        b.accumulate(seed + 1.0)
    put(scaled, [g * scaler.get_scale() for g in gradients(9)])
    scaler.unscale_(a)
    scaler.step(a)
    put(plain, gradients(9))
    b.step()
    assert a.updated
    assert_close(scaled, plain)


# ---------------------------------------------------------------------- CAG


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("maximize", [False, True])
def test_cag_is_sgd_on_the_summed_gradient(momentum: float, maximize: bool) -> None:
    options: dict[str, Any] = {"lr": 0.05, "momentum": momentum, "weight_decay": 0.01}
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    a = braze.optim.CAG(ours, accumulation_steps=3, maximize=maximize, **options)
    b = torch.optim.SGD(theirs, maximize=maximize, **options)
    for window in range(4):
        micro = [gradients(7 * window + j, torch.float64) for j in range(3)]
        micro[0][0] *= 0.0
        for grads in micro:
            put(ours, grads)
            if window == 1:
                ours[1].grad = None
            a.step()
        put(theirs, [sum(g) for g in zip(*micro, strict=True)])
        if window == 1:
            theirs[1].grad = None
        b.step()
        assert_close(ours, theirs, 1e-14)
    if momentum:
        assert set(a.state[ours[0]]) == {"momentum_buffer"}
        put(ours, gradients(0, torch.float64))
        a.step()
        assert "grad_sum" not in a.state[ours[0]]  # the buffer itself takes the sum


def test_cag_gradient_missing_in_some_micro_batches() -> None:
    for pattern in itertools.product((True, False), repeat=3):
        p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
        a = braze.optim.CAG([p], lr=0.1, momentum=0.5, accumulation_steps=3)
        b = torch.optim.SGD([q], lr=0.1, momentum=0.5)
        for _ in range(3):
            for present in pattern:
                p.grad = torch.ones(3) if present else None
                a.step()
            q.grad = torch.full((3,), float(sum(pattern))) if any(pattern) else None
            b.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_cag_mean_and_l1() -> None:
    p = Parameter(torch.tensor([2.0, -2.0, 0.0]))
    optimizer = braze.optim.CAG([p], 0.5, accumulation_steps=2, accumulation="mean", l1=0.25)
    for value in (1.0, 3.0):
        p.grad = torch.full((3,), value)
        optimizer.step()
    assert p.tolist() == [2 - 0.5 * 2.25, -2 - 0.5 * 1.75, -1.0]


# ------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps"),
        ({"accumulation_steps": 2.0}, TypeError, "accumulation_steps"),
        ({"accumulation_steps": True}, TypeError, "accumulation_steps"),
        ({"accumulation": "average"}, ValueError, "'mean' or 'sum'"),
        ({"l1": -1.0}, ValueError, "l1"),
        ({"l1": float("nan")}, ValueError, "l1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    for cls in (braze.optim.SGD, braze.optim.Adam, braze.optim.AdamW, braze.optim.CAG):
        with pytest.raises(error, match=text):
            cls(parameters(), 0.1, **arguments)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weight(weight: float) -> None:
    params = parameters()
    optimizer = build("SGD", params)
    put(params, gradients(0))
    with pytest.raises(ValueError, match="weight must be finite"):
        optimizer.accumulate(weight)
    assert all(p.grad is not None for p in params) and not optimizer.state


def test_weights_that_sum_to_zero() -> None:
    params = parameters()
    optimizer = build("SGD", params)
    put(params, gradients(0))
    optimizer.accumulate(0.0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="sum to 0"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_sparse_gradients_cannot_accumulate() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = braze.optim.SGD(embedding.parameters(), lr=1.0, accumulation_steps=2)
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert (
        embedding.weight.grad is not None
        and "accumulated_weight" not in (optimizer.param_groups[0])
    )
