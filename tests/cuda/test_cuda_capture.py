"""Steps captured into a CUDA graph: replays equal eager steps, and what cannot be captured says why."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from braze import optim
from braze.nn import BatchNormAct2d
from devices import Device, assert_same, everything, values
from torch import Tensor
from torch.nn import Parameter

REPLAYS = 20
SHAPES = ((5,), (3, 4), (), (300,), (0,), (2, 3, 4))


def number(value: float, device: Device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu").to(device.place)


Options = Callable[[Device], dict[str, Any]]
KINDS: dict[str, tuple[str, Options]] = {
    "SGD": ("SGD", lambda d: {"lr": number(0.1, d), "weight_decay": number(0.01, d)}),
    "SGD, momentum": (
        "SGD",
        lambda d: {"lr": number(0.1, d, torch.float64), "momentum": 0.9, "nesterov": True},
    ),
    "Adam": (
        "Adam",
        lambda d: {"lr": number(0.1, d), "betas": (number(0.9, d), number(0.999, d))},
    ),
    "AdamW": ("AdamW", lambda d: {"lr": number(0.01, d), "weight_decay": 0.1, "amsgrad": True}),
}
EACH = pytest.mark.parametrize("kind", KINDS)
Trained = tuple[list[Parameter], Any]


def make(device: Device, kind: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Trained:
    name, options = KINDS[kind]
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float64)
    params = [
        Parameter(values(shape, i, dtypes[i % 4]).to(device.place))
        for i, shape in enumerate(shapes)
    ]
    optimizer = getattr(optim, name)(params, capturable=True, **options(device))
    for p in params:
        p.grad = torch.zeros_like(p)
    return params, optimizer


def fill_gradients(params: list[Parameter], seed: int) -> None:
    """Into the same memory: a graph reads what stands there when it runs."""
    with torch.no_grad():
        for i, p in enumerate(params):
            assert p.grad is not None
            p.grad.copy_(values(p.shape, 100 * seed + i, p.dtype))


def schedule(optimizer: Any, turn: int) -> None:
    """What stands in device memory is changed in place."""
    group = optimizer.param_groups[0]
    if isinstance(group["weight_decay"], Tensor):
        group["weight_decay"].fill_(0.01 * (turn % 4))
    for i, beta in enumerate(group.get("betas", ())):
        if isinstance(beta, Tensor):
            beta.fill_((0.9, 0.999)[i] - 0.01 * (turn % 5))


def warm_up(device: Device, pair: Trained) -> None:
    params, optimizer = pair
    fill_gradients(params, 1)
    with device.stream():
        optimizer.step()


@EACH
def test_replays_equal_eager_steps(device: Device, kind: str) -> None:
    results = []
    with device.on():
        for captured in (True, False):
            pair = make(device, kind)
            params, optimizer = pair
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, REPLAYS, 0.001)
            warm_up(device, pair)
            graph = device.capture(optimizer.step) if captured else None
            for turn in range(REPLAYS):
                fill_gradients(params, 2 + turn)
                schedule(optimizer, turn)
                optimizer.step() if graph is None else graph.replay()
                scheduler.step()
            device.synchronize()
            assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
            results.append(everything(optimizer))
    assert_same(*results)


@EACH
def test_the_capture_itself_changes_nothing(device: Device, kind: str) -> None:
    with device.on():
        params, optimizer = pair = make(device, kind)
        warm_up(device, pair)
        fill_gradients(params, 2)
        before = everything(optimizer)
        graph = device.capture(optimizer.step)
        assert_same(everything(optimizer), before)
        graph.replay()
        device.synchronize()
        assert not torch.equal(everything(optimizer)[0], before[0])


def test_step_counts_advance_in_replays(device: Device) -> None:
    with device.on():
        params, optimizer = pair = make(device, "Adam")
        warm_up(device, pair)
        graph = device.capture(optimizer.step)
        for _ in range(7):
            graph.replay()
        device.synchronize()
        assert {float(optimizer.state[p]["step"]) for p in params} == {8.0}
        optimizer.step()  # eager steps go on from there
        device.synchronize()
        assert {float(optimizer.state[p]["step"]) for p in params} == {9.0}


@pytest.mark.parametrize("found", [0.0, 1.0])
@EACH
def test_a_captured_overflow_flag_is_read_at_the_replay(
    device: Device, kind: str, found: float
) -> None:
    results = []
    with device.on():
        for captured in (True, False):
            params, optimizer = pair = make(device, kind)
            warm_up(device, pair)
            optimizer.grad_scale = number(8.0, device)
            optimizer.found_inf = number(0.0, device)
            graph = device.capture(optimizer.step) if captured else None
            for turn in range(4):
                fill_gradients(params, 2 + turn)
                optimizer.grad_scale.fill_(2.0**turn)
                optimizer.found_inf.fill_(found if turn == 2 else 0.0)
                optimizer.step() if graph is None else graph.replay()
            device.synchronize()
            assert optimizer.updated
            results.append(everything(optimizer))
            if "Adam" in kind:
                steps = {float(optimizer.state[p]["step"]) for p in params}
                assert steps == {5.0 - found}
    assert_same(*results)


@pytest.mark.parametrize("kind", ["SGD, momentum", "AdamW"])
def test_five_thousand_tensors(device: Device, kind: str) -> None:
    """More than one launch's argument holds: a graph must not read a table that changes later."""
    shapes = tuple((1 + i % 3,) for i in range(5000))
    results = []
    with device.on():
        for captured in (True, False):
            params, optimizer = pair = make(device, kind, shapes)
            warm_up(device, pair)
            graph = device.capture(optimizer.step) if captured else None
            # An eager step of the same optimizer in between changes its table.
            fill_gradients(params, 2)
            kept, params[17].grad = params[17].grad, None
            optimizer.step()
            params[17].grad = kept
            for turn in range(3):
                fill_gradients(params, 3 + turn)
                optimizer.step() if graph is None else graph.replay()
            device.synchronize()
            results.append(everything(optimizer))
    assert_same(*results)


