"""A convolution and the batch norm after it, as one: the bias that training cancels, the folding in eval()."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from braze.nn._activation import has_hooks
from braze.nn._batch_norm_functional import run
from braze.nn._conv_chain import Link, parts, possible
from braze.nn._conv_chain import run as run_chain
from braze.nn._fold import folded_conv_bn_act
from braze.nn._norms import is_batch_norm, norm_of
from braze.nn._route import WIDE, takes_addend, takes_batch_norm, transformed

__all__ = ["CONVS", "conv_bn_act", "conv_chain"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _AbsorbedBias(torch.autograd.Function):
    """``output``, on which ``bias`` has no influence: its gradient is zero, not missing."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (bias,) = ctx.saved_tensors
        return grad, torch.zeros_like(bias)


def _absorbs_bias(conv: Any, norm: Any) -> bool:
    """Whether nothing could tell that the convolution's bias is not added: the batch's mean takes it away
    again, and only the running mean and the bias's gradient, which is zero, must know of it."""
    return (
        type(conv) in CONVS
        and conv.bias is not None
        and is_batch_norm(norm)
        and (norm.training or (norm.running_mean is None and norm.running_var is None))
        # 16 bits would be rounded twice.
        and (norm.running_mean is None or norm.running_mean.dtype in WIDE)
        and not has_hooks(conv)
        and not torch_module._has_any_global_hook()
        and not transformed()
    )


def _without_bias(
    link: Link, input: Tensor, residual: Tensor | None, inplace: bool, fork: bool
) -> Any:
    conv, norm, activation, parameter = link
    output = conv._conv_forward(input, conv.weight, None)
    residual = _stored(residual, output, inplace)
    absorbed = takes_batch_norm(output, *norm_of(norm, output)) and (
        residual is None or takes_addend(output, residual)
    )
    if absorbed:
        output = _AbsorbedBias.apply(output, conv.bias)
    else:  # torch's batch norm lets nobody change the running mean behind it
        output = output + conv.bias.view(-1, *(1,) * (conv.weight.dim() - 2))
    result = run(output, *norm_of(norm, output), activation, parameter, residual, fork)
    running_mean = norm.running_mean if norm.training and norm.track_running_stats else None
    if absorbed and running_mean is not None:
        bias = conv.bias.detach()
        if norm.momentum is not None:
            running_mean.add_(bias, alpha=norm.momentum)
        elif norm.num_batches_tracked is not None:
            running_mean.addcdiv_(bias, norm.num_batches_tracked)
    return result


def _stored(residual: Tensor | None, output: Tensor, inplace: bool) -> Tensor | None:
    """The residual as an addition in place takes it, whose result keeps the dtype of ``output``."""
    if residual is None or not inplace or residual.dtype == output.dtype:
        return residual
    return residual.to(output.dtype)


def conv_bn_act(
    conv: Any,
    norm: Any,
    input: Tensor,
    activation: str,
    parameter: float,
    residual: Tensor | None = None,
    inplace: bool = False,
    fork: bool = False,
) -> Any:
    """activation(norm(conv(input)) + residual), for a ``norm`` without hooks.

    ``inplace``: the sum has the dtype of the convolution's result, whatever the residual's. ``fork``: the
    result twice, as :func:`braze.nn.functional.batch_norm_act` gives it.
    """
    link = Link(conv, norm, activation, parameter)
    if norm.training and possible(input):
        return conv_chain(input, (link,), residual, inplace, fork)
    return _alone(link, input, residual, inplace, fork)


def conv_chain(
    input: Tensor,
    links: Sequence[Link],
    residual: Tensor | None = None,
    inplace: bool = False,
    fork: bool = False,
) -> Any:
    """The links one after the other, where braze's kernels are chosen as one; ``residual``, ``inplace`` and
    ``fork`` are the last one's."""
    for part in parts(links, input, residual, inplace):
        join, forks = (residual, fork) if part.links[-1] is links[-1] else (None, False)
        if part.own:
            input = run_chain(part, input, join, forks)
        else:
            input = _alone(part.links[0], input, join, inplace, forks)
    return input


def _alone(link: Link, input: Tensor, residual: Tensor | None, inplace: bool, fork: bool) -> Any:
    """By torch's convolution."""
    conv, norm, activation, parameter = link
    if not norm.training and not torch.is_grad_enabled():
        folded = folded_conv_bn_act(conv, norm, input, activation, parameter, residual, inplace)
        if folded is not None:
            return (folded, folded) if fork else folded
    elif _absorbs_bias(conv, norm):
        return _without_bias(link, input, residual, inplace, fork)
    output = conv(input)
    residual = _stored(residual, output, inplace)
    return run(output, *norm_of(norm, output), activation, parameter, residual, fork)
