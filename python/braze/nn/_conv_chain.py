"""Which convolutions between batch norms braze's kernels compute, and the call for those in a row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from braze._native import _C
from braze.nn import _conv_choice
from braze.nn._activation import NUMBERS, has_hooks
from braze.nn._conv_autograd import Call, ConvNorms, Step, Window
from braze.nn._conv_choice import Problem
from braze.nn._fold_cudnn import milliseconds
from braze.nn._norms import is_batch_norm, norm_of
from braze.nn._route import HALF, takes_activation, takes_statistics, takes_vectors, transformed

__all__ = ["Link", "Part", "parts", "possible", "result_dtype", "run", "verdict"]

# Those that csrc/plan/conv.h computes wherever it reads.
_RECOMPUTED = frozenset(("identity", "relu", "relu6", "leaky_relu"))
_SQUARES = {(size, size): size for size in range(4)}
_MAX_SIDE, _MAX_PIXELS, _MAX_CHUNKS = 2**14 - 1, 2**31 - 2**8, 2**31 - 1
_TENSORS = (Tensor, nn.Parameter)
_last = torch.channels_last


class Link(NamedTuple):
    """activation(norm(conv(input)))."""

    conv: Any
    norm: Any
    activation: str
    parameter: float


class Part(NamedTuple):
    """Some of the links in a row, or one that is not braze's."""

    links: Sequence[Link]
    own: bool  # one call of braze's kernels
    head: bool = False  # its first convolution is torch's


# What was asked for last, of each convolution.
_asked: WeakKeyDictionary[Any, Problem] = WeakKeyDictionary()


def possible(input: Tensor) -> bool:
    """Whether a convolution of ``input`` could be braze's. On the CPU, where it is a reference, only if
    BRAZE_CONV says so."""
    return (
        not torch.compiler.is_compiling()
        and (input.is_cuda or _conv_choice.mode() == "braze")
        and _conv_choice.possible()
    )


def result_dtype(input: Tensor) -> torch.dtype:
    """Of a convolution of ``input``."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


def parts(
    links: Sequence[Link], input: Tensor, residual: Tensor | None, inplace: bool
) -> list[Part]:
    """Who computes the links, with ``residual`` added before the last activation; ``inplace``: in the dtype of
    the convolution's result."""
    if not possible(input) or not _takes_input(input):
        return [Part((link,), False) for link in links]
    own, joins = _own_convolutions(links, input, residual, inplace)
    found, first = [], 0
    while first < len(links):
        head = not own[first] and first + 1 < len(links) and own[first + 1] and joins[first]
        end = first + 1 + head
        if own[end - 1]:
            while end < len(links) and own[end] and joins[end - 1]:
                end += 1
        found.append(Part(links[first:end], own[end - 1], head))
        first = end
    return found


def _takes_input(input: Tensor) -> bool:
    return (
        type(input) in _TENSORS
        and input.dim() == 4
        and input.numel() != 0
        and not transformed()
        and torch._C._len_torch_dispatch_stack() == 0
        and not _has_any_global_hook()
        and result_dtype(input) in HALF
        and takes_activation(input)
        and (not input.is_cuda or _has_kernels(input.device))
    )


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} {major}.{minor}"


def _own_convolutions(
    links: Sequence[Link], input: Tensor, residual: Tensor | None, inplace: bool
) -> tuple[list[bool], list[bool]]:
    """Whether a link's convolution is braze's, and whether the next link's could compute its batch norm."""
    dtype = result_dtype(input)
    shape, last = tuple(input.shape), input.is_contiguous(memory_format=_last)
    own, joins = [False] * len(links), [False] * len(links)
    for i, link in enumerate(links):
        out = _output(link.conv, shape)
        if out is None:
            break
        weight = link.conv._parameters["weight"]
        last = last or (weight.is_contiguous(memory_format=_last) and not weight.is_contiguous())
        fits = last and _takes_norm(link.norm, out, dtype, input)
        alone = residual is None or i + 1 < len(links)
        if fits and (alone or _joins(residual, out, None if inplace else dtype, input)):
            problem = _problem(link.conv, shape, out, dtype, i > 0 and joins[i - 1], input)
            if problem is not None:
                _asked[link.conv] = problem
                own[i] = _conv_choice.prefers_own(
                    problem, functools.partial(_measure, problem, input.device)
                )
        joins[i] = fits and link.activation in _RECOMPUTED
        shape = out
    return own, joins


