"""The drop-in contract with torch.amp.GradScaler, and of braze's with the optimizers."""

from __future__ import annotations

import math
from typing import Any

import braze.optim as optim
import pytest
import torch
from braze import amp
from devices import MODE
from torch import Tensor, nn
from torch.amp import GradScaler

SCALE = 1024.0
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    ("Adam", {"lr": 0.02, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 0.02}),
]
EACH = pytest.mark.parametrize(("name", "kwargs"), CONFIGS, ids=str)
FLAGS = pytest.mark.parametrize(
    "flags", [{}, {"fused": True}, {"foreach": True}, {"fused": False}], ids=str
)
Pair = tuple[nn.Module, torch.optim.Optimizer]


@pytest.fixture(params=[GradScaler, amp.GradScaler], ids=["torch", "braze"])
def scaler(request: pytest.FixtureRequest) -> GradScaler:
    made: GradScaler = request.param("cpu", init_scale=SCALE)
    return made


def asked(scaler: GradScaler, flags: dict[str, Any]) -> bool:
    """Whether the optimizer's step is called after an overflow too."""
    return bool(flags.get("fused") or (isinstance(scaler, amp.GradScaler) and not flags))


def make(module: Any, name: str, **kwargs: Any) -> Pair:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 17), nn.Tanh(), nn.Linear(17, 3)).double()
    return model, getattr(module, name)(model.parameters(), **kwargs)


def batch(seed: int) -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def backward(pair: Pair, seed: int, scaler: GradScaler | None = None) -> None:
    model, optimizer = pair
    optimizer.zero_grad()
    loss = model(batch(seed)).pow(2).sum()
    (loss if scaler is None else scaler.scale(loss)).backward()


def poison(model: nn.Module) -> None:
    last = list(model.parameters())[-1]
    assert last.grad is not None
    last.grad[-1] = math.inf


def train_plainly(pair: Pair, seeds: range) -> None:
    for seed in seeds:
        backward(pair, seed)
        pair[1].step()


def assert_close(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-12, atol=1e-13)


@EACH
@FLAGS
def test_scaled_training_equals_unscaled_training(
    scaler: GradScaler, name: str, kwargs: dict[str, Any], flags: dict[str, bool]
) -> None:
    pair, reference = make(optim, name, **kwargs, **flags), make(torch.optim, name, **kwargs)
    for seed in range(4):
        backward(pair, seed, scaler)
        scaler.step(pair[1])
        scaler.update()
        assert not hasattr(pair[1], "grad_scale")
        assert not hasattr(pair[1], "found_inf")
    train_plainly(reference, range(4))
    assert_close(pair[0], reference[0])


