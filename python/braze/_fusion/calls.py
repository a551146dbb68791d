"""What fused blocks call in the place of several modules; positional, as the callers are generated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from braze.nn import _conv_bn, _dropout_functional
from braze.nn import dropout as braze_dropout
from braze.nn._activation import ACTIVATIONS, has_hooks
from braze.nn._batch_norm_functional import run, run_add
from braze.nn._conv_bn import conv_bn_act
from braze.nn._conv_chain import Link, result_dtype
from braze.nn._norms import norm_of
from braze.nn._route import transformed

__all__ = [
    "ALLOCATING",
    "act_dropout",
    "conv_chain",
    "dropout_add",
    "is_dropout",
    "norm_act",
    "norm_add_act",
]

_DROPOUTS = (nn.Dropout, braze_dropout.Dropout)


def norm_act(
    conv: Any,
    norm: Any,
    input: Tensor,
    activation: str,
    parameter: float,
    residual: Any = None,
    stored: str = "",
    fork: bool = False,
) -> Any:
    """activation(norm(conv(input)) + residual); without ``conv``, of ``input`` itself.

    ``stored``: the sum would have been stored in the "norm"'s output or the "residual", whose dtype it has.
    ``fork``: the result twice, for two users, whose gradients are then summed inside the backward kernels.
    """
    if residual is not None and not isinstance(residual, Tensor):
        z = norm_act(conv, norm, input, "identity", 0.0) + residual
        y = ACTIVATIONS[activation](z, parameter)
        return (y, y) if fork else y
    if (
        residual is not None
        and stored == "residual"
        and residual.dtype != (input.dtype if conv is None else result_dtype(input))
    ):
        residual += norm_act(conv, norm, input, "identity", 0.0)
        y = ACTIVATIONS[activation](residual, parameter)
        return (y, y) if fork else y
    inplace = stored == "norm"
    if conv is not None:
        return conv_bn_act(conv, norm, input, activation, parameter, residual, inplace, fork)
    if residual is not None and inplace and residual.dtype != input.dtype:
        residual = residual.to(input.dtype)
    return run(input, *norm_of(norm, input), activation, parameter, residual, fork)


def conv_chain(
    input: Tensor,
    links: tuple[tuple[Any, Any, str, float], ...],
    residual: Any = None,
    stored: str = "",
    fork: bool = False,
) -> Any:
    """norm_act of one convolution, batch norm and activation after the other; the rest is the last one's."""
    *before, last = (Link(*link) for link in links)
    joins = isinstance(residual, Tensor) and (
        stored != "residual" or residual.dtype == result_dtype(input)
    )
    if residual is None or joins:
        return _conv_bn.conv_chain(input, (*before, last), residual, stored == "norm", fork)
    input = _conv_bn.conv_chain(input, before)
    conv, norm, activation, parameter = last
    return norm_act(conv, norm, input, activation, parameter, residual, stored, fork)


def norm_add_act(
    conv: Any,
    norm: Any,
    input: Tensor,
    conv2: Any,
    norm2: Any,
    input2: Tensor,
    activation: str,
    parameter: float,
    stored: str,
    fork: bool = False,
) -> Any:
    """activation(norm(conv(input)) + norm2(conv2(input2)))."""
    evaluated = not norm.training and not norm2.training
    if evaluated and not torch.is_grad_enabled() and not transformed():
        # Two folded convolutions, the second of which adds.
        residual = norm_act(conv2, norm2, input2, "identity", 0.0)
        return norm_act(conv, norm, input, activation, parameter, residual, stored, fork)
    x = input if conv is None else conv(input)
    x2 = input2 if conv2 is None else conv2(input2)
    (first, training), (second, training2) = norm_of(norm, x), norm_of(norm2, x2)
    if training == training2:
        result = run_add(x, first, x2, second, training, activation, parameter, fork)
        if result is not None:
            return result
    residual = norm_act(None, norm2, x2, "identity", 0.0)
    return norm_act(None, norm, x, activation, parameter, residual, stored, fork)


def is_dropout(module: nn.Module) -> bool:
    return type(module) in _DROPOUTS and not has_hooks(module)


def act_dropout(
    input: Tensor,
    activation: str,
    parameter: float,
    module: Any,
    p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """dropout(activation(input)), with a module's p and mode or those given."""
    if module is not None:
        p, training = module.p, module.training
    if not training or p == 0:
        return ACTIVATIONS[activation](input, parameter)
    return _dropout_functional.act_dropout(
        input, activation, p, True, negative_slope=parameter, alpha=parameter
    )


def dropout_add(
    input: Tensor, residual: Any, inplace: bool, module: Any, p: float = 0.0, training: bool = False
) -> Tensor:
    """dropout(input) + residual."""
    if module is not None:
        p, training = module.p, module.training
    if not isinstance(residual, Tensor):
        return _dropout_functional.dropout(input, p, training) + residual
    if inplace and residual.dtype != input.dtype:
        residual = residual.to(input.dtype)
    return _dropout_functional.dropout_add(input, residual, p, training)


# Their results are never memory of their arguments.
ALLOCATING = frozenset((norm_act, conv_chain, norm_add_act, act_dropout, dropout_add))
