"""Small-image variants of five well-known families of convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

# conv: channels, kernel; with batch norm and ReLU. pool: halves images larger than that. residual: channels,
# stride. inception: a quarter of its channels. A linear layer of the classes follows.
ARCHITECTURES = {
    "lenet": "conv 16 5, pool 1, conv 32 5, pool 1, flatten, linear 120, linear 84",
    "alexnet": "conv 32 5, pool 1, conv 64 3, pool 1, pool 4, conv 96 3, conv 64 3, flatten, dropout 0.5, "
    "linear 256, dropout 0.5",
    "vgg": "conv 32 3, conv 32 3, pool 1, conv 64 3, conv 64 3, pool 1, conv 128 3, conv 128 3, pool 1, mean, "
    "linear 128",
    "resnet": "conv 32 3, residual 32 1, residual 32 1, residual 64 2, residual 64 1, residual 128 2, "
    "residual 128 1, mean",
    "googlenet": "conv 32 3, pool 16, inception 16, inception 24, pool 1, inception 32, mean, dropout 0.2",
}


def _conv(nn: Any, inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[Module]:
    # No bias: batch norm removes it, and Adam would turn its rounding noise into steps.
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class _GlobalMean(Module):
    """(N, C, H, W) to (N, C); unlike adaptive pooling, deterministic on every device."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class _Residual(Module):
    def __init__(self, nn: Any, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, last = _conv(nn, inputs, outputs, 3, stride), _conv(nn, outputs, outputs, 3)[:2]
        self.body = nn.Sequential(*first, *last)
        self.skip: Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(*_conv(nn, inputs, outputs, 1, stride)[:2])

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.skip(images))


class _Inception(Module):
    """Four branches side by side."""

    def __init__(self, nn: Any, inputs: int, width: int) -> None:
        super().__init__()
        narrow = max(8, width // 2)
        branches = (
            _conv(nn, inputs, width, 1),
            _conv(nn, inputs, narrow, 1) + _conv(nn, narrow, width, 3),
            _conv(nn, inputs, narrow, 1) + _conv(nn, narrow, width, 5),
            [nn.MaxPool2d(3, stride=1, padding=1), *_conv(nn, inputs, width, 1)],
        )
        self.branches = nn.ModuleList(nn.Sequential(*layers) for layers in branches)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([branch(images) for branch in self.branches], dim=1)


def build(arch: str, channels: int, size: int, classes: int, nn: Any = torch.nn) -> Module:
    """A network from images (N, C, S, S), S at least 8, to logits (N, K).

    Its layers are of ``nn``, which is ``torch.nn`` or ``braze.nn``, its weights from torch's global generator.
    """
    layers: list[Module] = []
    width, side = channels, size
    for kind, *numbers in map(str.split, ARCHITECTURES[arch].split(", ")):
        first, second = map(float, [*numbers, "0", "0"][:2])
        inputs, wanted = width, int(first)
        if kind in ("conv", "residual", "linear"):
            width = wanted
        if kind == "conv":
            layers += _conv(nn, inputs, width, int(second))
        elif kind == "residual":
            layers.append(_Residual(nn, inputs, width, int(second)))
        elif kind == "inception":
            layers.append(_Inception(nn, inputs, wanted))
            width = 4 * wanted
        elif kind == "linear":
            layers += [nn.Linear(inputs, width), nn.ReLU(inplace=True)]
        elif kind == "dropout":
            layers.append(nn.Dropout(first))
        elif kind == "mean":
            layers.append(_GlobalMean())
        elif kind == "flatten":
            layers.append(nn.Flatten())
            width *= side**2
        elif side > wanted:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    model: Module = nn.Sequential(*layers, nn.Linear(width, classes))
    return model
