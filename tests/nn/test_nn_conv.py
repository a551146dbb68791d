"""ConvBNAct and ConvBNReLU against torch's convolution, batch norm and activation in a row."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import braze.nn as bnn
import pytest
import torch
from nn_cases import assert_near, assert_same_state, values
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

SHAPES = {1: (4, 3, 9), 2: (4, 3, 6, 5), 3: (2, 3, 4, 5, 3)}


class Reference(nn.Module):
    """The same in torch, in double."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        dims = ours.conv.weight.dim() - 2
        kind = getattr(nn, f"BatchNorm{dims}d")
        self.conv = copy.deepcopy(ours.conv).double()
        bn = ours.bn
        self.bn = kind(
            bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats
        ).double()
        self.load_state_dict(ours.state_dict())
        self.train(ours.training)
        self.bn.train(ours.bn.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.bn(self.conv(x))
        return torch.relu(z if residual is None else z + residual)


def make(dims: int = 2, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    module = getattr(bnn, f"ConvBNAct{dims}d")(3, 5, 3, padding=1, **kwargs)
    with torch.no_grad():
        for p in module.bn.parameters():
            p.add_(torch.randn(5))
        if module.bn.running_mean is not None:
            module.bn.running_mean.copy_(torch.randn(5))
        if module.conv.bias is not None:
            module.conv.bias.copy_(torch.linspace(-3, 3, 5))
    return module


def image(dims: int = 2, seed: int = 0) -> Tensor:
    shape = torch.Size(SHAPES[dims])
    return values(seed)[: shape.numel()].view(shape).clone().requires_grad_()


def check(ours: Any, truth: nn.Module, dims: int = 2, seed: int = 0, factor: float = 4) -> None:
    x = image(dims, seed)
    wide = x.detach().double().requires_grad_()
    y, expected = ours(x), truth(wide)
    assert_near(y, expected, "output", factor)
    dy = torch.randint(-64, 65, y.shape) / 32
    names = [n for n, p in ours.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(y, [x, *map(ours.get_parameter, names)], dy)
    wanted = torch.autograd.grad(
        expected, [wide, *map(truth.get_parameter, names)], dy.double(), allow_unused=True
    )
    for name, a, b in zip(["input", *names], found, wanted, strict=True):
        if name == "conv.bias" and (ours.bn.training or ours.bn.running_mean is None):
            assert not a.any() and float(b.abs().max()) < 1e-10
        else:
            assert_near(a, b, f"gradient of {name}", 4 * factor)
    assert_same_state(ours, truth, factor)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"affine": False},
        {"track_running_stats": False},
        {"groups": 1, "stride": 2, "dilation": 2},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect", "stride": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values_gradients_and_statistics(dims: int, kwargs: dict[str, Any], bias: bool) -> None:
    ours = make(dims, bias=bias, **kwargs)
    truth = Reference(ours)
    for step in range(3):
        check(ours, truth, dims, step)
    ours.eval(), truth.eval()
    check(ours, truth, dims, 3)


def test_absorbed_bias_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tensor | None] = []
    forward = nn.Conv2d._conv_forward

    def spy(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        used.append(bias)
        return forward(self, input, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", spy)
    module = make(bias=True)
    module(image())
    assert used == [None]
    module.bn.eval()
    module(image())
    assert used[1] is module.conv.bias


def test_bias_of_a_frozen_batch_norm_is_trained() -> None:
    ours = make(bias=True)
    ours.bn.eval()
    truth = Reference(ours)
    check(ours, truth)
    ours(image()).sum().backward()
    assert float(ours.conv.bias.grad.abs().max()) > 1


def test_bias_alone_is_trained() -> None:
    """DistributedDataParallel waits for the gradient of everything that takes part."""
    module = make(bias=True)
    module.requires_grad_(False)
    module.conv.bias.requires_grad_()
    module(image().detach()).sum().backward()
    assert module.conv.bias.grad is not None and not module.conv.bias.grad.any()


def test_empty_batch_leaves_the_running_mean() -> None:
    module = make(bias=True)
    before = module.bn.running_mean.clone()
    module(torch.empty(0, 3, 4, 4)).sum().backward()
    assert torch.equal(module.bn.running_mean, before)
    assert module.conv.bias.grad is not None


def test_half_precision_running_mean() -> None:
    ours = make(bias=True).bfloat16()
    truth = Reference(ours)
    for step in range(3):
        x = image(seed=step)
        ours(x.bfloat16()), truth(x.bfloat16().double())
    assert_near(ours.bn.running_mean, truth.bn.running_mean, "running mean", 2)


def with_hook(module: Any) -> list[str]:
    seen: list[str] = []
    module.conv.register_forward_hook(lambda *_: seen.append("forward"))
    return seen


def test_hooks_of_the_children_run() -> None:
    module = make(bias=True)
    truth = Reference(module)
    seen = with_hook(module)
    module.bn.register_forward_hook(lambda m, args, y: seen.append(f"bn {len(args)}"))
    # With a hook the convolution is called, bias and all, whose gradient is then rounding.
    assert_near(module(image()), truth(image().double()), "output", 4)
    assert_same_state(module, truth, 4)
    assert seen == ["forward", "bn 1"]
    module(image(), torch.ones(4, 5, 6, 5))
    assert seen[2:] == ["forward", "bn 2"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        weight_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: prune.l1_unstructured(conv, "bias", 0.5),
    ],
)
def test_changed_convolutions(change: Any) -> None:
    module, rest = make(bias=True), make(bias=True)
    for conv in (module.conv, rest.conv):
        change(conv)
    x = image()
    expected = torch.relu(nn.BatchNorm2d.forward(rest.bn, rest.conv(x)))
    assert_near(module(x), expected.double(), "output", 4)
    torch.testing.assert_close(module.bn.running_mean, rest.bn.running_mean)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_relu_classes(dims: int) -> None:
    torch.manual_seed(0)
    a = getattr(bnn, f"ConvBNReLU{dims}d")(3, 5, 3, 2, 1, bias=True, eps=0.1)
    torch.manual_seed(0)
    b = getattr(bnn, f"ConvBNAct{dims}d")(3, 5, 3, 2, 1, bias=True, eps=0.1, activation="relu")
    assert isinstance(a, type(b)) and torch.equal(a(image(dims)), b(image(dims)))
    with pytest.raises(TypeError, match="activation"):
        type(a)(3, 5, 3, activation="silu")


def test_state_dict_is_that_of_conv_and_bn() -> None:
    module = make(bias=True)
    pair = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "bn": nn.BatchNorm2d(5)})
    assert list(module.state_dict()) == list(pair.state_dict())
    pair.load_state_dict(module.state_dict())
    other = make(bias=True)
    other.load_state_dict(pair.state_dict())
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_copies() -> None:
    module = make(bias=True, activation=nn.LeakyReLU(0.3))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert torch.equal(other.eval()(image()), module.eval()(image()))
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    assert torch.equal(average(image()), module(image()))