def _output(conv: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of its result; None if it does more than torch's convolution without bias."""
    if type(conv) is not nn.Conv2d or has_hooks(conv):
        return None
    parameters, geometry = conv._parameters, (conv.stride, conv.padding, conv.dilation)
    weight: Any = parameters.get("weight")  # none: it is made anew, or frozen as a buffer
    if type(weight) not in _TENSORS or parameters.get("bias", conv) is not None:
        return None
    if not all(type(pair) is tuple for pair in geometry):
        return None
    k, c, *kernel = weight.shape
    if c * conv.groups != shape[1]:
        return None
    h, w = (
        (size + 2 * padding - dilation * (r - 1) - 1) // stride + 1
        for size, r, stride, padding, dilation in zip(shape[2:], kernel, *geometry, strict=True)
    )
    return (shape[0], k, h, w) if h > 0 and w > 0 else None


def _takes_norm(norm: Any, out: tuple[int, ...], dtype: torch.dtype, beside: Tensor) -> bool:
    n, c, h, w = out
    if c % 8 != 0 or n * h * w == 1 or not is_batch_norm(norm) or has_hooks(norm):
        return False
    found, training = norm_of(norm, beside)
    return training is True and takes_statistics(found) and takes_vectors(found, c, dtype, beside)


def _joins(residual: Any, out: tuple[int, ...], dtype: torch.dtype | None, beside: Tensor) -> bool:
    return (
        type(residual) in _TENSORS
        and residual.shape == out
        and dtype in (None, residual.dtype)
        and residual.layout is torch.strided
        and residual.device == beside.device
    )


def _problem(
    conv: Any,
    shape: tuple[int, ...],
    out: tuple[int, ...],
    dtype: torch.dtype,
    normalised: bool,
    input: Tensor,
) -> Problem | None:
    """None: there are no kernels for it."""
    (n, c, h, w), (_, k, out_h, out_w) = shape, out
    weight = conv._parameters["weight"]
    kernel, stride, padding = (
        _SQUARES.get(pair) for pair in (tuple(weight.shape[2:]), conv.stride, conv.padding)
    )
    autocast = torch.is_autocast_enabled(input.device.type)
    if (
        kernel not in (1, 3)
        or stride not in (1, 2)
        or padding is None
        or padding > kernel
        or conv.groups != 1
        or conv.dilation != (1, 1)
        or conv.padding_mode != "zeros"
        or c % 8 != 0
        or (weight.dtype is not dtype and not (autocast and weight.dtype is torch.float32))
        or weight.device != input.device
        or max(h, w, out_h, out_w) > _MAX_SIDE
        or n * max(h * w, out_h * out_w) > _MAX_PIXELS
        or n * max(h * w * c, out_h * out_w * k) // 8 > _MAX_CHUNKS
    ):
        return None
    where = _name(input.device)
    return Problem(where, dtype, n, h, w, c, k, kernel, stride, padding, normalised)


def run(part: Part, input: Tensor, residual: Tensor | None, fork: bool) -> Any:
    """One call for the links of ``part``, which is ``own``."""
    head, links = None, part.links
    if part.head:
        first, *links = links
        input = first.conv(input)
        head = _step(first, input)
    x = input.to(result_dtype(input)).contiguous(memory_format=_last)
    residual = None if residual is None else residual.to(x.dtype)
    steps = tuple(_step(link, x) for link in links)
    weights = [link.conv._parameters["weight"] for link in links]
    windows = tuple(
        Window(weight.shape[2], link.conv.stride[0], link.conv.padding[0])
        for weight, link in zip(weights, links, strict=True)
    )
    vectors = [
        v for step in (head, *steps) for v in ((None, None) if step is None else step.norm[:2])
    ]
    return ConvNorms.apply(Call(head, windows, steps, fork), x, residual, *weights, *vectors)


def _step(link: Link, input: Tensor) -> Step:
    return Step(norm_of(link.norm, input)[0], link.activation, link.parameter)


def _measure(problem: Problem, device: torch.device) -> tuple[float, float]:
    """Milliseconds of braze's kernels and of cuDNN with braze's batch norm: of a convolution and its gradients,
    the batch norm before it if there is one, and the statistics of the one after."""
    _, dtype, n, h, w, c, k, r, stride, padding, normalised = problem
    generator = torch.Generator(device).manual_seed(0)  # the program's random numbers stay its own

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return values.contiguous(memory_format=_last)

    x, weight = random(n, c, h, w), random(k, c, r, r)
    act, norm = (NUMBERS["relu"], 0.0), (None, None, None, None, None, 0.1, 1e-5)
    stats = _C.batch_norm_combine(_C.batch_norm_moments(x)[None], x, *norm) if normalised else None
    before = (x, stats, None) if normalised else (None, None, None)
    like = _C.conv_norm_forward(x, stats, *act, weight, stride, padding, *norm)[0]
    grad = (random(*like.shape), None, None, None)
    geometry = ([stride] * 2, [padding] * 2, [1, 1])

    def ours() -> None:
        _C.conv_norm_forward(x, stats, *act, weight, stride, padding, *norm)
        _C.conv_norm_weight_grad(x, stats, *act, *grad, r, stride, padding, False)
        d, rows, *_ = _C.conv_norm_input_grad(*grad, weight, *before, *act, [h, w], stride, padding)
        if normalised:
            _C.batch_norm_input_grad(d, x, stats, rows)

    def cudnn() -> None:
        y = _C.batch_norm_apply(x, stats, None, *act)[0] if normalised else x
        _C.batch_norm_moments(torch.conv2d(y, weight, None, *geometry))
        dy, _, _ = torch.ops.aten.convolution_backward(
            grad[0], y, weight, None, *geometry, False, [0, 0], 1, [True, True, False]
        )
        if normalised:
            rest = (stats, None, None, None, None, None, True, *act, [True] * 3 + [False] * 4)
            _C.batch_norm_act_backward(dy, None, x, None, *rest)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return milliseconds(ours), milliseconds(cudnn)


def verdict(conv: Any) -> str | None:
    """Who computes a convolution, and why; None if that was never asked for."""
    problem = _asked.get(conv)
    if problem is None:
        return None
    mode = _conv_choice.mode()
    if mode in ("cudnn", "braze"):
        return f"{mode}, which BRAZE_CONV says"
    choice = _conv_choice.choices().get(problem)
    if choice is None:
        return "cudnn, as nothing was timed"
    return f"{choice.winner}: {choice.ours:.3f} ms with braze's kernels, {choice.cudnn:.3f} ms with cuDNN"
