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

import torch
from torch import Generator, Tensor
from torch.nn.functional import alpha_dropout as torch_alpha_dropout
from torch.nn.functional import dropout as torch_dropout

from braze._native import _C
from braze.nn import _dropout_fake  # noqa: F401  (registers)
from braze.nn._activation import ACTIVATIONS, parameter_of
from braze.nn._dropout_channels import dropout1d as dropout1d
from braze.nn._dropout_channels import dropout2d as dropout2d
from braze.nn._dropout_channels import dropout3d as dropout3d
from braze.nn._dropout_channels import feature_alpha_dropout as feature_alpha_dropout
from braze.nn._dropout_route import call, check_p, drop, kernels, overridden

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
    nan and negative numbers -0). Under ``torch.vmap``, ``torch.jit.trace`` and ``torch.export`` torch's own
    dropout draws, and for tensor subclasses.
    """
    return drop(torch_dropout, input, p, training, inplace, generator)


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
    return drop(torch_alpha_dropout, input, p, training, inplace, generator, alpha=True)


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


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
        activation: a name, such as relu or gelu_tanh; the error for an unknown one lists all.
        inplace: writes the result to ``input``; where a gradient is wanted, all but relu keep a copy of it.
        negative_slope: of leaky_relu.
        alpha: of elu.

    Everything else is as in ``dropout``. With ``training=False`` or ``p`` = 0 it is torch's activation.
    16-bit types are rounded once, after the scale.

    Raises:
        ValueError: also if there is no such activation.
    """
    check_activation(activation)
    parameter = parameter_of(activation, negative_slope=negative_slope, alpha=alpha)
    check_p(p)
    idle = overridden(input) or training is not True or p == 0
    operators = None if idle else kernels(input)
    if operators is None or (inplace and operators is not _C):
        output = dropout(
            ACTIVATIONS[activation](input, parameter), p, training, generator=generator
        )
        return input.copy_(output) if inplace else output
    if inplace:
        _C.act_dropout_(input, p, activation, parameter, generator)
        return input
    return call(operators, "act_dropout", input, p, activation, parameter, generator=generator)


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
    check_p(p)
    idle = overridden(input, residual) or training is not True or p == 0
    operators = None if idle else kernels(input)
    if (
        operators is None
        or kernels(residual) is not operators
        or residual.shape != input.shape
        or residual.dtype != input.dtype
        or residual.device != input.device
    ):
        return dropout(input, p, training, generator=generator) + residual
    return call(operators, "dropout_add", input, residual, p, generator=generator)


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
    check_p(p)
    if numel < 0:
        raise ValueError(f"numel must not be negative, got {numel}")
    for name, value in (("seed", seed), ("offset", offset)):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{name} must have 64 bits, got {value}")
    words = [value - 2**64 if value >= 2**63 else value for value in (seed, offset)]
    state = torch.tensor(words, dtype=torch.int64, device=device)
    ones = torch.ones(numel, dtype=torch.bfloat16, device=state.device)
    return _C.dropout_apply(ones, state, p, False, False, False) != 0
