"""Small-image variants of five well-known families of convolutional networks.

``nn`` is the namespace their layers come from: ``torch.nn``, or ``braze.nn`` in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module


def _conv(nn: Any, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> Module:
    # No bias: batch norm removes it, and Adam would turn its rounding noise into steps.
    layers: Module = nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
    return layers


class _GlobalMean(Module):
    """(N, C, H, W) to (N, C); unlike adaptive pooling, deterministic on every device."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class _Residual(Module):
    def __init__(self, nn: Any, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(nn, inputs, outputs, 3, stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.skip(images))


class _Inception(Module):
    """Four branches side by side; the output has ``4 * width`` channels."""

    def __init__(self, nn: Any, inputs: int, width: int) -> None:
        super().__init__()
        narrow = max(8, width // 2)
        self.branches = nn.ModuleList(
            (
                _conv(nn, inputs, width, 1),
                nn.Sequential(_conv(nn, inputs, narrow, 1), _conv(nn, narrow, width, 3)),
                nn.Sequential(_conv(nn, inputs, narrow, 1), _conv(nn, narrow, width, 5)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(nn, inputs, width, 1)),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([branch(images) for branch in self.branches], dim=1)


def _lenet(nn: Any, channels: int, size: int, classes: int) -> Module:
    return nn.Sequential(
        _conv(nn, channels, 16, 5),
        nn.MaxPool2d(2),
        _conv(nn, 16, 32, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, 120),
        nn.ReLU(inplace=True),
        nn.Linear(120, 84),
        nn.ReLU(inplace=True),
        nn.Linear(84, classes),
    )


def _alexnet(nn: Any, channels: int, size: int, classes: int) -> Module:
    layers = [_conv(nn, channels, 32, 5), nn.MaxPool2d(2), _conv(nn, 32, 64), nn.MaxPool2d(2)]
    side = size // 4
    if side > 4:
        layers.append(nn.MaxPool2d(2))
        side //= 2
    return nn.Sequential(
        *layers,
        _conv(nn, 64, 96),
        _conv(nn, 96, 64),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64 * side**2, 256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(256, classes),
    )


def _vgg(nn: Any, channels: int, size: int, classes: int) -> Module:
    layers: list[Module] = []
    inputs = channels
    for width in (32, 64, 128):
        layers += [_conv(nn, inputs, width), _conv(nn, width, width), nn.MaxPool2d(2)]
        inputs = width
    head = (_GlobalMean(), nn.Linear(inputs, 128), nn.ReLU(inplace=True), nn.Linear(128, classes))
    return nn.Sequential(*layers, *head)


def _resnet(nn: Any, channels: int, size: int, classes: int) -> Module:
    layers: list[Module] = [_conv(nn, channels, 32)]
    inputs = 32
    for width, stride in ((32, 1), (64, 2), (128, 2)):
        layers += [_Residual(nn, inputs, width, stride), _Residual(nn, width, width, 1)]
        inputs = width
    return nn.Sequential(*layers, _GlobalMean(), nn.Linear(inputs, classes))


def _googlenet(nn: Any, channels: int, size: int, classes: int) -> Module:
    layers: list[Module] = [_conv(nn, channels, 32)]
    if size > 16:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers,
        _Inception(nn, 32, 16),
        _Inception(nn, 64, 24),
        nn.MaxPool2d(2),
        _Inception(nn, 96, 32),
        _GlobalMean(),
        nn.Dropout(0.2),
        nn.Linear(128, classes),
    )


_BUILDERS: dict[str, Callable[[Any, int, int, int], Module]] = {
    "lenet": _lenet,
    "alexnet": _alexnet,
    "vgg": _vgg,
    "resnet": _resnet,
    "googlenet": _googlenet,
}


def build(arch: str, channels: int, size: int, classes: int, nn: Any = torch.nn) -> Module:
    """Build a network for square images.

    Args:
        arch: ``"lenet"``, ``"alexnet"``, ``"vgg"``, ``"resnet"`` or ``"googlenet"``.
        channels: the channels C of an image.
        size: the width and height S of an image, in pixels, at least 8.
        classes: the number of classes K.
        nn: where the layers come from, ``torch.nn`` or ``braze.nn``.

    Returns:
        A module from (N, C, S, S) to logits (N, K), its weights from torch's global generator.

    Raises:
        ValueError: the architecture is unknown or the images are too small.
    """
    if arch not in _BUILDERS:
        raise ValueError(f"unknown architecture {arch!r}")
    if size < 8:
        raise ValueError(f"images of at least 8x8 pixels are needed, got {size}x{size}")
    return _BUILDERS[arch](nn, channels, size, classes)
