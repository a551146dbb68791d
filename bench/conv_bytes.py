"""What convolutions, and the batch norms and ReLUs between them, read, write and save: from shapes alone.

Bytes that launches ask for, whatever caches hold: each reads its operands once and writes its result once.
Activations and weights are in 16 bits; vectors of one number a channel are not counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .resnet50 import Convolution, convolutions

SIZE = 2
WAYS = {
    "torch": "torch eager",
    "cudnn": "cuDNN, braze's batch norm",
    "braze": "braze's kernels",
}
# One bit an element, of 16: where the sum at a join is positive.
_MASK = 1 / 16
_NEXT = {"first": "middle", "middle": "last"}


class Traffic(NamedTuple):
    """Bytes read and written forward and backward, and kept from the one to the other."""

    forward: float = 0
    backward: float = 0
    saved: float = 0

    def plus(self, other: Traffic, factor: float = 1) -> Traffic:
        return Traffic(*(a + factor * b for a, b in zip(self, other, strict=True)))


def inputs_of(conv: Convolution, batch: int) -> int:
    """Elements of its input."""
    return batch * conv.inputs * conv.side**2


def outputs_of(conv: Convolution, batch: int) -> int:
    return batch * conv.outputs * conv.out**2


def _operands(conv: Convolution, batch: int) -> int:
    """Elements of its weight and of what it needs of its input: not what a stride steps over."""
    side = conv.out if conv.kernel == 1 else conv.side
    return conv.inputs * (conv.outputs * conv.kernel**2 + batch * side**2)


def forward(conv: Convolution, batch: int) -> int:
    """Bytes of its launch."""
    return SIZE * (_operands(conv, batch) + outputs_of(conv, batch))


def gradients(
    conv: Convolution, batch: int, through: bool, implicit: bool, both: bool = True
) -> int:
    """Bytes of the launches for the weight's gradient and, with ``both``, the input's. ``through``: the latter
    goes through the batch norm before; ``implicit``: both make the output's of two tensors."""
    inputs, grad = inputs_of(conv, batch), outputs_of(conv, batch) * (1 + implicit)
    weight = conv.outputs * conv.inputs * conv.kernel**2
    of_input = (grad + weight + inputs * (1 + through)) if both else 0
    return SIZE * (_operands(conv, batch) + grad + of_input)


def _is_own(conv: Convolution, way: str) -> bool:
    """Whether braze's kernels compute it in a model that braze.fuse has changed: not where two batch norms
    join."""
    return way == "braze" and (conv.inner or (conv.joins and not conv.projected))


def _hands_on(conv: Convolution, way: str) -> bool:
    """Whether the batch norm after it is in its kernels and those of the next one."""
    if not conv.inner:
        return False
    return _is_own(conv, way) and _is_own(replace(conv, place=_NEXT[conv.place]), way)


def convolution(conv: Convolution, way: str, batch: int) -> Traffic:
    """Of its launches. It saves its input, unless another one does or its kernels make it anew."""
    through = conv.normalised and _is_own(conv, way)
    implicit = conv.kernel == 1 and _hands_on(conv, way)
    kept = 0 if through or conv.place == "shortcut" else SIZE * inputs_of(conv, batch)
    # Nobody wants the gradient of an image.
    both = conv.inputs != 3
    return Traffic(forward(conv, batch), gradients(conv, batch, through, implicit, both), kept)


def norm(conv: Convolution, way: str, batch: int, users: int = 2) -> Traffic:
    """Of the launches for the batch norm, the ReLU and the join after it. ``users``: gradients that a join's
    result gets."""
    eager = way == "torch"
    statistics = 0 if _is_own(conv, way) else 1
    # Tensors of the output's size, that are read or written.
    if _hands_on(conv, way):
        passes = Traffic(0, 0 if conv.kernel == 1 else 3, 1)
    elif conv.joins and eager:
        # Statistics, batch norm, sum, ReLU; sum of gradients, ReLU, batch norm. What ReLU saves, a convolution
        # that reads it saves as well.
        passes = Traffic(1 + 2 + 3 + 2, 3 * (users - 1) + 3 + 2 + 3, 1 + (users == 1))
    elif conv.joins:
        # Each pass backward reads all gradients, and what it normalises or normalised.
        reads = users + 1 + conv.projected + _MASK
        passes = Traffic(statistics + 3 + _MASK, 2 * reads + 2, 1 + _MASK)
    elif conv.place == "shortcut" and not eager:
        passes = Traffic(statistics, 0, 1)  # the rest is the join's
    else:
        relu = eager and conv.place != "shortcut"
        passes = Traffic(statistics + 2 + 2 * relu, 2 + 3 + 3 * relu, 1)
    return Traffic().plus(passes, SIZE * outputs_of(conv, batch))


def between(kernel: int, way: str) -> Traffic:
    """Bytes for an element of the tensor between two convolutions, beside what cuDNN's convolutions read and
    write. ``kernel``: of the first one, on which it depends what braze can do."""
    first = Convolution(64, 64, kernel, 1, 56, "first")
    second = replace(first, kernel=1, place="last")
    found = norm(first, way, 1)
    for conv in (first, second):
        found = found.plus(convolution(conv, way, 1)).plus(convolution(conv, "cudnn", 1), -1)
    kept = found.saved + convolution(second, "cudnn", 1).saved
    return Traffic(*(v / outputs_of(first, 1) for v in (found.forward, found.backward, kept)))


def resnet50(way: str, batch: int) -> Traffic:
    """A training step's convolutions, batch norms, ReLUs and joins; without pools and classifier."""
    found, every = Traffic(), list(convolutions())
    for conv in every:
        users = 1 if conv is every[-1] else 2
        found = found.plus(convolution(conv, way, batch)).plus(norm(conv, way, batch, users))
    return found


def lines(batch: int) -> list[str]:
    """For a person."""
    text = [
        "Bytes for an element of the tensor between two convolutions, beside what they read and write of it:",
        f"{'':<42}{'forward':>10}{'backward':>10}{'saved':>10}",
    ]
    for way, title in WAYS.items():
        for kernel in (1, 3) if way == "braze" else (1,):
            name = f"{title}, the first one {kernel}x{kernel}" if way == "braze" else title
            text.append(
                f"{name:<42}" + "".join(f"{value:>10.4g}" for value in between(kernel, way))
            )
    text += [
        f"ResNet-50, a training step of {batch} images, GB; saved, MB for an image:",
        f"{'':<42}{'forward':>10}{'backward':>10}{'both':>10}{'saved':>10}",
    ]
    for way, title in WAYS.items():
        step = resnet50(way, batch)
        figures = (step.forward, step.backward, step.forward + step.backward)
        gigabytes = "".join(f"{value / 1e9:>10.1f}" for value in figures)
        text.append(f"{title:<42}{gigabytes}{step.saved / batch / 1e6:>10.1f}")
    return text
