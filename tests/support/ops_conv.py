"""The entries of the table for convolutions between batch norms, and arguments for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import batch_norm_steps_reference as steps
import torch
import torch.nn.functional as F
from activations import NAMES
from batch_norm_reference import Config, channel_args
from op_table import BF16, FP16, FP32, Args, Op, Sample, Wrong, values
from ops_batch_norm import changed
from ops_batch_norm_steps import stats_like
from torch import Tensor

LEAKY = 0.25


@dataclass(frozen=True)
class Problem:
    """A convolution of an image [n, c, h, w] to k channels."""

    n: int = 2
    c: int = 8
    k: int = 16
    h: int = 5
    w: int = 4
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    activation: str = ""  # of the batch norm before it; none: there is no batch norm
    implicit: bool = False  # the gradient of its output is that of a batch norm's input
    wide: bool = True  # vectors and weights are fp32

    @property
    def name(self) -> str:
        size = f"{self.n}x{self.c}-{self.k}x{self.h}x{self.w}"
        window = f"k{self.kernel}s{self.stride}p{self.padding}"
        words = [size, window, self.activation, "implicit" * self.implicit, "wide" * self.wide]
        return "-".join(filter(None, words))

    @property
    def output(self) -> tuple[int, int, int, int]:
        height, width = (
            (size + 2 * self.padding - self.kernel) // self.stride + 1 for size in (self.h, self.w)
        )
        return self.n, self.k, height, width

    @property
    def before(self) -> Args:
        """Number and parameter of the activation."""
        return [NAMES.index(self.activation or "identity"), LEAKY]


def image(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return values(shape, seed, dtype).contiguous(memory_format=torch.channels_last)


def input_of(p: Problem, dtype: torch.dtype) -> Args:
    """input, input_stats."""
    x = image((p.n, p.c, p.h, p.w), 1, dtype)
    return [x, stats_like(x) if p.activation else None]


def weight_of(p: Problem, dtype: torch.dtype) -> Tensor:
    return values((p.k, p.c, p.kernel, p.kernel), 2, FP32 if p.wide else dtype) / p.kernel


def gradient_of(p: Problem, dtype: torch.dtype) -> Args:
    """grad, grad_input, grad_stats, coefficients."""
    grad = image(p.output, 3, dtype)
    if not p.implicit:
        return [grad, None, None, None]
    x = image(p.output, 4, dtype)
    return [grad, x, stats_like(x, 50), values((3, p.k), 60) * 0.3]


def forward_args(p: Problem, dtype: torch.dtype) -> Args:
    norm = Config((1, p.k), wide=p.wide)
    return [
        *input_of(p, dtype),
        *p.before,
        weight_of(p, dtype),
        p.stride,
        p.padding,
        *channel_args(norm, dtype, 10),
        0.3,
        1e-3,
    ]


def input_grad_args(p: Problem, dtype: torch.dtype) -> Args:
    x, stats = input_of(p, dtype)
    norm_weight = values((p.c,), 5, FP32 if p.wide else dtype)
    return [
        *gradient_of(p, dtype),
        weight_of(p, dtype),
        *([x, stats, norm_weight] if p.activation else [None] * 3),
        *p.before,
        [p.h, p.w],
        p.stride,
        p.padding,
    ]


def weight_grad_args(p: Problem, dtype: torch.dtype) -> Args:
    rest = [p.kernel, p.stride, p.padding, p.wide]
    return [*input_of(p, dtype), *p.before, *gradient_of(p, dtype), *rest]


# ------------------------------------------------------------- composites


def convolved(x: Tensor, stats: Tensor | None, activation: int, parameter: float) -> Tensor:
    return x if stats is None else steps.apply(x, stats, None, activation, parameter)


def output_gradient(
    grad: Tensor, x: Tensor | None, stats: Tensor | None, coefficients: Tensor | None
) -> Tensor:
    if x is None or stats is None or coefficients is None:
        return grad
    return steps.input_grad(grad, x, stats, coefficients)


def forward(*args: Any) -> list[Tensor]:
    """The output, and its comparable statistics."""
    x, stats, activation, parameter, weight, stride, padding = args[:7]
    channels, momentum, eps = list(args[7:12]), *args[12:]
    y = F.conv2d(
        convolved(x, stats, activation, parameter), weight.to(x.dtype), None, stride, padding
    )
    if y.numel() == 0:
        channels[4].add_(1)
    else:
        steps.reference.normalize(y, *channels, momentum, eps, True)
    return [y, *steps.stats_of(y, channels, True, eps)]


def input_grad(
    grad: Tensor,
    grad_input: Tensor | None,
    grad_stats: Tensor | None,
    coefficients: Tensor | None,
    weight: Tensor,
    x: Tensor | None,
    stats: Tensor | None,
    norm_weight: Tensor | None,
    activation: int,
    parameter: float,
    size: list[int],
    stride: int,
    padding: int,
) -> list[Tensor]:
    dz = output_gradient(grad, grad_input, grad_stats, coefficients)
    shape = (grad.shape[0], weight.shape[1], *size)
    dy = torch.nn.grad.conv2d_input(shape, weight.to(dz.dtype), dz, stride, padding)
    if x is None or stats is None or norm_weight is None:
        empty = grad.new_empty(0, dtype=steps.arithmetic(grad.dtype))
        return [dy, empty.view(0, 0), empty, empty]
    d = steps.d_of(dy, steps.z_of(x, stats), None, x, activation, parameter).to(x.dtype)
    sums = steps.reduce(d, x, stats, None, None, NAMES.index("identity"), 0.0)
    grad_sum, grad_input_sum = sums
    _, low, invstd, scale, _ = stats
    count = max(x.numel() // x.shape[1], 1)
    on_input = -scale * invstd.square() * grad_input_sum / count
    rows = torch.stack([scale, on_input, -on_input * low - scale * grad_sum / count])
    if x.numel() == 0:
        rows.zero_()
    dtype = norm_weight.dtype
    return [d, rows, (grad_input_sum * invstd).to(dtype), grad_sum.to(dtype)]


def weight_grad(
    x: Tensor,
    stats: Tensor | None,
    activation: int,
    parameter: float,
    grad: Tensor,
    grad_input: Tensor | None,
    grad_stats: Tensor | None,
    coefficients: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    wide: bool,
) -> Tensor:
    y = convolved(x, stats, activation, parameter)
    dz = output_gradient(grad, grad_input, grad_stats, coefficients)
    shape = (grad.shape[1], x.shape[1], kernel, kernel)
    if x.numel() == 0:
        return y.new_zeros(shape, dtype=FP32 if wide else x.dtype)
    dw = torch.nn.grad.conv2d_weight(y, shape, dz, stride, padding)
    return dw.to(FP32) if wide else dw


# ------------------------------------------------------------ the entries

PROBLEMS = (
    Problem(),
    Problem(activation="relu", implicit=True, kernel=1, padding=0),
    Problem(activation="leaky_relu", stride=2, h=7, wide=False),
    Problem(activation="relu6", implicit=True, k=24, n=1),
    Problem(activation="identity", kernel=1, padding=1, stride=2),
    Problem(implicit=True, padding=0, c=24, k=8),
    Problem(n=0, activation="relu"),
)
SMALL = Problem(activation="relu", n=1, h=3, w=3, c=8, k=8)


def samples(make: Callable[[Problem, torch.dtype], Args]) -> tuple[Sample, ...]:
    return tuple(Sample(p.name, lambda dtype, p=p: make(p, dtype)) for p in PROBLEMS)


def wrong(
    make: Callable[[Problem, torch.dtype], Args], rows: tuple[tuple[str, int, Any, Any, str], ...]
) -> tuple[Wrong, ...]:
    """(name, position, value, error, words)."""

    def one(name: str, at: int, value: Any, error: type[Exception], match: str) -> Wrong:
        def args() -> Args:
            return changed(make(SMALL, BF16), **{f"_{at}": value() if callable(value) else value})

        return Wrong(name, args, error, match)

    return tuple(one(*row) for row in rows)


def half(*shape: int) -> Callable[[], Tensor]:
    return lambda: values(shape, 1, BF16)


CONV_OPS = (
    Op(
        name="conv_norm_forward",
        samples=samples(forward_args),
        composite=forward,
        activations=(0, 4),
        mutated=(9, 10, 11),
        dtypes=(BF16, FP16),
        composed=True,
        view=lambda out: [out[0], *steps.comparable(out[1])],
        wrong=wrong(
            forward_args,
            (
                ("fp32", 0, lambda: values((1, 8, 3, 3), 1), TypeError, "input must be bfloat16"),
                ("3-d", 0, half(8, 3, 3), ValueError, "input must have 4 dimensions"),
                ("channels", 0, half(1, 12, 3, 3), ValueError, "conv_weight must have input's 12"),
                ("size", 0, half(1, 8, 0, 3), ValueError, "smaller than the kernel"),
                ("stats", 1, lambda: values((4, 8), 1), ValueError, "input_stats must be"),
                ("silu", 2, NAMES.index("silu"), ValueError, "activation must be identity, relu"),
                ("activation", 2, len(NAMES), ValueError, "activation is number"),
                ("oblong", 4, half(8, 8, 3, 1), ValueError, "conv_weight must be"),
                ("5x5", 4, half(8, 8, 5, 5), ValueError, "kernel must be 1x1 or 3x3"),
                ("12", 4, half(12, 8, 3, 3), ValueError, "multiples of 8"),
                ("stride", 5, 3, ValueError, "stride must be 1 or 2"),
                ("padding", 6, 4, ValueError, "padding must be between 0 and 3"),
                ("bias", 8, lambda: values((9,), 1), ValueError, "bias must have one value"),
            ),
        ),
    ),
    Op(
        name="conv_norm_input_grad",
        samples=samples(input_grad_args),
        composite=input_grad,
        activations=(0, 1, 4, 5),
        dtypes=(BF16, FP16),
        composed=True,
        wrong=wrong(
            input_grad_args,
            (
                ("grad", 0, half(1, 8, 3, 4), ValueError, "grad must have the output's shape"),
                ("alone", 3, lambda: values((3, 8), 1), ValueError, "must be given together"),
                ("input", 5, half(1, 8, 3, 4), ValueError, "input must have the result's shape"),
                ("without", 6, None, ValueError, "input and input_stats must be given"),
                ("size", 10, [3, 4], ValueError, "grad must have the output's shape"),
            ),
        ),
    ),
    Op(
        name="conv_norm_weight_grad",
        samples=samples(weight_grad_args),
        composite=weight_grad,
        activations=(0, 4, 5),
        dtypes=(BF16, FP16),
        composed=True,
        wrong=wrong(
            weight_grad_args,
            (
                ("dtype", 4, lambda: values((1, 8, 3, 3), 1, FP16), TypeError, "grad must have"),
                ("grad", 4, half(1, 8, 2, 3), ValueError, "grad must have the output's shape"),
                ("kernel", 8, 2, ValueError, "kernel must be 1x1 or 3x3"),
            ),
        ),
    ),
)
