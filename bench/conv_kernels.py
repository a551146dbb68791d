"""braze's convolution kernels over ResNet-50's convolutions, 1x1 and 3x3, channels last, in 16 bits.

forward: the convolution, and the statistics of its result. "bn+relu+": of an input that comes through a batch
norm and a ReLU, which braze computes where it reads. backward: the gradients of weight and input, the latter
through the batch norm before, with its sums; where a 1x1 convolution's batch norm leads to another convolution,
the gradient behind that batch norm is given, of which braze makes its own where it reads.

``torch + norm`` is cuDNN's convolution and braze's batch norm, every tensor in memory, ``torch`` the same with
torch's batch norm; cuDNN takes what it measures to be the fastest. Floor: what braze's launches read and write,
each operand once.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from braze._native import _C
from braze.nn._activation import NUMBERS
from torch import Tensor

from . import conv_bytes
from .clock import Call
from .harness import DTYPES, OURS, Built, Case, Part, Setting, Suite, difference
from .resnet50 import Convolution, convolutions, flops_of, name_of
from .rows import Row, goal

BATCHES = (256, 32)
EPS = 1e-5
# Inputs, outputs, kernel and side of those that come first, and alone with --quick.
QUICK = frozenset(
    (
        (64, 64, 3, 56),
        (64, 256, 1, 56),
        (256, 64, 1, 56),
        (128, 512, 1, 28),
        (512, 128, 1, 28),
        (256, 1024, 1, 14),
    )
)
# Of the best of torch, on shapes that models are made of.
GOAL = 1.2
GOALS = QUICK | {(64, 64, 1, 56), (256, 128, 1, 56), (512, 256, 1, 28)}
aten = torch.ops.aten
_RELU, _NONE = (NUMBERS["relu"], 0.0), (NUMBERS["identity"], 0.0)
_NORM = (None, None, None, None, None, 0.1, EPS)
_THEIRS = "torch + norm"


def layers() -> Counter[Convolution]:
    """Those that the kernels take, and how many there are of each."""
    return Counter(replace(conv, projected=False) for conv in convolutions() if conv.kernel <= 3)


def is_implicit(conv: Convolution) -> bool:
    """Whether the gradient of its output is two tensors, of which who reads them makes it."""
    return conv.inner and conv.kernel == 1


class Contender(NamedTuple):
    """``common``: what can be compared, of what ``call`` returns."""

    call: Call
    common: Callable[[Any], list[Tensor]]


def _statistics(x: Tensor) -> Tensor:
    found: Tensor = _C.batch_norm_combine(_C.batch_norm_moments(x)[None], x, *_NORM)
    return found


def _row(stats: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps)."""
    return stats[0] + stats[1], stats[2]


def _tuned(call: Call) -> Call:
    """The call, in which cuDNN takes what it measured to be the fastest."""

    def run() -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return call()

    return run


