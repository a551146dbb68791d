"""braze.amp.GradScaler beyond torch's contract: what its steps leave, tell, and do not wait for."""

from __future__ import annotations

import importlib
import math
import pickle
import random
from typing import Any

import braze.amp
import pytest
import torch
from braze import optim
from braze.amp import GradScaler
from devices import Device, assert_same, everything, values
from test_contract_amp import assert_close, backward, make, poison
from torch import Tensor
from torch.nn import Parameter

SCALE = 1024.0
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "Adam": ("Adam", {"lr": 0.1}),
    "AdamW, fused": ("AdamW", {"lr": 0.1, "fused": True}),
}
EACH = pytest.mark.parametrize("kind", KINDS)
SHAPES = ((5,), (3, 4), (), (300,))


def optimizer_of(
    kind: str, where: Any = None, dtype: torch.dtype = torch.float32, **more: Any
) -> Any:
    name, options = KINDS[kind]
    where = torch.empty(0).device if where is None else where
    params = [Parameter(values(s, i, dtype).to(where)) for i, s in enumerate(SHAPES)]
    return getattr(optim, name)(params, **{**options, **more})


def params_of(optimizer: Any) -> list[Parameter]:
    return list(optimizer.param_groups[0]["params"])


def give(optimizer: Any, seed: int, factor: float | Tensor = 1.0, overflow: bool = False) -> None:
    for i, p in enumerate(params_of(optimizer)):
        p.grad = (values(p.shape, 100 * seed + i).to(p) * factor).to(p)
    if overflow:
        p.grad[-1] = (math.inf, -math.inf, math.nan)[seed % 3]


def started() -> GradScaler:
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(1))
    return scaler