def test_residual() -> None:
    ours = make(bias=True)
    truth = Reference(ours)
    x, r = image(), values(5)[: 4 * 5 * 6 * 5].view(4, 5, 6, 5)
    assert_near(ours(x, r), truth(x.double(), r.double()), "output", 4)


def test_arguments_reach_both() -> None:
    module = bnn.ConvBNAct2d(
        4,
        6,
        (3, 1),
        stride=(2, 1),
        padding=(1, 0),
        groups=2,
        padding_mode="replicate",
        eps=1e-3,
        momentum=None,
        activation="elu",
        dtype=torch.float64,
    )
    assert repr(module.conv) == repr(
        nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), groups=2, bias=False, padding_mode="replicate")
    )
    assert (module.bn.eps, module.bn.momentum, module.bn.activation) == (1e-3, None, "elu")
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert bnn.ConvBNAct2d(3, 4, 3, padding="same")(torch.ones(2, 3, 5, 5)).shape == (2, 4, 5, 5)


@pytest.mark.cpu_only("autocast on the CPU")
@pytest.mark.parametrize("bias", [False, True])
def test_autocast(bias: bool) -> None:
    module = make(bias=bias)
    truth = Reference(module)
    x = image()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype is torch.bfloat16 and module.bn.running_mean.dtype is torch.float32
    y.float().sin().sum().backward()
    expected = truth(x.detach().double())
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in module.parameters())
    torch.testing.assert_close(
        module.bn.running_mean.double(), truth.bn.running_mean, rtol=0.01, atol=0.01
    )
