"""All of ``torch.nn.utils.clip_grad``, with functions that take all gradients in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from types import GeneratorType

import torch
import torch.nn.utils as _torch
from torch import Tensor
from torch.nn.utils.clip_grad import clip_grad_norm as clip_grad_norm

from braze._native import _C

# Before anyone replaces them.
_clip_grad_norm_, _clip_grad_value_ = _torch.clip_grad_norm_, _torch.clip_grad_value_
_get_total_norm = _torch.get_total_norm

__all__ = ["clip_grad_norm", "clip_grad_norm_", "clip_grad_value_"]


def _ours(foreach: bool | None) -> bool:
    return foreach is None and not torch.compiler.is_compiling()


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [grad for p in parameters if (grad := p.grad) is not None]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""As :func:`torch.nn.utils.clip_grad_norm_`: multiplies all gradients, in place, by
    :math:`\min(1, c / (\|g\| + 10^{-6}))`, where g are all of them together.

    One pass that reads and, if anything is to be scaled, one that writes, for any number of tensors of any
    dtype: on the CPU one parallel region each, on a CUDA device one launch, and nothing waits for it.

    Args:
        parameters: whose gradients to clip; those without are left out.
        max_norm (float): c.
        norm_type (float): other norms than 2 are torch's code.
        error_if_nonfinite (bool): raise instead of scaling by a norm that is not finite; waits.
        foreach (bool): other than None, torch's code.

    Returns:
        The norm before clipping, in the dtype and on the device that torch gives it.

    Differences from torch: squares are summed in fp64, in an order that the shapes decide; the norm of
    16-bit gradients is rounded once, and gradients whose squares overflow fp32 have a norm. Sparse gradients,
    tensor subclasses such as DTensor, and gradients that share memory are torch's code.

    Raises:
        RuntimeError: as torch.

    Source: ``torch.nn.utils.clip_grad_norm_``; Pascanu et al., "On the difficulty of training recurrent
    neural networks", 2013.
    """
    # What a generator yields, torch could not see again; without anything it has a warning to give.
    again = parameters
    if isinstance(parameters, GeneratorType):
        parameters = list(parameters)
        again = parameters or (p for p in parameters)
    elif isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        again = parameters = list(parameters)
    if _ours(foreach) and float(norm_type) == 2.0 and float(max_norm) >= 0.0:
        norm = _C.clip_to_norm(_gradients(parameters), float(max_norm), error_if_nonfinite)
        if norm is not None:
            return norm
    return _clip_grad_norm_(again, max_norm, norm_type, error_if_nonfinite, foreach)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As :func:`torch.nn.utils.get_total_norm`: the norm of all tensors together, in one pass. Arguments,
    result, differences and errors are those of :func:`clip_grad_norm_`."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if _ours(foreach) and float(norm_type) == 2.0:
        norm = _C.clip_to_norm(tensors, -1.0, error_if_nonfinite)
        if norm is not None:
            return norm
    return _get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """As :func:`torch.nn.utils.clip_grad_value_`: limits each element of the gradients to
    [-clip_value, clip_value], in place, in one pass over all; NaN stays.

    Args:
        parameters: whose gradients to clip; those without are left out.
        clip_value (float): the limit.
        foreach (bool): other than None, torch's code.

    Raises:
        RuntimeError: as torch.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    limit = float(clip_value)
    if not (_ours(foreach) and limit >= 0.0 and _C.clip_to_value(_gradients(parameters), limit)):
        _clip_grad_value_(parameters, clip_value, foreach)
