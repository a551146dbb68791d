"""What braze.fuse finds, and that it computes the same."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from typing import Any

import braze
import pytest
import torch
import torch.nn.functional as F
from activations import CASES
from fuse_cases import Network, Residual, assert_same_outcome, block, bn, conv, image, outcome
from torch import Tensor, nn

pytestmark = pytest.mark.cpu_only("is about modules, which are the same on every device")


def _sequential(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(modules))


def _join(add: Callable[[Tensor, Tensor], Tensor], act: Callable[[Tensor], Tensor]) -> nn.Module:
    return block(lambda self, x: act(add(self.bn(self.conv(x)), x)), conv=conv(), bn=bn())


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def _method(name: str) -> Callable[..., Tensor]:
    return lambda x, *others: getattr(x, name)(*others)


def _with_activation(act: Any) -> nn.Module:
    return (
        block(lambda self, x: act(self.bn(x)), bn=bn())
        if not isinstance(act, nn.Module)
        else (block(lambda self, x: self.act(self.bn(x)), bn=bn(), act=act))
    )


class _Named(nn.Module):
    """As timm's and torchvision's: functional relu, a ReLU module used thrice, an attribute that decides."""

    def __init__(self) -> None:
        super().__init__()
        self.use_res = True
        self.conv = nn.Sequential(
            nn.Sequential(conv(4, 8, 1), bn(8), nn.ReLU6(True)), conv(8, 4, 1), bn(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res else self.conv(x)


def _shared_relu_conv_bn(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.bn(self.conv(x)))
    return self.relu(self.bn(self.conv(y)))


def _unet(self: Any, x: Tensor) -> Tensor:
    a = self.relu(self.bn1(self.conv1(x)))
    b = self.relu(self.bn2(self.conv2(F.max_pool2d(a, 2))))
    up = F.interpolate(b, size=a.shape[2:])
    return self.relu(self.bn3(self.conv3(torch.cat([a, up], 1))))


def _into_the_residual(self: Any, x: Tensor) -> Tensor:
    y = x.sigmoid() * x
    y += self.bn(self.conv(x))
    return torch.relu(y)


def _branches(self: Any, x: Tensor) -> Tensor:
    out = self.bns[0](x)
    for norm in self.bns[1:]:
        out += norm(x)
    return torch.relu(out)


# name: (model, kinds of what must be fused, in any order)
PATTERNS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bn, relu": (_sequential(bn(), nn.ReLU()), ["bn+relu"]),
    "conv, bn": (_sequential(conv(), bn()), ["conv+bn"]),
    "conv, bn, relu": (_sequential(conv(), bn(), nn.ReLU(True)), ["conv+bn+relu"]),
    "conv with bias": (_sequential(conv(bias=True), bn(), nn.ReLU()), ["conv+bn+relu"]),
    "identity between": (
        _sequential(conv(), bn(), nn.Identity(), nn.ReLU(), nn.Identity()),
        ["conv+bn+relu"],
    ),
    "dropout that does nothing": (
        _sequential(conv(), bn(), nn.Dropout2d(0.0), nn.ReLU()),
        ["conv+bn", "conv+bn+relu"],  # the latter in evaluation
    ),
    "pre-activation": (
        _sequential(bn(), nn.ReLU(), conv(), bn(), nn.ReLU(), conv()),
        ["bn+relu", "conv+bn+relu"],
    ),
    "conv padded by reflection": (
        _sequential(conv(padding_mode="reflect"), bn(), nn.ReLU()),
        ["conv+bn+relu"],
    ),
    "grouped, dilated, strided": (
        _sequential(nn.Conv2d(4, 4, 3, 2, "valid", 1, 2), bn(), nn.ReLU()),
        ["conv+bn+relu"],
    ),
    "no statistics": (
        _sequential(conv(), bn(track_running_stats=False), nn.ReLU()),
        ["conv+bn+relu"],
    ),
    "no parameters": (_sequential(conv(), bn(affine=False), nn.ReLU()), ["conv+bn+relu"]),
    "cumulative average": (
        _sequential(conv(bias=True), bn(momentum=None), nn.ReLU()),
        ["conv+bn+relu"],
    ),
    "join": (lambda: _join(torch.add, torch.relu), ["conv+bn+add+relu"]),
    "join in place": (lambda: _join(_iadd, F.relu_), ["conv+bn+add+relu"]),
    "join by method": (lambda: _join(_method("add_"), _method("relu_")), ["conv+bn+add+relu"]),
    "join into the residual": (
        lambda: block(_into_the_residual, conv=conv(), bn=bn()),
        ["conv+bn+add+relu"],
    ),
    "many branches": (
        lambda: block(_branches, bns=nn.ModuleList([bn(), bn(), bn(), bn()])),
        ["bn+bn+add", "bn+add", "bn+add+relu"],
    ),
    "join from the right": (
        lambda: block(lambda self, x: torch.relu(x + self.bn(x)), bn=bn()),
        ["bn+add+relu"],
    ),
    "join without activation": (
        lambda: block(lambda self, x: x + self.bn(self.conv(x)), conv=conv(), bn=bn()),
        ["conv+bn+add"],
    ),
    "broadcast join": (
        lambda: block(
            lambda self, x: torch.relu(self.bn(self.conv(x)) + x.mean((2, 3), True)),
            conv=conv(),
            bn=bn(),
        ),
        ["conv+bn+add+relu"],
    ),
    "residual block": (Residual, ["conv+bn+relu", "conv+bn+add+relu"]),
    "two batch norms": (
        lambda: Residual(4, 6),
        ["conv+bn+relu", "conv+bn+conv+bn+add+relu", "conv+bn"],
    ),
    "inverted residual": (_Named, ["conv+bn+relu6", "conv+bn+add", "conv+bn"]),
    "relu in the next child": (
        lambda: nn.Sequential(bn(), nn.Sequential(nn.ReLU(), conv())),
        ["bn+relu"],
    ),
    "everything used twice": (
        lambda: block(_shared_relu_conv_bn, conv=conv(), bn=bn(), relu=nn.ReLU(True)),
        ["conv+bn+relu"],
    ),
    "u-net": (
        lambda: block(
            _unet,
            conv1=conv(4, 5),
            bn1=bn(5),
            conv2=conv(5, 6),
            bn2=bn(6),
            conv3=conv(11, 3),
            bn3=bn(3),
            relu=nn.ReLU(),
        ),
        ["conv+bn+relu"],
    ),
    "relu, dropout": (_sequential(nn.ReLU(), nn.Dropout(0.0)), ["relu+dropout"]),
    "dropout, sum": (
        lambda: block(lambda self, x: self.drop(torch.sin(x)) + x, drop=nn.Dropout(0.0)),
        ["dropout+add"],
    ),
    "functional dropout": (
        lambda: block(lambda self, x: F.dropout(F.relu(x), 0.0, self.training)),
        ["relu+dropout"],
    ),
    "network": (
        Network,
        [
            "conv+bn+silu",
            "conv+bn+relu",
            "conv+bn+add+relu",
            "conv+bn+conv+bn+add+relu",
            "conv+bn",
            "relu+dropout",
        ],
    ),
}


def kinds_of(model: nn.Module) -> set[str]:
    return {
        text.split(":")[0] for found in braze.fusion_report(model).blocks for text in found.fused
    }


def check(model: nn.Module, *args: Any, tolerance: float = 1e-9) -> None:
    """Fused and unfused again, it computes what it did, and has the same state."""
    model = model.double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    expected = outcome(model, *args)
    parameters = list(model.parameters())
    assert braze.fuse(model) is model
    assert_same_outcome(outcome(model, *args), expected, tolerance)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [m.__class__.__name__ for m in model.modules()] == [c.__name__ for c in classes]
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert list(model.state_dict()) == list(state)
    assert braze.unfuse(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert_same_outcome(outcome(model, *args), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name: str) -> None:
    make, kinds = PATTERNS[name]
    torch.manual_seed(0)
    model = make()
    fused = braze.fuse(copy.deepcopy(model))
    assert kinds_of(fused) == set(kinds)
    assert kinds_of(model) == set(kinds)  # the report of a model that is not fused yet
    check(model, image())


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_in_channels_last(name: str) -> None:
    make, _ = PATTERNS[name]
    torch.manual_seed(0)
    model = make().double()
    expected = outcome(model, image())
    braze.fuse(model, channels_last=True)
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in model.parameters()
        if p.dim() == 4
    )
    assert_same_outcome(outcome(model, image()), expected)


@pytest.mark.parametrize(
    ("name", "act"), [(name, form) for name, case in CASES.items() for form in case.forms]
)
def test_activation(name: str, act: Any) -> None:
    torch.manual_seed(0)
    model = _with_activation(_method(act) if isinstance(act, str) else act)
    assert kinds_of(model) == {f"bn+{name}"}
    # torch's hardsigmoid rounds its derivative to float.
    check(model, image(), tolerance=1e-7 if name == "hardsigmoid" else 1e-9)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dimensions(dims: int) -> None:
    torch.manual_seed(0)
    conv_class, norm_class = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = nn.Sequential(conv_class(4, 5, 3, bias=True), norm_class(5), nn.ReLU())
    assert kinds_of(model) == {"conv+bn+relu"}
    check(model, image(2, 4, *(5, 6, 4)[:dims]))


def test_linear_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.0))
    assert kinds_of(model) == {"bn+relu"}
    check(model, image(7, 4))


def test_frozen_batch_norm() -> None:
    """A batch norm in evaluation inside a model in training."""
    torch.manual_seed(0)
    model = Residual().double()
    expected_of = copy.deepcopy(model)
    braze.fuse(model)
    for m in (model, expected_of):
        m.train()
        m.bn1.eval()
        m.bn2.weight.requires_grad_(False)
    x = image()
    ours, theirs = model(x), expected_of(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for m, y in ((model, ours), (expected_of, theirs)):
        (y * image(*y.shape, seed=1)).sum().backward()
        assert m.bn2.weight.grad is None
    for (name, a), b in zip(model.named_parameters(), expected_of.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-9, msg=name)
    assert torch.equal(model.bn1.running_mean, expected_of.bn1.running_mean)


def test_several_arguments_and_results() -> None:
    torch.manual_seed(0)

    def forward(self: Any, x: Tensor, skip: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.bn(self.conv(x)) + skip)
        return y, y * scale

    model = block(forward, conv=conv(), bn=bn())
    assert kinds_of(model) == {"conv+bn+add+relu"}
    check(model, image(), image(seed=1))
    check(model, image(), image(seed=1), 3.0)


def test_a_list_as_argument() -> None:
    """As DenseNet's layers: one tensor or a list of them."""
    torch.manual_seed(0)

    def forward(self: Any, x: Any) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.conv(self.relu(self.norm(torch.cat(parts, 1))))

    def whole(self: Any, x: Tensor) -> Tensor:
        return self.layer([x, self.layer([x])])

    layer = block(forward, norm=nn.BatchNorm2d(4), relu=nn.ReLU(True), conv=conv(4, 4))
    check(layer, image())
    wide = block(forward, norm=bn(8), relu=nn.ReLU(True), conv=conv(8, 4))
    model = block(lambda self, x: self.wide([x, torch.sin(x)]), wide=wide).double()
    braze.fuse(model)
    model(image())
    plans = model.wide.__dict__["_braze_fusion"].plans(True)
    assert [f.kind for p in plans for f in p.fusions].count("bn+relu") >= 1
    check(braze.unfuse(model), image())


