"""Small-image variants of five well-known families of convolutional networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    # No bias: batch norm removes it, and Adam would turn its rounding noise into steps.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _GlobalMean(nn.Module):
    """(N, C, H, W) to (N, C); unlike adaptive pooling, deterministic on every device."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, 3, stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.skip(images))


class _Inception(nn.Module):
    """Four branches side by side; the output has ``4 * width`` channels."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        narrow = max(8, width // 2)
        self.branches = nn.ModuleList(
            (
                _conv(inputs, width, 1),
                nn.Sequential(_conv(inputs, narrow, 1), _conv(narrow, width, 3)),
                nn.Sequential(_conv(inputs, narrow, 1), _conv(narrow, width, 5)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(inputs, width, 1)),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([branch(images) for branch in self.branches], dim=1)


def _lenet(channels: int, size: int, classes: int) -> nn.Module:
    return nn.Sequential(
        _conv(channels, 16, 5),
        nn.MaxPool2d(2),
        _conv(16, 32, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, 120),
        nn.ReLU(inplace=True),
        nn.Linear(120, 84),
        nn.ReLU(inplace=True),
        nn.Linear(84, classes),
    )


def _alexnet(channels: int, size: int, classes: int) -> nn.Module:
    layers = [_conv(channels, 32, 5), nn.MaxPool2d(2), _conv(32, 64), nn.MaxPool2d(2)]
    side = size // 4
    if side > 4:
        layers.append(nn.MaxPool2d(2))
        side //= 2
    return nn.Sequential(
        *layers,
        _conv(64, 96),
        _conv(96, 64),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64 * side**2, 256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(256, classes),
    )


def _vgg(channels: int, size: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = channels
    for width in (32, 64, 128):
        layers += [_conv(inputs, width), _conv(width, width), nn.MaxPool2d(2)]
        inputs = width
    head = (_GlobalMean(), nn.Linear(inputs, 128), nn.ReLU(inplace=True), nn.Linear(128, classes))
    return nn.Sequential(*layers, *head)


def _resnet(channels: int, size: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = [_conv(channels, 32)]
    inputs = 32
    for width, stride in ((32, 1), (64, 2), (128, 2)):
        layers += [_Residual(inputs, width, stride), _Residual(width, width, 1)]
        inputs = width
    return nn.Sequential(*layers, _GlobalMean(), nn.Linear(inputs, classes))


def _googlenet(channels: int, size: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = [_conv(channels, 32)]
    if size > 16:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers,
        _Inception(32, 16),
        _Inception(64, 24),
        nn.MaxPool2d(2),
        _Inception(96, 32),
        _GlobalMean(),
        nn.Dropout(0.2),
        nn.Linear(128, classes),
    )


_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lenet": _lenet,
    "alexnet": _alexnet,
    "vgg": _vgg,
    "resnet": _resnet,
    "googlenet": _googlenet,
}


def build(arch: str, channels: int, size: int, classes: int) -> nn.Module:
    """Build a network for square images.

    Args:
        arch: ``"lenet"``, ``"alexnet"``, ``"vgg"``, ``"resnet"`` or ``"googlenet"``.
        channels: the channels C of an image.
        size: the width and height S of an image, in pixels, at least 8.
        classes: the number of classes K.

    Returns:
        A module from (N, C, S, S) to logits (N, K), its weights from torch's global generator.

    Raises:
        ValueError: the architecture is unknown or the images are too small.
    """
    if arch not in _BUILDERS:
        raise ValueError(f"unknown architecture {arch!r}")
    if size < 8:
        raise ValueError(f"images of at least 8x8 pixels are needed, got {size}x{size}")
    return _BUILDERS[arch](channels, size, classes)