def scaled_step(scaler: GradScaler, optimizer: Any, seed: int, overflow: bool = False) -> None:
    assert scaler._scale is not None
    give(optimizer, seed, scaler._scale, overflow)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("extras", [{}, {"ema_decay": 0.9}, {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("at", [0, 2])
@EACH
def test_a_step_that_overflows_leaves_no_trace(kind: str, at: int, extras: dict[str, Any]) -> None:
    ours, plain = optimizer_of(kind, **extras), optimizer_of(kind, **extras)
    scaler = started()
    for seed in range(4):
        if seed == at:
            before = everything(ours)
            scaled_step(scaler, ours, seed, overflow=True)
            assert ours.skipped and ours.updated is False and not ours.grad_norm.isfinite()
            if at:
                assert_same(everything(ours), before)
        scaled_step(scaler, ours, seed)
        assert not ours.skipped and ours.updated is True
        give(plain, seed)
        plain.step()
        assert_same(everything(ours), everything(plain))
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.cpu_only("a device makes the state before it knows")
@EACH
def test_an_overflow_in_the_first_step_makes_no_state(kind: str) -> None:
    ours = optimizer_of(kind, ema_decay=0.9)
    scaled_step(started(), ours, 0, overflow=True)
    assert not ours.state


@EACH
def test_the_norm_is_of_unscaled_gradients_and_they_stay_scaled(kind: str) -> None:
    ours, scaler = optimizer_of(kind), started()
    for seed in range(3):
        scaled_step(scaler, ours, seed)
        scaled = [p.grad for p in params_of(ours)]
        give(ours, seed)
        grads = [p.grad for p in params_of(ours)]
        torch.testing.assert_close(ours.grad_norm, torch.nn.utils.get_total_norm(grads))
        assert_same(scaled, [g * SCALE for g in grads])


@EACH
def test_the_scale_moves_as_torchs_does(kind: str) -> None:
    name, options = KINDS[kind]
    pairs = [make(module, name, **options) for module in (optim, torch.optim)]
    scalers: list[Any] = [
        cls("cpu", init_scale=SCALE, growth_interval=3)
        for cls in (GradScaler, torch.amp.GradScaler)
    ]
    overflows = random.Random(0).choices([True, False], [1, 4], k=30)
    scales = set()
    for seed, overflow in enumerate(overflows):
        for pair, scaler in zip(pairs, scalers, strict=True):
            backward(pair, seed, scaler)
            if overflow:
                poison(pair[0])
            scaler.step(pair[1])
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        scales.add(scalers[0].get_scale())
    assert len(scales) > 3
    torch.testing.assert_close(pairs[0][0].state_dict(), pairs[1][0].state_dict())


@pytest.mark.parametrize("overflow", [False, True])
@EACH
def test_after_unscale_the_step_takes_gradients_as_they_are(kind: str, overflow: bool) -> None:
    ours, plain, scaler = optimizer_of(kind), optimizer_of(kind), started()
    give(ours, 0, SCALE, overflow)
    scaler.unscale_(ours)
    scaler.step(ours)
    assert bool(ours.skipped) is overflow and ours.updated is not overflow
    scaler.update()
    assert scaler.get_scale() == (SCALE / 2 if overflow else SCALE)
    if not overflow:
        give(plain, 0)
        plain.step()
        assert_same(everything(ours), everything(plain))
        assert_same([p.grad for p in params_of(ours)], [p.grad for p in params_of(plain)])


@pytest.mark.parametrize("overflowing", [0, 1])
@EACH
def test_an_overflow_is_of_one_optimizer_alone(kind: str, overflowing: int) -> None:
    """update() adds what all optimizers found into what the first one did."""
    both, scaler = [optimizer_of(kind), optimizer_of("Adam")], started()
    for i, optimizer in enumerate(both):
        give(optimizer, i, SCALE, overflow=i == overflowing)
        scaler.step(optimizer)
    scaler.update()
    assert [bool(optimizer.skipped) for optimizer in both] == [i == overflowing for i in range(2)]
    assert [optimizer.updated for optimizer in both] == [i != overflowing for i in range(2)]
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("max_norm", [0.25, 1e6])
@EACH
def test_clipping_equals_torchs_unscale_and_clip(kind: str, max_norm: float) -> None:
    name, options = KINDS[kind]
    ours = make(optim, name, max_grad_norm=max_norm, **options)
    theirs = make(torch.optim, name, **options)
    scalers: list[Any] = [
        cls("cpu", init_scale=SCALE) for cls in (GradScaler, torch.amp.GradScaler)
    ]
    for seed in range(4):
        for pair, scaler in zip((ours, theirs), scalers, strict=True):
            backward(pair, seed, scaler)
            if pair is theirs:
                scaler.unscale_(theirs[1])
                norm = torch.nn.utils.clip_grad_norm_(theirs[0].parameters(), max_norm)
            scaler.step(pair[1])
            scaler.update()
        torch.testing.assert_close(ours[1].grad_norm.double(), norm, rtol=1e-6, atol=0)  # type: ignore[attr-defined]
    torch.testing.assert_close(ours[0].state_dict(), theirs[0].state_dict(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_torchs_optimizers_step_as_under_torchs_scaler(name: str) -> None:
    pairs = [make(torch.optim, name, lr=0.1) for _ in range(2)]
    scalers: list[Any] = [
        cls("cpu", init_scale=SCALE) for cls in (GradScaler, torch.amp.GradScaler)
    ]
    for seed in range(3):
        for pair, scaler in zip(pairs, scalers, strict=True):
            backward(pair, seed, scaler)
            if seed == 1:
                poison(pair[0])
            scaler.step(pair[1])
            scaler.update()
    assert_close(pairs[0][0], pairs[1][0])
    assert scalers[0].state_dict() == scalers[1].state_dict()


@pytest.mark.parametrize("pickled", [False, True])
def test_checkpoints_go_both_ways(pickled: bool) -> None:
    kinds: list[Any] = [GradScaler, torch.amp.GradScaler]
    for first, second in (kinds, reversed(kinds)):
        old, optimizer = first("cpu", init_scale=SCALE, growth_interval=5), optimizer_of("Adam")
        old.scale(torch.ones(1))
        for seed in range(3):
            scaled_step(old, optimizer, seed, overflow=seed == 0)
        new = second("cpu")
        if pickled:
            new = pickle.loads(pickle.dumps(old))
            assert type(new) is first
        else:
            new.load_state_dict(old.state_dict())
        assert new.state_dict() == old.state_dict()
        assert new.state_dict()["_growth_tracker"] == 2
        new.scale(torch.ones(1))
        for seed in range(3):
            scaled_step(new, optimizer, seed)
        assert new.get_scale() == SCALE


@EACH
def test_a_micro_batch_that_overflows_is_left_out_of_its_window(kind: str) -> None:
    ours, plain = (optimizer_of(kind, accumulation_steps=2) for _ in range(2))
    scaler = started()
    updates = []
    for seed, overflow in enumerate((False, True, False, True, False, False)):
        scaled_step(scaler, ours, seed, overflow)
        if not overflow:
            updates.append(ours.updated)
            give(plain, seed)
            plain.step()
    assert_same(everything(ours), everything(plain))
    assert updates == [False, True, False, True]
    assert scaler.get_scale() == SCALE / 4


@EACH
def test_an_overflow_leaves_a_window_open_that_accumulate_opened(kind: str) -> None:
    ours, plain, scaler = optimizer_of(kind), optimizer_of(kind), started()
    ours.accumulate()
    plain.accumulate()
    scaled_step(scaler, ours, 0, overflow=True)
    scaled_step(scaler, ours, 1)
    give(plain, 1)
    plain.step()
    assert_same(everything(ours), everything(plain))
    assert scaler.get_scale() == SCALE / 2


def test_what_is_given_to_torchs_code_is_unscaled_in_place() -> None:
    ours = optimizer_of("Adam", foreach=True)
    scaled_step(started(), ours, 0)
    got = [p.grad for p in params_of(ours)]
    give(ours, 0)
    assert_same(got, [p.grad for p in params_of(ours)])


@EACH
def test_an_overflow_in_one_of_several_backwards_skips_their_step(kind: str) -> None:
    ours, scaler = optimizer_of(kind), started()
    scaled_step(scaler, ours, 0)
    before = everything(ours)
    give(ours, 1, SCALE, overflow=True)
    for p in params_of(ours):
        assert p.grad is not None
        p.grad += p.detach()
    scaler.step(ours)
    assert ours.skipped
    assert_same(everything(ours), before)


@EACH
def test_fp16_gradients_need_no_fused_flag(kind: str) -> None:
    """The sum of their squares is beyond fp16, and they are no overflow."""
    ours, plain = (optimizer_of(kind, dtype=torch.float16) for _ in range(2))
    scaler = GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(torch.ones(1))
    for seed in range(3):
        scaled_step(scaler, ours, seed)
        assert ours.updated is True
        give(plain, seed)
        plain.step()
    assert_same(everything(ours), everything(plain))


@pytest.mark.parametrize("sparse", [False, True])
def test_squares_beyond_fp32_are_no_overflow(sparse: bool) -> None:
    """Sparse gradients are torch's code."""
    embedding = torch.nn.Embedding(6, 3, sparse=sparse)
    optimizer, scaler = optim.SGD(embedding.parameters(), lr=1e-20), started()
    before = embedding.weight.detach().clone()
    scaler.scale(embedding(torch.tensor([1, 4])).sum() * 1e20).backward()
    scaler.step(optimizer)
    assert optimizer.updated is True and not optimizer.skipped
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(6.0**0.5 * 1e20))
    expected = before - torch.tensor([[0.0], [1], [0], [0], [1], [0]])
    torch.testing.assert_close(embedding.weight.detach(), expected)


def test_misuse_is_refused_as_torch_refuses_it() -> None:
    ours, scaler = optimizer_of("Adam"), GradScaler("cpu", init_scale=SCALE)
    give(ours, 0, SCALE)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(ours)
    scaler.scale(torch.ones(1))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(ours, closure=lambda: None)
    assert not ours.state
    scaler.step(ours)
    before = everything(ours)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(ours)
    with pytest.raises(RuntimeError, match="being called after step"):
        scaler.unscale_(ours)
    assert_same(everything(ours), before)


def test_a_failing_step_leaves_the_optimizer_without_a_scale() -> None:
    ours, scaler = optimizer_of("Adam"), started()
    give(ours, 0, SCALE)
    ours.param_groups[0]["lr"] = "0.1"
    with pytest.raises(TypeError):
        scaler.step(ours)
    ours.param_groups[0]["lr"] = 0.1
    scaler.step(ours)
    plain = optimizer_of("Adam")
    give(plain, 0)
    plain.step()
    assert_same(everything(ours), everything(plain))


def test_everything_else_is_torchs() -> None:
    assert set(braze.amp.__all__) == set(torch.amp.__all__)
    for name in torch.amp.__all__:
        assert (getattr(braze.amp, name) is getattr(torch.amp, name)) is (name != "GradScaler")
    for name in ("grad_scaler", "autocast_mode"):
        module = importlib.import_module(f"braze.amp.{name}")
        assert module is getattr(torch.amp, name) is getattr(braze.amp, name)


# ------------------------------------------------------------------ waiting


def waits(scaler: Any, optimizer: Any, place: torch.device, steps: int) -> int:
    """How often the host asks for a number from a tensor, which on a device is a wait."""
    ones = torch.ones(1, device=place)
    give(optimizer, 0, SCALE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            scaler.scale(ones)
            scaler.step(optimizer)
            scaler.update()
    return sum(
        event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense"
    )


@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 0.5}], ids=str)
@EACH
def test_a_device_is_never_waited_for(device: Device, kind: str, extras: dict[str, Any]) -> None:
    with device.on():
        scaler = GradScaler(device.place.type, init_scale=SCALE)
        optimizer = optimizer_of(kind, device.place, **extras)
        waits(scaler, optimizer, device.place, 1)
        assert waits(scaler, optimizer, device.place, 100) == 0
        assert optimizer.updated is True and scaler._get_growth_tracker() == 101
        theirs = torch.amp.GradScaler(device.place.type, init_scale=SCALE)
        unfused = optimizer_of("Adam", device.place)
        assert waits(theirs, unfused, device.place, 3) >= 3
