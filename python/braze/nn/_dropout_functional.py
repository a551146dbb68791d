"""Dropout as functions.

Mask index ``i`` belongs to lane ``i % 8`` of the Philox4x32-7 block whose counter is (``i // 8``,
``offset``) and whose key is ``seed``, each as two 32-bit words, low word first; the eight 16-bit lanes are
the halves of its four words, low half first. Index ``i`` is kept iff its lane is at least ``t = round(p *
65536)`` (halves to even). So ``p`` acts as ``t / 65536``, at most 7.7e-6 away, and the scale of what is
kept, ``65536 / (65536 - t)``, is that of the ``p`` that acts: the mean is exact. ``t = 65536`` (``p`` from
1 - 7.6e-6 on) drops everything.

``i`` counts elements in the order of memory, ``n * C + c`` where whole channels are dropped. Seed and
offset are one draw per call from torch's generator: on the CPU 64 random bits and 0, on CUDA its Philox
state.

Source of the generator: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from braze._native import _C
from braze.nn import _dropout_fake as _dropout_fake  # registers them
from braze.nn._dropout_route import OPS, drop, fresh, taken

__all__ = [
    "act_dropout",
    "alpha_dropout",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_mask",
    "feature_alpha_dropout",
]


def _check_p(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``y = x * scale`` where the element is kept, else 0, with ``scale = 1 / (1 - p)`` for the ``p`` that
    acts.

    As ``torch.nn.functional.dropout``, of any shape. float32, float64, bfloat16 and float16 (computed in
    float32, rounded once); all else is handed to torch. Only the seed and the offset of the mask are kept
    for the backward pass, which makes the mask again; ``dropout_mask`` is the mask.

    Args:
        input: a tensor of any shape. Dense ones keep their strides; of others the mask runs over a copy
            in the order that ``torch.empty_like`` gives.
        p: the probability to drop, rounded to a multiple of 1/65536.
        training: False, or ``p`` = 0: returns ``input`` itself, as torch does, and draws no random numbers.
        inplace: writes the result to ``input``.
        generator: where to draw from, instead of the device's default generator.

    Raises:
        ValueError: ``p`` is not in [0, 1]; nan too (torch: RuntimeError).
        RuntimeError: ``inplace`` on a leaf that requires grad, or on overlapping elements.

    Differences from torch: other masks for the same seed, the same on every device and for any number of
    threads; a dropped element is +0 whatever it was (torch multiplies with 0, which keeps nan, makes inf
    nan and negative numbers -0). Under functorch's transforms and forward-mode AD the mask is torch's.
    """
    if has_torch_function_unary(input):
        result: Tensor = handle_torch_function(
            F.dropout, (input,), input, p=p, training=training, inplace=inplace
        )
        return result
    _check_p(p)
    if not training or p == 0 or input.numel() == 0:
        return F.dropout(input, p, training, inplace)
    return drop(input, p, inplace, False, False, generator, F.dropout)


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``y = a * x + b`` where the element is kept, else ``b - a * l``, with SELU's limit ``l =
    1.7580993408473766``, ``a = 1 / sqrt((l**2 * p + 1) * (1 - p))`` and ``b = a * l * p``: zero mean and
    unit variance stay.

    As ``torch.nn.functional.alpha_dropout``; arguments, dtypes, errors and differences are those of
    ``dropout``. ``p = 1`` gives zeros, as in torch. Source: Klambauer et al., Self-normalizing neural
    networks (2017).
    """
    if has_torch_function_unary(input):
        result: Tensor = handle_torch_function(
            F.alpha_dropout, (input,), input, p=p, training=training, inplace=inplace
        )
        return result
    _check_p(p)
    if not training or p == 0 or input.numel() == 0:
        return F.alpha_dropout(input, p, training, inplace)
    return drop(input, p, inplace, True, False, generator, F.alpha_dropout)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``alpha_dropout`` of whole channels: ``input`` is (N, C, ...), and channel (n, c) has mask index n *
    C + c.

    As ``torch.nn.functional.feature_alpha_dropout``; everything else as in ``alpha_dropout``.

    Raises:
        RuntimeError: also if ``input`` has fewer than two dimensions.
    """
    if has_torch_function_unary(input):
        result: Tensor = handle_torch_function(
            F.feature_alpha_dropout, (input,), input, p=p, training=training, inplace=inplace
        )
        return result
    _check_p(p)
    if not training or p == 0 or input.numel() == 0:
        return F.feature_alpha_dropout(input, p, training, inplace)
    return drop(input, p, inplace, True, True, generator, F.feature_alpha_dropout)


