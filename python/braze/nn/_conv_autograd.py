"""Convolutions and batch norms in a row for autograd, where no activation between them is ever in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from braze._native import _C
from braze.nn._activation import ACTIVATIONS, NUMBERS
from braze.nn._route import Norm

__all__ = ["Call", "ConvNorms", "Step", "Window"]

_CURVED = frozenset(name for name, slopes in _C.ACTIVATION_SLOPES.items() if slopes == "curved")


class Window(NamedTuple):
    """Of a convolution."""

    kernel: int
    stride: int
    padding: int


class Step(NamedTuple):
    """A batch norm with the batch's statistics, and the activation after it."""

    norm: Norm
    activation: str
    parameter: float

    @property
    def act(self) -> tuple[int, float]:
        """The activation as the operators take it."""
        return NUMBERS[self.activation], self.parameter


_NONE = Step(Norm(), "identity", 0.0)


class Call(NamedTuple):
    """What a chain computes, beside its tensors."""

    head: Step | None  # what the input goes through before the first convolution
    windows: tuple[Window, ...]
    steps: tuple[Step, ...]  # after each convolution
    fork: bool


class ConvNorms(torch.autograd.Function):
    """``apply(call, x, residual, *weights, *vectors)``: x_0 = x, x_i = conv_i(act_{i-1}(bn_{i-1}(x_{i-1}))) and
    y = act_n(bn_n(x_n) + residual), once, or twice with ``fork``. ``vectors``: weight and bias of each batch
    norm, from the one of ``call.head`` on, whose are None without one; then conv_1 reads x itself.

    One launch for each convolution forward, with the batch norm before it and the statistics of the one after.
    Saved are the x_i (two bytes an element), statistics (20 bytes a channel), one bit an element of y if there
    is a residual, and the weights in 16 bits if they are others. act(bn(x_i)) is never written, nor, where
    conv_i is 1x1 and i < n, the gradient of x_i: the kernels of conv_i's gradients make it where they read it,
    of x_i and the gradient before bn_i.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, residual: Tensor | None, *parameters: Any) -> Any:
        count = len(call.windows)
        weights = [
            w.to(x.dtype).contiguous(memory_format=torch.channels_last) for w in parameters[:count]
        ]
        before, stats = call.head or _NONE, None
        if call.head is not None:
            stats = _C.batch_norm_combine(_C.batch_norm_moments(x)[None], x, *before.norm)
        images, rows = [x], [stats]
        for weight, window, step in zip(weights, call.windows, call.steps, strict=True):
            x, stats = _C.conv_norm_forward(
                x, stats, *before.act, weight, window.stride, window.padding, *step.norm
            )
            images.append(x)
            rows.append(stats)
            before = step
        y, mask = _C.batch_norm_apply(x, stats, residual, *before.act)
        kept = residual if before.activation in _CURVED else None
        ctx.save_for_backward(*images, *rows, *weights, *parameters, kept, mask)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.joined = call, residual is not None
        return (y, y.view_as(y)) if call.fork else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = _Saved(ctx)
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return _differentiable(saved, sum(given[1:], given[0]))
        return _gradients(saved, given[0], given[1] if len(given) == 2 else None)


class _Saved:
    """What the backward pass has: images and rows from the input on, the rest by batch norm or convolution."""

    def __init__(self, ctx: Any) -> None:
        self.call: Call = ctx.call
        count = len(self.call.windows)
        tensors = list(ctx.saved_tensors)

        def take(number: int) -> list[Any]:
            taken = tensors[:number]
            del tensors[:number]
            return taken

        self.images, self.rows = take(count + 1), take(count + 1)
        self.weights, self.parameters, self.vectors = take(count), take(count), take(2 * count + 2)
        self.residual, mask = tensors
        self.mask = mask if mask.numel() else None
        self.joined: bool = ctx.joined
        self.steps = (self.call.head or _NONE, *self.call.steps)
        _, self.want_input, self.want_residual, *wanted = ctx.needs_input_grad
        self.want_weights, self.want_vectors = wanted[:count], wanted[count:]

    def wants_image(self, i: int) -> bool:
        """Whether anything is wanted that the gradient of image ``i`` leads to."""
        return self.want_input or any(self.want_weights[:i]) or any(self.want_vectors[: 2 * i])

    def result(
        self, x: Any, residual: Any, weights: list[Any], vectors: list[Any]
    ) -> tuple[Tensor | None, ...]:
        """With gradients of the vectors in their own dtypes."""
        for i, vector in enumerate(self.vectors):
            if vectors[i] is not None:
                vectors[i] = vectors[i].to(vector.dtype) if self.want_vectors[i] else None
        return None, x, residual, *weights, *vectors


def _gradients(s: _Saved, dy: Tensor, dy2: Tensor | None) -> tuple[Tensor | None, ...]:
    count = len(s.weights)
    dw: list[Any] = [None] * count
    dv: list[Any] = [None] * len(s.vectors)
    dx = residual = None
    last, want_last = s.steps[count], s.want_vectors[2 * count :]
    # The residual's gradient is dy itself where nothing stands between them.
    passes = s.want_residual and last.activation == "identity" and dy2 is None
    wanted = [s.wants_image(count), *want_last, *[False] * 3, s.want_residual and not passes]
    behind = (s.residual, s.mask, True, *last.act, wanted)
    found = _C.batch_norm_act_backward(
        *(dy, dy2, s.images[count], s.vectors[2 * count], s.rows[count], None, None, None), *behind
    )
    if s.want_residual:
        residual = dy if passes else found[6]
    dv[2 * count :] = found[1:3]
    # The gradient of an image: itself, or what makes it.
    grad = (found[0], None, None, None)
    for i in reversed(range(count)):
        if not s.wants_image(i + 1):
            break
        x, rows, before = s.images[i], s.rows[i], s.steps[i]
        kernel, *window = s.call.windows[i]
        if s.want_weights[i]:
            wide = s.parameters[i].dtype is torch.float32
            dw[i] = _C.conv_norm_weight_grad(x, rows, *before.act, *grad, kernel, *window, wide)
        if not s.wants_image(i) and not any(s.want_vectors[2 * i : 2 * i + 2]):
            break
        normalised = (None, None, None) if rows is None else (x, rows, s.vectors[2 * i])
        d, coefficients, dv[2 * i], dv[2 * i + 1] = _C.conv_norm_input_grad(
            *grad, s.weights[i], *normalised, *before.act, list(x.shape[2:]), *window
        )
        if rows is None:
            dx = d
            break
        grad = (d, x, rows, coefficients)
        if s.wants_image(i) and (i == 0 or s.call.windows[i - 1].kernel != 1):
            grad = (_C.batch_norm_input_grad(*grad), None, None, None)
            dx = grad[0]
    return s.result(dx if s.want_input else None, residual, dw, dv)


def _differentiable(s: _Saved, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same by torch's operations, for gradients of gradients."""
    count = len(s.weights)
    last = s.steps[count]
    inputs = [s.images[0], *s.parameters, *s.vectors]
    wanted = [s.want_input, *s.want_weights, *s.want_vectors]
    with torch.enable_grad():
        z = s.images[0]
        for i, step in enumerate(s.steps):
            if i > 0:
                weight = s.parameters[i - 1].to(z.dtype)
                window = s.call.windows[i - 1]
                z = F.conv2d(z, weight, None, window.stride, window.padding)
            elif s.call.head is None:
                continue
            weight, bias = s.vectors[2 * i : 2 * i + 2]
            z = F.batch_norm(z, None, None, weight, bias, True, 0.0, step.norm.eps)
            if i < count:
                z = ACTIVATIONS[step.activation](z, step.parameter)
        if last.activation in _CURVED:
            total = z if s.residual is None else z + s.residual
            y = ACTIVATIONS[last.activation](total, last.parameter)
            (d,) = torch.autograd.grad(y, total, dy, create_graph=True)
        elif last.activation == "identity":
            d = dy
        else:  # the derivative is a constant: that of a residual, which the mask tells, or of zeros
            ones = torch.ones_like(s.images[count])
            zeros = torch.zeros_like(ones) if s.mask is None else None
            rest = (zeros, s.mask, True, *last.act, [False] * 6 + [True])
            side = (s.images[count], None, s.rows[count], None, None, None)
            d = dy * _C.batch_norm_act_backward(ones, None, *side, *rest)[6]
        leaves = [t for t, want in zip(inputs, wanted, strict=True) if want]
        found = iter(
            torch.autograd.grad(z, leaves, d, create_graph=True, allow_unused=True)
            if leaves
            else ()
        )
    dx, *others = (next(found) if want else None for want in wanted)
    return s.result(dx, d if s.want_residual else None, others[:count], others[count:])
