"""ResNet-50 for 224 x 224 images: its convolutions, from which its parameters and batch norms follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Convolution:
    """``side``: pixels of the input's side. ``joins``: a residual is added to its batch norm's result."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    side: int
    joins: bool = False

    @property
    def out(self) -> int:
        """Pixels of the output's side."""
        return -(-self.side // self.stride)


def convolutions() -> Iterator[Convolution]:
    """All 53, in the model's order, each followed by a batch norm."""
    yield Convolution(3, 64, 7, 2, 224)
    inputs, side = 64, 56
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            yield Convolution(inputs, width, 1, 1, side)
            yield Convolution(width, width, 3, stride, side)
            yield Convolution(width, 4 * width, 1, 1, side // stride, joins=True)
            if block == 0:  # the shortcut's projection
                yield Convolution(inputs, 4 * width, 1, stride, side)
            inputs, side = 4 * width, side // stride
