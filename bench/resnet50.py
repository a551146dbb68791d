"""ResNet-50 for 224 x 224 images: its convolutions, from which its parameters and batch norms follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Convolution:
    """``side``: pixels of the input's side. ``place``: in a bottleneck "first", "middle", "last" or, of the
    projection beside them, "shortcut"; else "". ``projected``: the bottleneck has a projection.

    Each is followed by a batch norm, and but for "shortcut" by a ReLU.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    side: int
    place: str = ""
    projected: bool = False

    @property
    def out(self) -> int:
        """Pixels of the output's side."""
        return -(-self.side // self.stride)

    @property
    def joins(self) -> bool:
        """Whether a residual is added to its batch norm's result."""
        return self.place == "last"

    @property
    def normalised(self) -> bool:
        """Whether its input is a batch norm's and a ReLU's result that nobody else reads."""
        return self.place in ("middle", "last")

    @property
    def inner(self) -> bool:
        """Whether the result of its batch norm and ReLU is read by one convolution alone."""
        return self.place in ("first", "middle")


def flops_of(conv: Convolution, batch: int) -> int:
    """Of one forward."""
    return 2 * batch * conv.out**2 * conv.outputs * conv.inputs * conv.kernel**2


def name_of(conv: Convolution) -> str:
    stride = f"/{conv.stride}" if conv.stride > 1 else ""
    return f"conv {conv.inputs}-{conv.outputs} {conv.kernel}x{conv.kernel}{stride} {conv.side}"


def convolutions() -> Iterator[Convolution]:
    """All 53, in the model's order, each followed by a batch norm."""
    yield Convolution(3, 64, 7, 2, 224)
    inputs, side = 64, 56
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            projected = block == 0
            stride = 2 if projected and width > 64 else 1
            out, outputs = side // stride, 4 * width
            yield Convolution(inputs, width, 1, 1, side, "first", projected)
            yield Convolution(width, width, 3, stride, side, "middle", projected)
            yield Convolution(width, outputs, 1, 1, out, "last", projected)
            if projected:
                yield Convolution(inputs, outputs, 1, stride, side, "shortcut", projected)
            inputs, side = outputs, out
