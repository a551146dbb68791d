"""Convolution + batch norm with running statistics, folded into one convolution, while no gradient is wanted.

W' = W g / sqrt(v + eps) per output channel, b' = (b - m) g / sqrt(v + eps) + beta, in fp64, rounded once to the
convolution's dtype. Source: Jacob et al., "Quantization and Training of Neural Networks", 2018, section 3.2;
``torch.nn.utils.fusion.fuse_conv_bn_weights``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from braze._native import _C
from braze.nn._activation import has_hooks
from braze.nn._composite import ACTIVATIONS
from braze.nn._route import is_plain, transformed

__all__ = ["Folded", "drop_folded", "folded_conv_bn_act"]

_fingerprint = _C.fingerprint
_ATTRIBUTE = "_braze_folded"
_CHANNELS_LAST = torch.channels_last
_MAX_SHAPES = 2  # of inputs for which a packed weight is kept

# oneDNN's name, its scalars and its algorithm.
_POST_OPS: dict[str, tuple[str, list[float], str]] = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "sigmoid": ("sigmoid", [], ""),
    "tanh": ("tanh", [], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "hardswish": ("hardswish", [], ""),
    "hardsigmoid": ("hardsigmoid", [], ""),
}
_NO_POST_OP = _POST_OPS["identity"]


class Folded:
    """What was folded from which tensors. Copies and pickles of it are empty."""

    def __init__(self, key: tuple[Any, ...] = (), sources: tuple[Tensor | None, ...] = ()) -> None:
        self.key = key
        self.sources = sources  # kept alive, so that no other tensors take their place
        self.bias: Tensor | None = None
        self.plain: Tensor | None = None
        # By the input's shape: with another one oneDNN may pack a packed weight anew at every call.
        self.packed: dict[torch.Size, Tensor] = {}

    def __deepcopy__(self, memo: Any) -> Folded:
        return Folded()

    def __reduce__(self) -> Any:
        return Folded, ()


def drop_folded(conv: nn.Module) -> None:
    """Forgets what was folded into ``conv``."""
    conv.__dict__.pop(_ATTRIBUTE, None)


def _has_onednn(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype is torch.float32:
        return True
    mkldnn = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float16 and bool(mkldnn._is_mkldnn_fp16_supported())


def _compute_dtype(conv: nn.Conv2d, input: Tensor) -> torch.dtype | None:
    """The dtype that the convolution would compute in; None: it would raise, or nobody can fold it."""
    dtype = input.dtype
    if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    elif dtype != conv.weight.dtype or (conv.bias is not None and conv.bias.dtype != dtype):
        return None
    return dtype if _has_onednn(dtype) else None


def _folds(conv: nn.Module, norm: Any, input: Tensor) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and is_plain(input)
        and input.is_cpu
        and input.dim() == 4
        and input.numel() != 0
        and input.shape[1] == conv.in_channels
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.running_mean.shape[0] == conv.out_channels
        and conv.weight.is_cpu
        and not has_hooks(conv)
        and not torch_module._has_any_global_hook()
        and not torch.compiler.is_compiling()
        and not transformed()
    )


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=_CHANNELS_LAST) and not tensor.is_contiguous()


def _fold(folded: Folded) -> Tensor:
    """The folded weight; the bias goes to ``folded``."""
    weight, bias, gamma, beta, mean, var = folded.sources
    _, eps, dtype, _ = folded.key
    assert weight is not None and mean is not None and var is not None
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.double()
    folded.bias = shift.to(dtype)
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(dtype)


def _weight(folded: Folded, conv: nn.Conv2d, shape: torch.Size) -> Tensor:
    """The folded weight for inputs of this shape."""
    found = folded.plain if folded.plain is not None else folded.packed.get(shape)
    if found is not None:
        return found
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        weight = _fold(folded)
        last = folded.key[-1]
        if not last or len(folded.packed) == _MAX_SHAPES:
            layout = _CHANNELS_LAST if last else torch.contiguous_format
            folded.plain = weight.contiguous(memory_format=layout)
            folded.packed.clear()
            return folded.plain
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(memory_format=_CHANNELS_LAST),
            list(conv.padding),
            list(conv.stride),
            list(conv.dilation),
            conv.groups,
            list(shape),
        )
        folded.packed[shape] = packed
        return packed


def _find(conv: nn.Conv2d, norm: Any, dtype: torch.dtype, last: bool) -> Folded:
    sources = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    key = (_fingerprint(sources), norm.eps, dtype, last)
    folded: Folded | None = conv.__dict__.get(_ATTRIBUTE)
    if folded is None or folded.key != key:
        folded = conv.__dict__[_ATTRIBUTE] = Folded(key, sources)
    return folded


def folded_conv_bn_act(
    conv: Any,
    norm: Any,
    input: Tensor,
    activation: str,
    parameter: float,
    residual: Tensor | None,
    inplace: bool,
) -> Tensor | None:
    """activation(norm(conv(input)) + residual) by one convolution of oneDNN; None where it cannot be had.

    Folded lazily, kept beside the convolution, and folded again when one of the six tensors is another one or
    has changed. A change that torch does not count, one through ``tensor.data``, is seen if it changes one of
    64 elements spread over the tensor.
    """
    if not _folds(conv, norm, input):
        return None
    dtype = _compute_dtype(conv, input)
    if dtype is None:
        return None
    last = _is_channels_last(input) or _is_channels_last(conv.weight)
    if residual is not None:
        if inplace:
            residual = residual.to(dtype)
        # Contiguous, oneDNN would add in a pass of its own, where the batch norm's kernel does all in one.
        if not (last and _is_summand(residual, conv, input, dtype)):
            return None
    folded = _find(conv, norm, dtype, last)
    x = input.to(dtype)
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    weight = _weight(folded, conv, x.shape)
    arguments = (weight, folded.bias, *geometry)
    pointwise = torch.ops.mkldnn._convolution_pointwise
    result: Tensor
    if residual is None:
        post = _post_op(activation, parameter)
        result = pointwise.default(x, *arguments, *(post or _NO_POST_OP))
        done = post is not None
    else:
        unary = "relu" if activation == "relu" else None
        result = pointwise.binary(x, residual, *arguments, "add", 1.0, unary, [], None)
        done = unary is not None or activation == "identity"
    return result if done else ACTIVATIONS[activation](result, parameter)


def _is_summand(residual: Tensor, conv: nn.Conv2d, input: Tensor, dtype: torch.dtype) -> bool:
    return (
        is_plain(residual)
        and residual.dtype == dtype
        and residual.is_cpu
        and residual.shape == _output_shape(conv, input)
    )


def _post_op(activation: str, parameter: float) -> tuple[str, list[float], str] | None:
    if activation == "leaky_relu":
        return ("leaky_relu", [parameter], "")
    return _POST_OPS.get(activation)


def _output_shape(conv: nn.Conv2d, input: Tensor) -> tuple[int, ...]:
    sizes = [input.shape[0], conv.out_channels]
    for i in range(2):
        reach = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
        sizes.append((input.shape[2 + i] + 2 * int(conv.padding[i]) - reach) // conv.stride[i] + 1)
    return tuple(sizes)