def test_dropout_is_left_to_torch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5))
    braze.fuse(model, dropout=False)
    assert type(model[2]) is nn.Dropout and not kinds_of(model)
    x = torch.randn(8, 4)
    expected = copy.deepcopy(model)
    torch.manual_seed(3)
    ours = model(x)
    torch.manual_seed(3)
    assert torch.equal(ours, expected(x))


def test_fused_dropout_drops() -> None:
    model = braze.fuse(nn.Sequential(nn.ReLU(), nn.Dropout(0.25)))
    x = torch.rand(100, 100) + 1
    y = model(x)
    dropped = (y == 0).double().mean()
    assert 0.2 < dropped < 0.3
    torch.testing.assert_close(y[y != 0], (x / 0.75)[y != 0])
    model.eval()
    assert torch.equal(model(x), x)


class _OwnInit(nn.BatchNorm2d):
    """As published nets for CIFAR have it."""

    def __init__(self, channels: int, decay: float = 0.9) -> None:
        super().__init__(channels, eps=1e-3, momentum=1 - decay)
        self.weight.requires_grad_(False)
        self.history: list[float] = []

    def extra_repr(self) -> str:
        return "mine"

    def remember(self) -> None:
        self.history.append(0.0)


class _OwnInitTwice(_OwnInit, abc.ABC):
    pass


class _OwnForward(_OwnInit):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class _OwnWeight(_OwnInit):
    @property
    def running_var(self) -> Tensor:  # type: ignore[override]
        return torch.ones(4, dtype=torch.float64)


@pytest.mark.parametrize("kind", [_OwnInit, _OwnInitTwice])
def test_a_norm_with_a_constructor_of_its_own_is_fused(kind: type[_OwnInit]) -> None:
    model = nn.Sequential(conv(), kind(4), nn.ReLU()).double()
    fused = braze.fuse(copy.deepcopy(model))
    assert braze.fusion_report(fused).joined == ["1"] and type(fused[1]) is kind
    assert_same_outcome(outcome(fused, image()), outcome(model, image()))


@pytest.mark.parametrize(("kind", "own"), [(_OwnForward, "forward"), (_OwnWeight, "running_var")])
def test_a_norm_that_computes_something_else_is_not(kind: type[_OwnInit], own: str) -> None:
    model = nn.Sequential(conv(), bn(), nn.ReLU()).double()
    model[1].__class__ = kind
    fused = braze.fuse(copy.deepcopy(model))
    assert f"it has {own} of its own" in braze.fusion_report(fused).left["1"]
    assert_same_outcome(outcome(fused, image()), outcome(model, image()))
