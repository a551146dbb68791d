"""Running averages of the weights: torch's AveragedModel, in the pass that updates them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import braze.optim as optim
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def half(updates: int) -> float:
    return 0.5 if updates < 3 else 0.9


class Model(nn.Module):
    """Tied, frozen, strided and 0-dim parameters, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(30, 17, bias=False), nn.BatchNorm1d(17)
        self.last = nn.Linear(30, 17)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.long = nn.Parameter(torch.randn(16391))
        self.turned = nn.Parameter(torch.randn(40, 30).t())
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def train(
    model: nn.Module, optimizer: Any, seeds: range, after: Callable[[], None] = lambda: None
) -> None:
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step()
        after()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SGD", {"momentum": 0.9}),
        ("AdamW", {}),
        ("AdamW", {"foreach": True}),
        ("AdamW", {"max_grad_norm": 0.1}),
        ("Lion", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("decay", [0.999, 0.5, 0.25, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_torchs_averaged_model(
    name: str, kwargs: dict[str, Any], decay: float, dtype: torch.dtype
) -> None:
    model = Model().to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).to(wide)
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01, ema_decay=decay, **kwargs)
    # torch averages in the model's dtype: of a copy in fp32 that is the exact one.
    train(
        model, optimizer, range(4), lambda: average.update_parameters(copy.deepcopy(model).to(wide))
    )
    for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
        if p.requires_grad:
            mine = optimizer.state[p]["ema"]
            assert mine.dtype == wide and mine.stride() == p.stride()
            ulp = torch.finfo(wide).eps
            torch.testing.assert_close(mine, q.detach(), rtol=2 * ulp, atol=ulp)
        else:
            assert p not in optimizer.state
    assert optimizer.param_groups[0]["ema_updates"] == 4


@pytest.mark.parametrize("warmup", [False, True])
def test_schedules(warmup: bool) -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = optim.SGD([p], lr=1.0, ema_decay=half, ema_warmup=warmup)
    expected = 0.0
    for n in range(6):
        p.grad = torch.tensor([-1.0])
        optimizer.step()
        decay = min(half(n), (1 + n) / (10 + n)) if warmup else half(n)
        expected = float(p) if n == 0 else decay * expected + (1 - decay) * float(p)
    assert float(optimizer.state[p]["ema"]) == pytest.approx(expected, rel=1e-6)


def test_nothing_of_it_by_default() -> None:
    model = Model()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert all("ema" not in entry for entry in state["state"].values())
    assert "ema_updates" not in state["param_groups"][0]
    with pytest.raises(RuntimeError, match="ema_decay"), optimizer.swap_ema():
        pass
    with pytest.raises(RuntimeError, match="ema_decay"):
        optimizer.ema_state_dict(model)


@pytest.mark.parametrize("through", ["state_dict", "file", "deepcopy", "pickle", "torch"])
def test_training_goes_on_from_a_checkpoint(through: str, tmp_path: Any) -> None:
    def pair(model: nn.Module) -> Any:
        return optim.AdamW(model.parameters(), lr=0.01, ema_decay=half, max_grad_norm=1.0)

    straight = Model()
    reference = pair(straight)
    train(straight, reference, range(6))
    model: nn.Module = Model()
    optimizer = pair(model)
    train(model, optimizer, range(3))
    if through in ("deepcopy", "pickle"):
        both = (model, optimizer)
        model, optimizer = (
            copy.deepcopy(both) if through == "deepcopy" else pickle.loads(pickle.dumps(both))
        )
        assert optimizer.max_grad_norm == 1.0 and optimizer.ema_decay is half
    else:
        state = optimizer.state_dict()
        if through == "file":
            torch.save(state, tmp_path / "state")
            state = torch.load(tmp_path / "state", weights_only=True)
        if through == "torch":
            theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
            theirs.load_state_dict(state)
            state = theirs.state_dict()
        optimizer = pair(model)
        optimizer.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)
        if q.requires_grad:
            assert torch.equal(optimizer.state[p]["ema"], reference.state[q]["ema"])


def test_fp32_averages_of_16_bit_weights_stay_fp32_in_checkpoints() -> None:
    model = Model().bfloat16()
    optimizer = optim.SGD(model.parameters(), ema_decay=0.9)
    train(model, optimizer, range(2))
    other = optim.SGD(model.parameters(), ema_decay=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[model.long]["ema"].dtype == torch.float32
    assert torch.equal(other.state[model.long]["ema"], optimizer.state[model.long]["ema"])


def test_swap() -> None:
    model = Model()
    optimizer = optim.AdamW(model.parameters(), lr=0.1, ema_decay=0.9)
    train(model, optimizer, range(3))
    before = {name: (v.clone(), v.data_ptr()) for name, v in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), optimizer.swap_ema():
        for p in model.parameters():
            if p.requires_grad:
                assert torch.equal(p, optimizer.state[p]["ema"])
        raise ZeroDivisionError
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.data_ptr() == before[name][1]
    train(model, optimizer, range(3, 5))  # the step takes no notice


def test_state_dict_of_averages_loads_into_the_plain_model() -> None:
    model = Model()
    optimizer = optim.AdamW(model.parameters(), lr=0.1, ema_decay=0.9)
    model.norm(model.first(torch.randn(8, 30)))
    train(model, optimizer, range(3))
    plain = Model()
    plain.load_state_dict(optimizer.ema_state_dict(model), strict=True)
    for name, value in plain.state_dict().items():
        original: Tensor = dict(model.named_parameters(remove_duplicate=False)).get(
            name, torch.empty(0)
        )
        is_averaged = original in optimizer.state
        expected = optimizer.state[original]["ema"] if is_averaged else model.state_dict()[name]
        assert torch.equal(value, expected), name
    assert optimizer.ema_state_dict(model.bfloat16())["first.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="average"):
        optimizer.ema_state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize("flags", [{}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("releases", [False, True])
def test_windows_average_once_per_update(flags: dict[str, bool], releases: bool) -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = optim.SGD([p], lr=1.0, ema_decay=0.5, accumulation_steps=2, **flags)
    for _ in range(4):
        p.grad = torch.full((3,), -1.0)
        if releases:  # no gradient is left when the step closes the window
            optimizer.accumulate()
        optimizer.step()
    assert optimizer.param_groups[0]["ema_updates"] == 2
    assert torch.equal(optimizer.state[p]["ema"], torch.full((3,), 1.5))