def test_launches_of_a_large_graph(device: Device) -> None:
    with device.on():
        pair = make(device, "SGD", tuple((2,) for _ in range(5000)))
        warm_up(device, pair)
        graph = device.capture(pair[1].step)
        launches = device.launches(graph.replay)
        assert launches is None or 2 <= launches <= 32
        pair = make(device, "SGD", tuple((2,) for _ in range(50)))
        warm_up(device, pair)
        assert device.launches(device.capture(pair[1].step).replay) in (1, None)


@pytest.mark.parametrize("kind", ["SGD, momentum", "AdamW"])
def test_a_graph_outlives_its_optimizer(device: Device, kind: str) -> None:
    """Its counter too: freed with the optimizer, every replay would count in memory of others."""
    results = []
    with device.on():
        for outlives in (True, False):
            params, optimizer = pair = make(device, kind)
            warm_up(device, pair)
            fill_gradients(params, 3)
            graph = device.capture(optimizer.step)
            state = [t for p in params for t in optimizer.state[p].values()]
            groups = optimizer.param_groups  # lr and the like are the user's to keep
            if outlives:
                del optimizer, pair
                gc.collect()
            for _ in range(3):
                graph.replay()
            device.synchronize()
            results.append([t.detach().to("cpu", copy=True) for t in (*params, *state)])
            assert groups
    assert_same(*results)


def test_captured_batch_norms_fill_nothing(device: Device) -> None:
    """What a reduction needs to be zero is zero before: no fill in the graph at every replay."""
    with device.on():
        norm = BatchNormAct2d(5).to(device.place)
        x = values((3, 5, 6, 6), 1).to(device.place)
        norm(x)
        before = norm.running_mean.clone()
        with torch.autograd.profiler.profile() as profile:
            graph = device.capture(lambda: norm(x))
        assert any("batch_norm" in event.name for event in profile.function_events)
        assert not any("zero" in event.name for event in profile.function_events)
        graph.replay()
        device.synchronize()
        assert not torch.equal(norm.running_mean, before)


# ------------------------------------------------------------------ what cannot be captured


def refused(device: Device, optimizer: Any, match: str) -> None:
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=match):
        device.capture(optimizer.step)
    assert_same(everything(optimizer), before)
    assert not optimizer.updated
    optimizer.step()
    device.synchronize()
    assert not torch.equal(everything(optimizer)[0], before[0])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("warm", [True, False])
def test_counts_on_the_cpu(device: Device, name: str, warm: bool) -> None:
    with device.on():
        p = Parameter(values((5,), 0).to(device.place))
        p.grad = torch.ones_like(p)
        optimizer = getattr(optim, name)([p], lr=0.1)
        if warm:
            optimizer.step()
        refused(device, optimizer, "capturable=True" if warm else "warm-up|capturable=True")


@pytest.mark.parametrize("kind", ["SGD, momentum", "Adam", "AdamW"])
def test_without_a_warm_up(device: Device, kind: str) -> None:
    """State made in a graph would be made anew at every replay."""
    with device.on():
        params, optimizer = make(device, kind)
        fill_gradients(params, 1)
        refused(device, optimizer, "run one step on a side stream before the capture .warm-up.")


def test_plain_sgd_needs_no_warm_up(device: Device) -> None:
    with device.on():
        p = Parameter(values((5,), 0).to(device.place))
        p.grad = torch.ones_like(p)
        optimizer = optim.SGD([p], lr=0.5)
        want = p.detach() - 0.5 - 0.5
        graph = device.capture(optimizer.step)
        graph.replay()
        graph.replay()
        device.synchronize()
        assert torch.equal(p.detach(), want)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "CAG"])
def test_accumulation(device: Device, name: str) -> None:
    with device.on():
        p = Parameter(values((5,), 0).to(device.place))
        p.grad = torch.ones_like(p)
        options = {} if name == "SGD" else {"capturable": True}
        if name == "CAG":
            options = {"momentum": 0.9}
        optimizer = getattr(optim, name)([p], lr=0.1, accumulation_steps=2, **options)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
        p.grad = torch.ones_like(p)
        before = everything(optimizer)
        with pytest.raises(RuntimeError, match="cannot be captured"):
            device.capture(optimizer.step)
        assert_same(everything(optimizer), before)
        assert p.grad is not None
        assert "accumulated_steps" not in optimizer.state_dict()["param_groups"][0]
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert optimizer.updated


def test_a_capture_without_any_gradient_is_empty(device: Device) -> None:
    with device.on():
        params, optimizer = pair = make(device, "AdamW")
        warm_up(device, pair)
        before = everything(optimizer)
        optimizer.zero_grad(set_to_none=True)
        graph = device.capture(optimizer.step)
        graph.replay()
        device.synchronize()
        assert_same(everything(optimizer), before)
        assert params