def _torch_feature_dropout(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    return (torch.feature_dropout_ if inplace else torch.feature_dropout)(input, p, training)


def _drop_channels(
    torch_function: Callable[..., Tensor],
    ndim: int,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
) -> Tensor:
    """``ndim``: dimensions of a batch; with one less it is a single sample, except for 2d, where torch reads
    (C, H, W) as (N, C, L). What torch warns of or refuses is left to it."""
    if has_torch_function_unary(input):
        result: Tensor = handle_torch_function(
            torch_function, (input,), input, p=p, training=training, inplace=inplace
        )
        return result
    _check_p(p)
    single = input.dim() == ndim - 1 and ndim != 4
    if not training or p == 0 or input.numel() == 0 or not (single or input.dim() == ndim):
        return torch_function(input, p, training, inplace)
    batch = input.unsqueeze(0) if single else input
    output = drop(batch, p, inplace, False, True, generator, _torch_feature_dropout)
    if inplace:
        return input
    return output.squeeze(0) if single else output


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout`` of whole channels: (N, C, L), or (C, L) as a single sample. Channel (n, c) has mask index
    n * C + c, in any memory format; the mask is never spread out in memory.

    As ``torch.nn.functional.dropout1d``; arguments, dtypes, errors and differences are those of ``dropout``.

    Raises:
        RuntimeError: also if ``input`` has neither 2 nor 3 dimensions.
    """
    return _drop_channels(F.dropout1d, 3, input, p, training, inplace, generator)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout`` of whole channels: (N, C, H, W). Channel (n, c) has mask index n * C + c, in any memory
    format.

    As ``torch.nn.functional.dropout2d``; arguments, dtypes, errors and differences are those of
    ``dropout``. Other numbers of dimensions are handed to torch, which warns of them and reads (C, H, W) as
    (N, C, L).

    Raises:
        RuntimeError: also if ``input`` has fewer than 2 dimensions.
    """
    return _drop_channels(F.dropout2d, 4, input, p, training, inplace, generator)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout`` of whole channels: (N, C, D, H, W), or (C, D, H, W) as a single sample. Channel (n, c)
    has mask index n * C + c, in any memory format.

    As ``torch.nn.functional.dropout3d``; arguments, dtypes, errors and differences are those of
    ``dropout``. Other numbers of dimensions are handed to torch, which warns of them.
    """
    return _drop_channels(F.dropout3d, 5, input, p, training, inplace, generator)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": lambda x, _: torch.sigmoid(x),
    "tanh": lambda x, _: torch.tanh(x),
    "silu": lambda x, _: F.silu(x),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "hardswish": lambda x, _: F.hardswish(x),
    "hardsigmoid": lambda x, _: F.hardsigmoid(x),
    "mish": lambda x, _: F.mish(x),
}


def check_activation(activation: str) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {activation!r}")


def act_dropout(
    input: Tensor,
    activation: str,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout(activation(input), p)`` in one pass forward and one backward.

    For the backward pass it keeps the mask's seed and offset, and of relu the output, of any other
    activation the input; the two in separate calls keep the input, the activation's output and torch's
    mask.

    Args:
        activation: identity, relu, relu6, leaky_relu, elu, sigmoid, tanh, silu, gelu, gelu_tanh, hardswish,
            hardsigmoid or mish.
        inplace: writes the result to ``input``; where a gradient is wanted, all but relu keep a copy of it.
        negative_slope: of leaky_relu.
        alpha: of elu.

    Everything else is as in ``dropout``. With ``training=False`` or ``p`` = 0 it is torch's activation.
    16-bit types are rounded once, after the scale.

    Raises:
        ValueError: also if there is no such activation.
    """
    check_activation(activation)
    parameter = {"leaky_relu": negative_slope, "elu": alpha}.get(activation, 0.0)
    _check_p(p)
    if (
        has_torch_function_unary(input)
        or not training
        or p == 0
        or not taken(input)
        or (inplace and torch.compiler.is_compiling())
    ):
        output = dropout(
            _ACTIVATIONS[activation](input, parameter), p, training, generator=generator
        )
        return input.copy_(output) if inplace else output
    if torch.compiler.is_compiling():
        result: Tensor = OPS.act_dropout(
            input, p, activation, parameter, generator=generator, distinct=fresh(input)
        )[0]
        return result
    if not inplace:
        return _C.act_dropout(input, p, activation, parameter, generator, None)[0]
    _C.act_dropout_(input, p, activation, parameter, generator)
    return input


def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout(input, p) + residual`` in one pass, rounded once.

    A residual of another shape, dtype or device is added as torch adds it, in a pass of its own. Everything
    else is as in ``dropout``; nothing but the mask's seed and offset is kept for the backward pass.
    """
    _check_p(p)
    if (
        has_torch_function_variadic(input, residual)
        or not training
        or p == 0
        or not (taken(input) and taken(residual))
        or residual.shape != input.shape
        or residual.dtype != input.dtype
        or residual.device != input.device
    ):
        return dropout(input, p, training, generator=generator) + residual
    if torch.compiler.is_compiling():
        result: Tensor = OPS.dropout_add(
            input, residual, p, generator=generator, distinct=fresh(input)
        )[0]
        return result
    return _C.dropout_add(input, residual, p, generator, None)[0]


def dropout_mask(
    numel: int,
    p: float,
    seed: int,
    offset: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of ``numel`` indices as a bool tensor (numel,), True where kept; the same on every device.

    Args:
        seed: 64 bits, signed or unsigned; on the CPU what the generator gave.
        offset: 64 bits; 0 on the CPU.

    Raises:
        ValueError: ``p`` is not in [0, 1], ``numel`` is negative, or ``seed`` or ``offset`` has more than
        64 bits.
    """
    _check_p(p)
    if numel < 0:
        raise ValueError(f"numel must not be negative, got {numel}")
    for name, value in (("seed", seed), ("offset", offset)):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{name} must have 64 bits, got {value}")
    words = [value - 2**64 if value >= 2**63 else value for value in (seed, offset)]
    state = torch.tensor(words, dtype=torch.int64, device=device)
    ones = torch.ones(numel, dtype=torch.bfloat16, device=state.device)
    return _C.dropout_apply(ones, state, p, False, False, False) != 0
