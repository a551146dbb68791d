"""Convolution + batch norm with running statistics, folded into one convolution, if no gradient is wanted."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from braze.nn import _fold_cudnn, _fold_onednn
from braze.nn._activation import has_hooks
from braze.nn._folded import Call
from braze.nn._route import is_plain, transformed

__all__ = ["folded_conv_bn_act"]


class Library(Protocol):
    """Who runs folded convolutions on a kind of device."""

    def takes(self, dtype: torch.dtype, last: bool, adds: bool) -> bool:
        """Whether it can in this dtype, in channels-last format or not, with a residual or without."""

    def run(self, call: Call) -> Tensor | None:
        """The result; None: not this time."""


_LIBRARIES: dict[str, Library] = {"cpu": _fold_onednn, "cuda": _fold_cudnn}


def _compute_dtype(conv: nn.Conv2d, input: Tensor) -> torch.dtype | None:
    """The dtype that the convolution would compute in; None: it would raise."""
    dtype, device = input.dtype, input.device.type
    if torch.is_autocast_enabled(device) and dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    if dtype != conv.weight.dtype or (conv.bias is not None and conv.bias.dtype != dtype):
        return None
    return dtype


def _folds(conv: nn.Module, norm: Any, input: Tensor) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not torch.compiler.is_compiling()
        and not transformed()
        and is_plain(input)
        # What is made under a mode, such as fake tensors, must not be kept.
        and torch._C._len_torch_dispatch_stack() == 0
        and type(input) is not FakeTensor
        and is_plain(conv.weight)
        and conv.weight.device == input.device
        and input.dim() == 4
        and input.numel() != 0
        and input.shape[1] == conv.in_channels
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.running_mean.shape[0] == conv.out_channels
        and not has_hooks(conv)
        and not torch_module._has_any_global_hook()
    )


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def _output_shape(conv: nn.Conv2d, input: Tensor) -> tuple[int, ...]:
    sizes = [input.shape[0], conv.out_channels]
    for i in range(2):
        reach = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
        sizes.append((input.shape[2 + i] + 2 * int(conv.padding[i]) - reach) // conv.stride[i] + 1)
    return tuple(sizes)


def folded_conv_bn_act(
    conv: Any,
    norm: Any,
    input: Tensor,
    activation: str,
    parameter: float,
    residual: Tensor | None,
    inplace: bool,
) -> Tensor | None:
    """activation(norm(conv(input)) + residual) by a folded convolution; None where it cannot be had.

    Folded lazily, kept beside the convolution, and folded again when one of the six tensors is another one or
    has changed. A change that torch does not count, one through ``tensor.data``, is seen on the CPU, where
    all are read at each call, and on CUDA after the next ``eval()``. In a capture only frozen modules are
    folded, those whose parameters require no gradient, and folded before: the graph's replays read what was
    folded then.
    """
    library = _LIBRARIES.get(input.device.type)
    if library is None or not _folds(conv, norm, input):
        return None
    dtype = _compute_dtype(conv, input)
    last = _is_channels_last(input) or _is_channels_last(conv.weight)
    if dtype is None or not library.takes(dtype, last, residual is not None):
        return None
    shape = _output_shape(conv, input)
    if min(shape) <= 0:
        return None
    if residual is not None:
        if inplace:
            residual = residual.to(dtype)
        if not (
            is_plain(residual)
            and residual.dtype == dtype
            and residual.device == input.device
            and residual.shape == shape
        ):
            return None
    x = input.to(dtype)
    return library.run(Call(conv, norm, x, residual, shape, last, activation, parameter))
