"""Small models for the tests of braze.fuse, and what they compute in training and evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def block(forward: Callable[..., Any], **children: Any) -> nn.Module:
    """A module of a class of its own, with these children and attributes."""
    module = type("Block", (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def conv(inputs: int = 4, outputs: int = 4, size: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **{"bias": False, **kwargs})


def bn(channels: int = 4, **kwargs: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **kwargs)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    if norm.track_running_stats:
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 1.5)
    return norm


def image(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, 4, 6, 5)), dtype=torch.float64, generator=generator)


class Residual(nn.Module):
    """As torchvision's BasicBlock: one ReLU for all."""

    def __init__(self, inputs: int = 4, outputs: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs), bn(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(outputs, outputs), bn(outputs)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1), bn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Network(nn.Module):
    """A stem, residual blocks and a head with dropout."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(4, 8, bias=True), bn(8), nn.SiLU())
        self.layer = nn.Sequential(Residual(8, 8), Residual(8, 8), Residual(8, 6))
        self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(p), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x)).mean((2, 3)))


def outcome(
    model: nn.Module, *args: Any, modes: tuple[bool, ...] = (True, False)
) -> dict[str, Any]:
    """Outputs, gradients of inputs and parameters, and buffers, of a copy."""
    model = copy.deepcopy(model)
    found: dict[str, Any] = {}
    for training in modes:
        model.train(training)
        inputs = [
            argument.clone().requires_grad_() if isinstance(argument, Tensor) else argument
            for argument in args
        ]
        # In-place operations at the very beginning need an input that is no leaf.
        outputs = model(*[i * 1 if isinstance(i, Tensor) else i for i in inputs])
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
        wanted = {f"input {i}": v for i, v in enumerate(inputs) if isinstance(v, Tensor)}
        wanted.update((name, p) for name, p in model.named_parameters() if p.requires_grad)
        gradients = torch.autograd.grad(outputs, list(wanted.values()), weights, allow_unused=True)
        mode = "training" if training else "evaluation"
        found.update({f"{mode} output {i}": o.detach() for i, o in enumerate(outputs)})
        found.update({f"{mode} grad {n}": g for n, g in zip(wanted, gradients, strict=True)})
        found.update({f"{mode} {n}": b.clone() for n, b in model.named_buffers()})
        with torch.no_grad():
            unwatched = model(*args)
            unwatched = list(unwatched) if isinstance(unwatched, (tuple, list)) else [unwatched]
        found.update({f"{mode} no_grad {i}": o for i, o in enumerate(unwatched)})
    return found


def assert_same_outcome(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-9
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if value is None:
            # A bias that a batch norm takes away has a gradient of zero.
            assert other is None or not other.any(), name
            continue
        assert other is not None and other.dtype == value.dtype, name
        assert other.shape == value.shape, name
        scale = max(float(value.double().abs().max()) if value.numel() else 0.0, 1e-3)
        error = float((other.double() - value.double()).abs().max()) if value.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: {error / scale:.3g}"
