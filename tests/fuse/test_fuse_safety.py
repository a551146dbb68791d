"""What braze.fuse must leave alone, or do in another way, and says so."""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import braze
import pytest
import torch
import torch.nn.functional as F
from fuse_cases import assert_same_outcome, block, bn, conv, image, outcome
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.cpu_only("is about modules, which are the same on every device")
_kept: list[Tensor] = []
_SHARED = torch.ones(1, dtype=torch.float64)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0) * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _layer(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.relu(self.bn(self.conv(x)))
    return y


def branches_on_a_value(self: Any, x: Tensor) -> Tensor:
    return _layer(self, x) if x.sum() > 1e9 else x - _layer(self, x)


def branches_on_a_shape(self: Any, x: Tensor) -> Tensor:
    return _layer(self, x) if x.shape[0] == 3 else x


def branches_on_a_type(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return _layer(self, y) if isinstance(y, Tensor) else x


def branches_on_a_buffer(self: Any, x: Tensor) -> Tensor:
    return _layer(self, x) if self.bn.num_batches_tracked < 10**9 else x


def without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.conv(x)
    return x + self.relu(self.bn(y))


def decorated(self: Any, x: Tensor) -> Tensor:
    return x + torch.no_grad()(lambda t: _layer(self, t))(x)


def under_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return _layer(self, x)


def checkpointed(self: Any, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(lambda t: _layer(self, t), x, use_reentrant=False)
    return y


def custom_function(self: Any, x: Tensor) -> Tensor:
    y: Tensor = _StraightThrough.apply(_layer(self, x))
    return y


def assigns(self: Any, x: Tensor) -> Tensor:
    self.last = _layer(self, x)
    y: Tensor = self.last * 2
    return y


def appends(self: Any, x: Tensor) -> Tensor:
    self.features.append(1)
    return _layer(self, x)


def keeps(self: Any, x: Tensor) -> Tensor:
    _kept.append(self.bn(self.conv(x)))
    return torch.relu(_kept[-1])


def prints(self: Any, x: Tensor) -> Tensor:
    print("layer")
    return _layer(self, x)


def warns(self: Any, x: Tensor) -> Tensor:
    warnings.warn("layer", stacklevel=1)
    return _layer(self, x)


def draws(self: Any, x: Tensor) -> Tensor:
    return _layer(self, x) * (1.0 + 0.0 * random.random())


def draws_with_torch(self: Any, x: Tensor) -> Tensor:
    return _layer(self, x) * (1.0 + 0.0 * float(torch.rand(())))


def uses_a_global(self: Any, x: Tensor) -> Tensor:
    return _layer(self, x) * _SHARED


def uses_an_object(self: Any, x: Tensor) -> Tensor:
    return _layer(self, x) if self.config.on else x


def several(self: Any, *xs: Tensor) -> Tensor:
    return _layer(self, xs[0])


# forward and a part of the reason
LEFT: dict[Callable[..., Any], str] = {
    branches_on_a_value: "branches on a tensor",
    branches_on_a_shape: "branches on a tensor",
    branches_on_a_type: "branches on the type",
    branches_on_a_buffer: "branches on a tensor",
    without_gradients: "no_grad",
    decorated: "no_grad",
    under_autocast: "autocast",
    checkpointed: "",
    custom_function: "autograd function",
    assigns: "assigns self.last",
    appends: "changes self.features",
    keeps: "outside of itself",
    prints: "prints",
    warns: "warns",
    draws: "random numbers",
    draws_with_torch: "random numbers",
    uses_a_global: "no input, parameter or buffer",
    uses_an_object: "self.config, a _Config that may change",
}


class _Config:
    on = True


def _make(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    model = block(forward, conv=conv(), bn=bn(), relu=nn.ReLU(), features=[], config=_Config())
    return model.double()


@pytest.mark.parametrize("forward", LEFT, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:layer")
def test_left_alone(forward: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = _make(forward)
    _kept.clear()
    report = braze.fusion_report(model)
    _kept.clear()
    assert not report.joined and not report.folded
    assert list(report.left) == ["bn"] and LEFT[forward] in report.left["bn"]
    expected = outcome(model, image())
    printed = capsys.readouterr().out
    braze.fuse(model)
    _kept.clear()
    assert_same_outcome(outcome(model, image()), expected)
    assert capsys.readouterr().out == printed
    _kept.clear()
    assert LEFT[forward] in str(braze.fusion_report(model))
    _kept.clear()


@pytest.mark.parametrize("forward", LEFT, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:layer")
def test_left_alone_inside_of_others(forward: Callable[..., Any]) -> None:
    """The other blocks are fused, also where one reaches for the end of the one that cannot be."""
    _kept.clear()
    inner = block(
        lambda self, x: self.relu(self.inner(self.before(x))),
        before=nn.Sequential(conv(), bn(), nn.ReLU()),
        inner=_make(forward),
        relu=nn.ReLU(),
    ).double()
    expected = outcome(inner, image())
    _kept.clear()
    braze.fuse(inner)
    _kept.clear()
    assert "before.1" in braze.fusion_report(inner).joined
    _kept.clear()
    assert_same_outcome(outcome(inner, image()), expected)
    _kept.clear()


def test_a_trace_leaves_other_threads_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """What the traced forward must not do, others may do at the same time, and it has its effect."""

    def other() -> None:
        with torch.no_grad():
            print(f"gradients: {torch.is_grad_enabled()}")

    def forward(self: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return _layer(self, x)

    assert braze.fusion_report(_make(forward)).joined == ["bn"]
    assert set(capsys.readouterr().out.splitlines()) == {"gradients: False"}


def test_the_cases_are_told_from_one_that_can_be_fused() -> None:
    assert braze.fusion_report(_make(_layer)).joined == ["bn"]
    assert braze.fusion_report(_make(several)).left == {}


# --- values used elsewhere, and values written ---


def bn_used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    return torch.relu(y) + y


def sum_used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x)) + x
    return torch.relu(y) * y


def conv_used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return torch.relu(self.bn(y)) + y


def relu_in_place_seen_later(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    z = y * 2
    F.relu_(y)
    return z + y


def residual_written(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    y += self.bn(self.conv(x))
    return torch.relu(y) + y


def residual_written_through_a_view(self: Any, x: Tensor) -> Tensor:
    base = x * 1
    y = base.view(-1).view(base.shape)
    y += self.bn(self.conv(x))
    return torch.relu(y) + base


def residual_is_the_input(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.view(x.shape)
    y += self.bn(self.conv(x.detach() * 1))
    return torch.relu(y), x * 2


def residual_written_between(self: Any, x: Tensor) -> Tensor:
    r = x * 1
    z = self.bn(self.conv(x)) + r
    r.mul_(3)
    return torch.relu(z) + r


def input_written_between(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = self.bn(y)
    y.mul_(2)
    return torch.relu(z + y)


def input_written_through_a_view(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = self.bn(y)
    w = y.view(-1)
    w *= 2
    return torch.relu(z + y)


def child_writes_between(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    return torch.relu(self.bn(self.conv(y)) + self.inplace(y))


def child_writes_the_input_between(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    return torch.relu(self.bn(y) + self.inplace(y))


def view_of_the_residual(self: Any, x: Tensor) -> Tensor:
    r = x * 1
    z = self.bn(self.conv(x)) + r
    r.view(-1).add_(1)
    return torch.relu(z) + r


def one_norm_for_both(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn(self.conv(x)) + self.bn(x))


def scalar_added(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn(self.conv(x)) + 0.5)


def size_added(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn(self.conv(x)) + x.size(1))


def added_to_itself(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    return torch.relu(y + y)


def alpha_added(self: Any, x: Tensor) -> Tensor:
    return torch.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


def returned_in_the_middle(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(self.conv(x))
    return torch.relu(y), y


def in_place_on_the_input(self: Any, x: Tensor) -> Tensor:
    y = self.relu_(x)
    return self.bn(self.conv(x)) + y


def dropout_of_a_kept_value(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = F.dropout(y, 0.0, self.training)
    z += x
    return z * y


def clamp_after(self: Any, x: Tensor) -> Tensor:
    return torch.clamp(self.bn(self.conv(x)), 0, 6)


VALUES = [
    bn_used_twice,
    sum_used_twice,
    conv_used_twice,
    relu_in_place_seen_later,
    residual_written,
    residual_written_through_a_view,
    residual_is_the_input,
    residual_written_between,
    view_of_the_residual,
    one_norm_for_both,
    scalar_added,
    size_added,
    added_to_itself,
    alpha_added,
    returned_in_the_middle,
    in_place_on_the_input,
    dropout_of_a_kept_value,
    clamp_after,
]


# As above, but autograd would refuse what they do.
WITHOUT_GRADIENTS = [
    input_written_between,
    input_written_through_a_view,
    child_writes_between,
    child_writes_the_input_between,
]


def _with_children(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return block(
        forward,
        conv=conv(),
        bn=bn(),
        relu_=nn.ReLU(True),
        inplace=nn.Sequential(nn.ReLU(True), conv()),
    ).double()


@pytest.mark.parametrize("forward", VALUES, ids=lambda f: f.__name__)
def test_values(forward: Callable[..., Any]) -> None:
    model = _with_children(forward)
    expected = outcome(model, image())
    assert_same_outcome(outcome(braze.fuse(model), image()), expected)


@pytest.mark.parametrize("forward", WITHOUT_GRADIENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_values_without_gradients(forward: Callable[..., Any], training: bool) -> None:
    plain = _with_children(forward).train(training)
    fused = braze.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("forward", WITHOUT_GRADIENTS, ids=lambda f: f.__name__)
def test_the_order_of_writes_is_what_those_test(
    forward: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positive control: a matcher that does not look for writes gets them wrong."""
    monkeypatch.setattr("braze._fusion.match._Rewriter.may_move", lambda *args: True)
    plain = _with_children(forward).eval()
    fused = braze.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        assert not torch.allclose(fused(image()), plain(image()))