@EACH
@FLAGS
def test_overflow_on_the_very_first_step_changes_nothing(
    scaler: GradScaler, name: str, kwargs: dict[str, Any], flags: dict[str, bool]
) -> None:
    """torch's fused SGD leaves an uninitialized momentum buffer behind and uses it afterwards."""
    pair, reference = make(optim, name, **kwargs, **flags), make(torch.optim, name, **kwargs)
    model, optimizer = pair
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backward(pair, 99, scaler)
    poison(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    made = [value for entry in optimizer.state.values() for value in entry.values()]
    # On a device the state is made before anyone knows that this step will not happen.
    late = MODE != "cpu" and name != "SGD" and asked(scaler, flags)
    assert not any(value.any() for value in made) if late else not made
    for seed in range(3):
        backward(pair, seed, scaler)
        scaler.step(optimizer)
        scaler.update()
    train_plainly(reference, range(3))
    assert_close(model, reference[0])
    if name != "SGD":
        assert {float(entry["step"]) for entry in optimizer.state.values()} == {3.0}


@EACH
@pytest.mark.parametrize("flags", [{"fused": True}, {}], ids=str)
def test_overflow_later_changes_nothing(
    scaler: GradScaler, name: str, kwargs: dict[str, Any], flags: dict[str, bool]
) -> None:
    pair = make(optim, name, **flags, **kwargs)
    reference = make(torch.optim, name, **kwargs)
    for seed in (0, 1, 99, 2):
        backward(pair, seed, scaler)
        if seed == 99:
            poison(pair[0])
        scaler.step(pair[1])
        scaler.update()
        assert pair[1].updated is (seed != 99 or not asked(scaler, flags))  # type: ignore[attr-defined]
    train_plainly(reference, range(3))
    assert_close(pair[0], reference[0])


@EACH
@pytest.mark.parametrize("overflow", [False, True])
def test_unscale_then_clip_then_step(
    scaler: GradScaler, name: str, kwargs: dict[str, Any], overflow: bool
) -> None:
    pair, reference = make(optim, name, **kwargs), make(torch.optim, name, **kwargs)
    backward(pair, 0, scaler)
    if overflow:
        poison(pair[0])
    scaler.unscale_(pair[1])
    nn.utils.clip_grad_norm_(pair[0].parameters(), 0.25)
    scaler.step(pair[1])
    scaler.update()
    if not overflow:
        backward(reference, 0)
        nn.utils.clip_grad_norm_(reference[0].parameters(), 0.25)
        reference[1].step()
    assert_close(pair[0], reference[0])
    made = not overflow or (MODE != "cpu" and name != "SGD" and asked(scaler, {}))
    assert bool(pair[1].state) is (made and kwargs != {"lr": 0.05})


@EACH
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_and_grad_scale_of_either_shape(
    name: str, kwargs: dict[str, Any], shape: tuple[int, ...], found: float
) -> None:
    pair, reference = make(optim, name, **kwargs), make(torch.optim, name, **kwargs)
    backward(pair, 0)
    for p in pair[0].parameters():
        assert p.grad is not None
        p.grad.mul_(8.0)
    pair[1].grad_scale = torch.full(shape, 8.0)  # type: ignore[attr-defined]
    pair[1].found_inf = torch.full(shape, found)  # type: ignore[attr-defined]
    pair[1].step()
    if found == 0.0:
        train_plainly(reference, range(1))
    assert_close(pair[0], reference[0])


@EACH
def test_a_preset_grad_scale_multiplies(
    scaler: GradScaler, name: str, kwargs: dict[str, Any]
) -> None:
    pair = make(optim, name, fused=True, **kwargs)
    reference = make(torch.optim, name, **kwargs)
    pair[1].grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    backward(pair, 0, scaler)
    for p in pair[0].parameters():
        assert p.grad is not None
        p.grad.mul_(4.0)
    scaler.step(pair[1])
    train_plainly(reference, range(1))
    assert_close(pair[0], reference[0])


@EACH
def test_a_disabled_scaler_is_transparent(
    scaler: GradScaler, name: str, kwargs: dict[str, Any]
) -> None:
    pair, reference = make(optim, name, **kwargs), make(torch.optim, name, **kwargs)
    scaler = type(scaler)("cpu", init_scale=SCALE, enabled=False)
    for seed in range(2):
        backward(pair, seed, scaler)
        scaler.step(pair[1])
        scaler.update()
    train_plainly(reference, range(2))
    assert_close(pair[0], reference[0])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_step_offers_scaling_exactly_where_torchs_does(name: str) -> None:
    every: tuple[dict[str, bool], ...] = (
        {},
        {"fused": True},
        {"foreach": True},
        {"differentiable": True},
        {"fused": False},
    )
    for flags in every:
        ours, theirs = (
            getattr(module, name)([nn.Parameter(torch.ones(3))], **flags)
            for module in (optim, torch.optim)
        )
        offers = [getattr(o, "_step_supports_amp_scaling", False) for o in (ours, theirs)]
        assert offers[0] is offers[1] is flags.get("fused", False)


@pytest.mark.parametrize("flags", [{"fused": True}, {}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("unscaled", [False, True])
def test_no_gradients_at_all(
    scaler: GradScaler, name: str, flags: dict[str, bool], unscaled: bool
) -> None:
    """A scaler leaves the int 0 in found_inf then; without fused=True it asserts before the step."""
    p = nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([p], **flags)
    scaler.scale(torch.ones(1))
    if unscaled:
        scaler.unscale_(optimizer)
    if not flags.get("fused"):
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.step(optimizer)
    else:
        assert scaler.step(optimizer) is None
    assert torch.equal(p.detach(), torch.ones(3))


@pytest.mark.parametrize(
    "overflow",
    [False, True],
)
def test_scaler_with_sparse_gradients(scaler: GradScaler, overflow: bool) -> None:
    results = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 3, sparse=True).double()
        optimizer = module.SGD(embedding.parameters(), lr=0.1)
        scaler = type(scaler)("cpu", init_scale=SCALE)
        loss = embedding(torch.tensor([1, 4, 4])).pow(2).sum()
        scaler.scale(loss * (math.inf if overflow else 1.0)).backward()
        scaler.step(optimizer)
        results.append(embedding.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize(("name", "kwargs"), [("SGD", {"lr": 0.05}), ("AdamW", {"eps": 0.1})])
def test_scaler_when_the_step_is_compiled(
    name: str, kwargs: dict[str, Any], flags: dict[str, bool]
) -> None:
    pair, reference = make(optim, name, **kwargs, **flags), make(torch.optim, name, **kwargs)
    torch._dynamo.reset()
    optimizer = pair[1]

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    for seed in range(2):
        backward(pair, seed)
        for p in pair[0].parameters():
            assert p.grad is not None
            p.grad.mul_(8.0)
        optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        step()
    train_plainly(reference, range(2))
    assert_close(pair[0], reference[0])


def test_fp16_model_with_overflowing_scale_recovers(scaler: GradScaler) -> None:
    p = nn.Parameter(torch.full((40,), 2.0, dtype=torch.float16))
    optimizer = optim.SGD([p], lr=0.5, momentum=0.9, fused=True)
    scaler = type(scaler)("cpu", init_scale=2.0**17)
    losses = 0
    while losses < 2:
        optimizer.zero_grad()
        scaler.scale((p * p).sum().float()).backward()
        scaler.step(optimizer)
        scaler.update()
        losses += optimizer.updated
    # b = 4, p = 0; then b = 0.9 * 4 + 0, p = -1.8
    expected = torch.full((40,), -1.8, dtype=torch.float16)
    assert torch.equal(p.detach(), expected)
    assert scaler.get_scale() < 2.0**17
