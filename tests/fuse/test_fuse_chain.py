"""Residual blocks in a row: the two gradients of a block's input are summed by kernels of the block before."""

from __future__ import annotations

import copy
from typing import Any

import braze
import pytest
import torch
from braze.nn import _batch_norm_functional
from fuse_cases import Network, Residual, assert_same_outcome, bn, conv, image, outcome
from torch import Tensor, nn

pytestmark = pytest.mark.cpu_only("is about modules, which are the same on every device")


class Counter:
    """braze's operators, counting the calls of those that fork."""

    def __init__(self) -> None:
        self.operators = _batch_norm_functional.ops()
        self.forks = 0

    def __getattr__(self, name: str) -> Any:
        if "fork" in name:
            self.forks += 1
        return getattr(self.operators, name)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    found = Counter()
    monkeypatch.setattr(_batch_norm_functional, "ops", lambda: found)
    return found


def _stages() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(Residual(), Residual(), Residual()),
        nn.Sequential(Residual(4, 6), Residual(6, 6)),
    ).double()


def test_gradients_are_the_same_and_forks_happen(counter: Counter) -> None:
    torch.manual_seed(0)
    plain = _stages()
    expected = outcome(plain, image())
    fused = braze.fuse(plain)
    copy.deepcopy(fused)(image()).sum().backward()
    # The first block's input is the model's; every block gives its result twice, the last in vain.
    assert counter.forks == 5
    assert_same_outcome(outcome(fused, image()), expected)


def test_no_addition_is_left() -> None:
    """Of gradients: autograd adds none but the one of the model's own input."""

    def additions(model: nn.Module) -> int:
        x = image().requires_grad_()
        loss = model(x * 1).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss.backward()
        return sum(event.name in ("aten::add", "aten::add_") for event in profile.events())

    torch.manual_seed(0)
    plain = _stages()
    fused = braze.fuse(copy.deepcopy(plain))
    assert (additions(plain), additions(fused)) == (5, 1)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Residual(), Residual()).double()
    fused = braze.fuse(copy.deepcopy(plain))
    results = []
    for model in (fused, plain):
        x = image(2, 4, 3, 3).requires_grad_()
        y = model(x * 1).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), list(model.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["0", "1", "1.conv1", "2"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_whole_gradients(name: str, kind: str) -> None:
    """A hook that keeps a tensor may ask for its gradient, of which it must not get a half."""
    torch.manual_seed(0)
    plain = nn.Sequential(Residual(), Residual(), Residual()).double()
    for block in plain:
        block.relu = nn.ReLU()
    fused = braze.fuse(copy.deepcopy(plain))
    gradients: list[list[Tensor]] = [[], []]

    def hook(which: int) -> Any:
        def run(module: nn.Module, *values: Any) -> None:
            for value in values:
                for tensor in value if isinstance(value, tuple) else (value,):
                    if "backward" in kind and tensor is not None:
                        gradients[which].append(tensor.detach().clone())
                    elif tensor is not None and tensor.requires_grad:
                        tensor.register_hook(lambda g: gradients[which].append(g.detach().clone()))

        return run

    for which, model in enumerate((fused, plain)):
        getattr(model.get_submodule(name), f"register_{kind}_hook")(hook(which))
        model(image().requires_grad_() * 1).square().sum().backward()
    assert len(gradients[0]) == len(gradients[1]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_results_that_are_kept_are_not_halved() -> None:
    """Blocks called by a forward that also keeps what is between them."""
    torch.manual_seed(0)

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Residual(), Residual()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = self.one(x)
            return a, self.two(a)

    plain = Pyramid().double()
    fused = braze.fuse(copy.deepcopy(plain))
    gradients = []
    for model in (fused, plain):
        a, b = model(image() * 1)
        gradients.append(torch.autograd.grad(b.square().sum(), a)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)


def test_without_gradients_and_partly_frozen(counter: Counter) -> None:
    torch.manual_seed(0)
    plain = _stages()
    fused = braze.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        copy.deepcopy(fused)(image())
    assert counter.forks == 0
    for model in (plain, fused):
        model[0].requires_grad_(False)
        model[0].eval()
    for model in (fused, plain):
        model(image()).sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9)


def test_pre_activation_blocks() -> None:
    """Their input goes into a batch norm and a sum, and they end with a sum."""
    torch.manual_seed(0)

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.conv1, self.bn2, self.conv2 = bn(), conv(), bn(), conv()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(self.relu(self.bn1(x)))
            return x + self.conv2(self.relu(self.bn2(y)))

    plain = nn.Sequential(PreActivation(), PreActivation(), nn.Sequential(bn(), nn.ReLU())).double()
    expected = outcome(plain, image())
    assert_same_outcome(outcome(braze.fuse(plain), image()), expected)


def test_network() -> None:
    torch.manual_seed(0)
    plain = Network().double()
    expected = outcome(plain, image())
    assert_same_outcome(outcome(braze.fuse(plain), image()), expected)
