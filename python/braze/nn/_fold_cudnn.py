"""A folded convolution with what follows it on CUDA: one call of cuDNN, or a convolution and one kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from braze import _native
from braze._native import _C
from braze.nn._activation import NUMBERS
from braze.nn._folded import Call, Folded, find, fold, keep, making

__all__ = ["milliseconds", "run", "takes"]

_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
_MAX_NUMEL = 2**31 - 1  # cuDNN's; torch's own convolution splits what is larger
_MAX_MEASURED = 8  # shapes and the like of one convolution; more are taken to be like most of these
_RUNS = 3  # to warm up, and to time
_NO_ENGINE = ("unable to find an engine", "NOT_SUPPORTED", "No execution plans support")

# What a captured graph reads must live as long as the convolution, whatever is folded anew meanwhile.
_captured: WeakKeyDictionary[nn.Module, set[Folded]] = WeakKeyDictionary()


def takes(dtype: torch.dtype, last: bool, adds: bool) -> bool:
    return dtype in _DTYPES and _native.CUDA_FILE is not None


def run(call: Call) -> Tensor | None:
    """None: nothing is folded, and this is no time to fold or to use what is."""
    with torch.cuda.device_of(call.x):
        folded = find(call)
        capturing = torch.cuda.is_current_stream_capturing()
        if folded.plain is None and (capturing or not _make(call, folded)):
            return None
        if capturing:
            if any(tensor is not None and tensor.requires_grad for tensor in folded.sources):
                return None  # its replays must follow what an optimizer does to the parameters
            _captured.setdefault(call.conv, set()).add(folded)
        if _fusible(call) and _prefers_fused(call, folded, capturing):
            try:
                return _fused(call, folded)
            except RuntimeError as error:
                _expect_no_engine(error)
                folded.faster[_kind(call)] = False
        return _apart(call, folded)


def _make(call: Call, folded: Folded) -> bool:
    """Folds; False where a later change of the tensors would not be seen."""
    if any(tensor is not None and tensor.is_inference() for tensor in folded.sources):
        return False  # they have no version
    with making(call):
        weight, bias = fold(folded)
        folded.bias = bias.to(weight.dtype)
        # The rows mean, mean_low, invstd, scale and shift: z = (x - 0) * 1 + bias.
        folded.stats = torch.zeros(5, len(bias), dtype=torch.float32, device=bias.device)
        folded.stats[2:4] = 1
        folded.stats[4] = bias
        folded.plain = weight.to(memory_format=_layout(call))
    # The next call may be on another stream.
    torch.cuda.current_stream().synchronize()
    keep(call.conv, folded)
    return True


def _layout(call: Call) -> torch.memory_format:
    return torch.channels_last if call.last else torch.contiguous_format


def _fusible(call: Call) -> bool:
    """Whether cuDNN's fused call may be tried: it is not for autograd, autocast, groups or large tensors, never
    deterministic, and for 16 bits there are engines in channels-last format only."""
    conv, x, residual = call.conv, call.x, call.residual
    cudnn = torch.backends.cudnn
    return (
        call.activation == "relu"
        and conv.groups == 1
        and (
            x.dtype is torch.float32
            or (call.last and x.shape[1] % 8 == 0 and call.shape[1] % 8 == 0)
        )
        and x.numel() <= _MAX_NUMEL
        and math.prod(call.shape) <= _MAX_NUMEL
        and (residual is None or residual.is_contiguous(memory_format=_layout(call)))
        and cudnn.is_available()
        and cudnn.enabled
        and not cudnn.deterministic
        and not torch.are_deterministic_algorithms_enabled()
    )


def _kind(call: Call) -> tuple[torch.Size, torch.dtype, bool, bool]:
    return call.x.shape, call.x.dtype, call.last, call.residual is not None


def _prefers_fused(call: Call, folded: Folded, capturing: bool) -> bool:
    """Some fused convolutions are slower than the two kernels: known from having timed both once."""
    faster, kind = folded.faster, _kind(call)
    known = faster.get(kind)
    if known is not None:
        return known
    if capturing:
        return False
    if len(faster) < _MAX_MEASURED:
        known = _measure(call, folded)
    else:
        known = 2 * sum(faster.values()) > len(faster)
    faster[kind] = known
    return known


def _measure(call: Call, folded: Folded) -> bool:
    try:
        fused = milliseconds(lambda: _fused(call, folded))
    except RuntimeError as error:
        _expect_no_engine(error)
        return False
    return fused < milliseconds(lambda: _apart(call, folded))


def milliseconds(action: Callable[[], object]) -> float:
    """The best of a few runs, on the current stream."""
    for _ in range(_RUNS):
        action()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_RUNS + 1)]
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    events[-1].synchronize()
    return min(start.elapsed_time(end) for start, end in pairwise(events))


def _expect_no_engine(error: RuntimeError) -> None:
    """Raises the error unless it says that cuDNN cannot do such a convolution."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    if out_of_memory or not any(words in str(error) for words in _NO_ENGINE):
        raise error


def _fused(call: Call, folded: Folded) -> Tensor:
    conv, weight, bias = call.conv, folded.plain, folded.bias
    assert weight is not None
    x = call.x.contiguous(memory_format=_layout(call))
    # oneDNN's calls have the padding first.
    geometry: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if call.residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, call.residual, 1.0, bias, *geometry)


def _apart(call: Call, folded: Folded) -> Tensor:
    conv, weight, stats = call.conv, folded.plain, folded.stats
    assert weight is not None and stats is not None
    y = torch.conv2d(call.x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    number = NUMBERS[call.activation]
    result, _ = _C.batch_norm_apply(y, stats, call.residual, number, call.parameter)
    return result
