"""A folded convolution with what follows it as one call of oneDNN, on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from braze.nn._activation import ACTIVATIONS
from braze.nn._folded import Call, Folded, find, fold, keep, making

__all__ = ["run", "takes"]

_MAX_SHAPES = 2  # of inputs for which a packed weight is kept


def takes(dtype: torch.dtype, last: bool, adds: bool) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    # Contiguous, oneDNN would add in a pass of its own, where the batch norm's kernel does all in one.
    if adds and not last:
        return False
    if dtype is torch.float32:
        return True
    mkldnn = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float16 and bool(mkldnn._is_mkldnn_fp16_supported())


def run(call: Call) -> Tensor | None:
    conv, x, residual, activation = call.conv, call.x, call.residual, call.activation
    # To see whether the weight has changed is to read it. That must cost less than the pass over the result
    # that is saved, or the packing, which is done for channels last only.
    if not call.last and conv.weight.nbytes > 2 * math.prod(call.shape) * x.itemsize:
        return None
    folded = find(call)
    keep(conv, folded)
    weight = _weight(folded, call)
    arguments = (weight, folded.bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    pointwise = torch.ops.mkldnn._convolution_pointwise
    result: Tensor
    if residual is None:
        row = ACTIVATIONS[activation]
        name, scalars, algorithm = row.post_op or ("none", [], "")
        scalars = scalars or ([call.parameter] if row.parameter else [])
        result = pointwise.default(x, *arguments, name, scalars, algorithm)
        done = row.post_op is not None
    else:
        unary = "relu" if activation == "relu" else None
        result = pointwise.binary(x, residual, *arguments, "add", 1.0, unary, [], None)
        done = unary is not None or activation == "identity"
    return result if done else ACTIVATIONS[activation](result, call.parameter)


def _weight(folded: Folded, call: Call) -> Tensor:
    """The folded weight for inputs of this shape."""
    conv, shape = call.conv, call.x.shape
    found = folded.plain if folded.plain is not None else folded.packed.get(shape)
    if found is not None:
        return found
    with making(call):
        weight, bias = fold(folded)
        folded.bias = bias.to(weight.dtype)
        if not call.last or len(folded.packed) == _MAX_SHAPES:
            layout = torch.channels_last if call.last else torch.contiguous_format
            folded.plain = weight.contiguous(memory_format=layout)
            folded.packed.clear()
            return folded.plain
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(memory_format=torch.channels_last),
            list(conv.padding),
            list(conv.stride),
            list(conv.dilation),
            conv.groups,
            list(shape),
        )
        folded.packed[shape] = packed
        return packed