@dataclass
class Problem:
    """One convolution and its tensors."""

    conv: Convolution
    dtype: torch.dtype
    batch: int
    device: str

    def __post_init__(self) -> None:
        conv, n = self.conv, self.batch
        torch.manual_seed(0)
        self.x = self._image(n, conv.inputs, conv.side, conv.side)
        window = (conv.kernel, conv.kernel)
        self.weight = self._image(conv.outputs, conv.inputs, *window) / (
            conv.inputs**0.5 * conv.kernel
        )
        self.stats = _statistics(self.x) if conv.normalised else None
        # Weights and biases of torch's batch norms, which sum no gradients without them.
        self.ones, self.zeros = (
            make(max(conv.inputs, conv.outputs), device=self.device)
            for make in (torch.ones, torch.zeros)
        )
        self.window = (conv.stride, conv.kernel // 2)
        # Of torch.conv2d and convolution_backward.
        self.geometry = ([conv.stride] * 2, [conv.kernel // 2] * 2, [1, 1])

    def _image(self, *shape: int) -> Tensor:
        x = torch.randn(shape, device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def _output(self) -> Tensor:
        return self._image(self.batch, self.conv.outputs, self.conv.out, self.conv.out)

    def applied(self) -> Tensor:
        """What is convolved, by braze's batch norm."""
        if self.stats is None:
            return self.x
        y: Tensor = _C.batch_norm_apply(self.x, self.stats, None, *_RELU)[0]
        return y

    def forward(self) -> dict[str, Contender]:
        x, weight, stats = self.x, self.weight, self.stats
        vectors = self.ones[: x.shape[1]], self.zeros[: x.shape[1]]

        def torchs() -> Any:
            y = x
            if stats is not None:
                y = aten.batch_norm_elemt(x, *vectors, *_row(stats), EPS).relu_()
            out = torch.conv2d(y, weight, None, *self.geometry)
            return out, aten.batch_norm_stats(out, EPS)

        def theirs() -> Any:
            out = torch.conv2d(self.applied(), weight, None, *self.geometry)
            return out, _C.batch_norm_moments(out)

        def ours() -> Any:
            return _C.conv_norm_forward(x, stats, *_RELU, weight, *self.window, *_NORM)

        def of_moments(found: Any) -> list[Tensor]:
            out, (mean, m2, count) = found
            return [out, mean, (m2 / count + EPS).rsqrt()]

        return {
            "torch": Contender(_tuned(torchs), lambda found: [found[0], *found[1]]),
            _THEIRS: Contender(_tuned(theirs), of_moments),
            OURS: Contender(ours, lambda found: [found[0], *_row(found[1])]),
        }

    def backward(self) -> dict[str, Contender]:
        conv, x, weight, stats = self.conv, self.x, self.weight, self.stats
        y, d = self.applied(), self._output()
        # The batch norm behind: its input, statistics and sums.
        behind: list[Any] = [None] * 3
        if is_implicit(conv):
            z = self._output()
            rows = _statistics(z)
            sums = _C.batch_norm_reduce(d, z, rows, None, None, *_NONE)
            count = z.numel() // conv.outputs
            means = rows[2] * sums / count
            on_input = -rows[2].square() * means[1]
            coefficients = torch.stack([rows[2], on_input, -means[0] - on_input * rows[1]])
            behind = [z, rows, coefficients]
            counts = torch.full((1,), count, dtype=torch.int32, device=self.device)

        def products(grad: Tensor) -> Any:
            fixed = (None, *self.geometry, False, [0, 0], 1, [True, True, False])
            return aten.convolution_backward(grad, y, weight, *fixed)[:2]

        def torchs() -> Any:
            grad = d
            if is_implicit(conv):
                means, ones = _row(rows), self.ones[: conv.outputs]
                grad = aten.batch_norm_backward_elemt(d, z, *means, ones, *sums, counts)
            dy, dw = products(grad)
            if stats is None:
                return dw, dy
            dy = aten.threshold_backward(dy, y, 0)
            rest = (self.ones[: conv.inputs], True, True, True)
            return dw, dy, aten.batch_norm_backward_reduce(dy, x, *_row(stats), *rest)

        def theirs() -> Any:
            grad = _C.batch_norm_input_grad(d, *behind) if is_implicit(conv) else d
            dy, dw = products(grad)
            if stats is None:
                return dw, dy
            return dw, dy, _C.batch_norm_reduce(dy, x, stats, None, None, *_RELU)

        def ours() -> Any:
            grad = (d, *behind)
            kernel, side = conv.kernel, [conv.side] * 2
            dw = _C.conv_norm_weight_grad(x, stats, *_RELU, *grad, kernel, *self.window, False)
            before = (None, None, None) if stats is None else (x, stats, None)
            dx, _, *vectors = _C.conv_norm_input_grad(
                *grad, weight, *before, *_RELU, side, *self.window
            )
            return dw, dx, *(() if stats is None else vectors)

        def of_sums(found: Any) -> list[Tensor]:
            dw, dy, *more = found
            if stats is None:
                return [dw, dy]
            (grad, grad_input), invstd = more[0], stats[2]
            return [dw, dy * (y > 0), grad_input * invstd, grad]

        return {
            "torch": Contender(
                _tuned(torchs), lambda found: [*found[:2], *(v for f in found[2:] for v in f[2:])]
            ),
            _THEIRS: Contender(_tuned(theirs), of_sums),
            OURS: Contender(ours, list),
        }


def build(conv: Convolution, dtype: str, batch: int, direction: str, setting: Setting) -> Built:
    problem = Problem(conv, DTYPES[dtype], batch, setting.device)
    contenders: dict[str, Contender] = getattr(problem, direction)()
    if setting.device == "cpu":
        del contenders["torch"]  # these steps of its batch norm are CUDA's alone

    def check() -> float:
        found = {name: one.common(one.call()) for name, one in contenders.items()}
        return max(difference(found[OURS], found[name]) for name in found if name != OURS)

    def maker(name: str) -> Callable[[], Call]:
        return lambda: contenders[name].call

    return Built({name: maker(name) for name in contenders}, check)


def _stands_in(conv: Convolution, shapes: frozenset[tuple[int, int, int, int]]) -> bool:
    key = (conv.inputs, conv.outputs, conv.kernel, conv.side)
    return conv.place != "shortcut" and key in shapes


def _goals(row: Row) -> list[dict[str, Any]]:
    ratio = row["ratio"]
    return [goal(f"{row['name']}: at least {GOAL} x the best of torch", ratio, ratio >= GOAL)]


def _tell(flops: int, setting: Setting, row: Row) -> None:
    rate = flops / row["contenders"][OURS][row["figure"]]["median_us"] / 1e6
    row["tflop_s"] = float(f"{rate:.4g}")


def _case(conv: Convolution, count: int, dtype: str, batch: int, forward: bool) -> Case:
    direction = "forward" if forward else "backward"
    floor = conv_bytes.forward(conv, batch)
    if not forward:
        floor = conv_bytes.gradients(conv, batch, conv.normalised, is_implicit(conv))
    images = conv_bytes.inputs_of(conv, batch) + conv_bytes.outputs_of(conv, batch)
    before = "bn+relu+" if conv.normalised else ""
    # Those that a training step at full size spends its time with.
    main = (dtype, batch) == ("bf16", BATCHES[0])
    return Case(
        f"kernels {before}{name_of(conv)} / {direction} {dtype} N={batch}",
        {"dtype": dtype, "layout": "NHWC", "direction": direction, "batch": batch, "count": count},
        (Part(partial(build, conv, dtype, batch, direction), floor, needs=10 * 2 * images),),
        main and _stands_in(conv, QUICK),
        _goals if main and _stands_in(conv, GOALS) else None,
        more=partial(_tell, flops_of(conv, batch) * (1 if forward else 2)),
    )


def cases(arguments: argparse.Namespace) -> list[Case]:
    """None on the CPU, where the operators are a reference, but for a rehearsal with ``--batch``."""
    batch = getattr(arguments, "batch", None)
    if batch is None and arguments.device == "cpu":
        return []
    found = [
        _case(conv, count, dtype, size, forward)
        for size in (BATCHES if batch is None else (batch,))
        for dtype in ("bf16", "fp16")
        for conv, count in layers().items()
        for forward in (True, False)
    ]
    return sorted(found, key=lambda case: not case.quick)


SUITE = Suite("conv kernels", cases, 0.3, {"cpu": "warm", "cuda": "cold"}, ("warm", "cold"))
