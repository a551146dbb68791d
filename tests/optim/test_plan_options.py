"""Hyper-parameters changed between steps, and when the plan is built anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from braze import optim
from test_plan import Side, assert_equal, compare, no_change
from torch.nn import Parameter

Groups = list[dict[str, Any]]


def set_all(**values: Any) -> Callable[[Side], None]:
    def change(side: Side) -> None:
        for group in side.optimizer.param_groups:
            group.update(values)

    return change


SGD_VALUES: list[dict[str, Any]] = [
    {"lr": 0.3},
    {"lr": 1},
    {"lr": True},
    {"lr": torch.tensor(0.25, dtype=torch.float64)},
    {"momentum": 0.5},
    {"momentum": 0.0},
    {"dampening": 0.25},
    {"nesterov": True},
    {"weight_decay": 0.5},
    {"weight_decay": 0},
    {"maximize": True},
    {"differentiable": False},
]
ADAM_VALUES: list[dict[str, Any]] = [
    {"lr": 0.3},
    {"lr": 0},
    {"betas": (0.5, 0.75)},
    {"betas": [0.25, 0.5]},
    {"eps": 0.125},
    {"weight_decay": 0.5},
    {"maximize": True},
    {"decoupled_weight_decay": True, "weight_decay": 0.25},
    {"decoupled_weight_decay": False, "weight_decay": 0.25},
]


@pytest.mark.parametrize("values", SGD_VALUES, ids=str)
def test_sgd_option_between_steps(values: dict[str, Any]) -> None:
    side = compare("SGD", set_all(**values), no_change)
    assert side.optimizer._plan.rebuilds == 1


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("values", ADAM_VALUES, ids=str)
def test_adam_option_between_steps(values: dict[str, Any], kind: str) -> None:
    compare(kind, set_all(**values), no_change)


@pytest.mark.parametrize("value", ["lr", "weight_decay", "momentum"])
def test_option_of_one_group_only(value: str) -> None:
    def change(side: Side) -> None:
        side.optimizer.param_groups[1][value] = 0.3

    compare("SGD", change, no_change)


def test_amsgrad_switched_on_starts_at_the_present_second_moment() -> None:
    """torch raises KeyError here; braze starts the maximum from zero, and so at the present value."""
    p = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = optim.Adam([p], lr=0.1)
    p.grad = torch.full((3,), 2.0, dtype=torch.float64)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.step()
    entry = optimizer.state[p]
    assert torch.equal(entry["max_exp_avg_sq"], entry["exp_avg_sq"])
    largest = entry["max_exp_avg_sq"].clone()
    p.grad.zero_()
    optimizer.step()
    assert torch.equal(entry["max_exp_avg_sq"], largest)
    assert bool((entry["exp_avg_sq"] < largest).all())


def test_amsgrad_switched_off_uses_the_present_second_moment() -> None:
    def start(side: Side) -> None:
        side.optimizer.state.clear()
        set_all(amsgrad=True)(side)

    compare("Adam", start, set_all(amsgrad=False), no_change)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_lr_tensor_filled_in_place(kind: str) -> None:
    def tensor(side: Side) -> None:
        for group in side.optimizer.param_groups:
            group["lr"] = torch.tensor(0.2, dtype=torch.float64)

    def fill(side: Side) -> None:
        for i, group in enumerate(side.optimizer.param_groups):
            group["lr"].fill_(0.01 * (i + 1))

    side = compare(kind, tensor, fill, no_change)
    assert side.optimizer._plan.rebuilds == 1


def test_betas_list_changed_in_place() -> None:
    def as_list(side: Side) -> None:
        for group in side.optimizer.param_groups:
            group["betas"] = [0.8, 0.9]

    def change(side: Side) -> None:
        for group in side.optimizer.param_groups:
            group["betas"][0] = 0.5

    compare("Adam", as_list, change, no_change)


def test_l1_appears_and_disappears() -> None:
    p = Parameter(torch.ones(4))
    optimizer = optim.SGD([p], lr=1.0)
    p.grad = torch.zeros(4)
    seen = []
    for l1 in (None, 0.25, 0.125, None):
        optimizer.param_groups[0].pop("l1", None)
        if l1 is not None:
            optimizer.param_groups[0]["l1"] = l1
        optimizer.step()
        seen.append(float(p.detach()[0]))
    assert seen == [1.0, 0.75, 0.625, 0.625]


def test_schedulers_follow_torch() -> None:
    sides = []
    for library in (optim, torch.optim):
        side = Side(library, "AdamW")
        scheduler = torch.optim.lr_scheduler.OneCycleLR(side.optimizer, max_lr=0.3, total_steps=8)
        for _ in range(7):
            side.step()
            scheduler.step()
        sides.append(side)
    assert_equal(*sides)
    assert sides[0].optimizer._plan.rebuilds == 1


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_steady_training_builds_once(kind: str) -> None:
    side = Side(optim, kind)
    for step in range(10):
        # Gradients that come and go are not a change of the plan.
        side.skip = {step % 3} if step > 4 else set()
        side.step()
    assert side.optimizer._plan.rebuilds == 1
    side.params[0].data = side.params[0].data.clone()
    side.step()
    assert side.optimizer._plan.rebuilds == 2


def test_gradients_that_alternate_from_the_first_step() -> None:
    """Each parameter gets its state at another step; that alone rebuilds nothing either."""
    ours, theirs = Side(optim, "Adam"), Side(torch.optim, "Adam")
    for step in range(8):
        for side in (ours, theirs):
            side.skip = {i for i in range(4) if (step + i) % 2}
            side.step()
    assert_equal(ours, theirs)
    assert ours.optimizer._plan.rebuilds == 1
    assert {float(ours.state(i)["step"]) for i in range(4)} == {4.0}


def test_strided_gradients_do_not_rebuild() -> None:
    p = Parameter(torch.ones(6, 5))
    optimizer = optim.SGD([p], lr=1.0)
    for step in range(6):
        grad = torch.arange(30.0).view(5, 6).t() if step % 2 else torch.arange(30.0).view(6, 5)
        want = p.detach() - grad
        p.grad = grad
        optimizer.step()
        assert torch.equal(p.detach(), want)
    assert optimizer._plan.rebuilds == 1


def test_many_parameters_are_noticed_in_parallel() -> None:
    """Above some hundred parameters other threads look for changes: each one is still seen."""
    params = [Parameter(torch.ones(3)) for _ in range(1500)]
    optimizer = optim.SGD(params, lr=1.0)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    for i in (0, 31, 32, 777, 1499):
        params[i].data = torch.full((3,), 5.0)
        rebuilds = optimizer._plan.rebuilds
        optimizer.step()
        assert optimizer._plan.rebuilds == rebuilds + 1
        assert params[i].detach().tolist() == [4.0, 4.0, 4.0]
    params[700].grad = None
    before = params[700].detach().clone()
    optimizer.step()
    assert torch.equal(params[700].detach(), before)
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\] must be a number"):
        optimizer.step()
