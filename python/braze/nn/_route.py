"""Which calls the kernels take; all others are compositions of torch's own operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack

from braze import _native
from braze._native import _C

# A subclass of these may mean anything, and its own torch function or dispatch decides.
_PLAIN = frozenset((Tensor, Parameter, FakeTensor, FunctionalTensor))
WIDE = frozenset((torch.float32, torch.float64))
HALF = frozenset((torch.bfloat16, torch.float16))
DTYPES = WIDE | HALF


class Norm(NamedTuple):
    """What belongs to one normalised tensor beside its elements, in the operators' order."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1  # None: the average over num_batches_tracked
    eps: float = 1e-5


def ops() -> Any:
    """The operators: torch.ops where a compiler must see them, else by pybind11, which is faster."""
    return torch.ops.braze if torch.compiler.is_compiling() else _C


def is_plain(tensor: object) -> bool:
    return type(tensor) in _PLAIN


def watched() -> bool:
    """Whether a program's TorchFunctionMode wants to see torch's functions. torch's own modes, of
    ``torch.set_default_device`` and of tracers, have no use for those that braze stands for."""
    return torch._C._len_torch_function_stack() > 0 and any(
        not type(mode).__module__.startswith("torch.")
        for mode in _get_current_function_mode_stack()
    )


def transformed() -> bool:
    """Whether this call is not simply to be computed: functorch's transforms, forward-mode AD, a trace or an
    export, which should not need braze to be run, a mode that watches."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        # Not is_exporting(), which older versions of dynamo take for True in everything they compile.
        return bool(getattr(torch.compiler, "_is_exporting_flag", False))
    return torch._C._get_tracing_state() is not None or watched()


def takes_activation(input: Tensor) -> bool:
    """Whether a kernel can read ``input`` as [N, C, ...]. Raises RuntimeError if CUDA kernels are missing."""
    if type(input) not in _PLAIN or input.dtype not in DTYPES or input.layout is not torch.strided:
        return False
    if input.is_cuda:
        if _native.CUDA_FILE is None and type(input) is not FakeTensor:
            raise RuntimeError(
                f"batch_norm: input is on {input.device}, but braze has no CUDA kernels here: "
                f"{_native.cuda_missing()}. To use torch's implementation instead, take the module from "
                "torch.nn"
            )
    elif not input.is_cpu:
        return False
    return input.dim() >= 2 and input.shape[1] > 0


def takes_vectors(norm: Norm, channels: int, dtype: torch.dtype, beside: Tensor) -> bool:
    """Whether the vectors fit such an input on the device of ``beside``; where not, torch has words for it."""
    wide = dtype in WIDE
    for running, pair in enumerate((norm[:2], norm[2:4])):
        first = None
        for vector in pair:
            if vector is None:
                continue
            if first is None:
                first = vector
                if type(vector) not in _PLAIN or (
                    vector.dtype != dtype and (wide or vector.dtype is not torch.float32)
                ):
                    return False
            elif type(vector) not in _PLAIN or vector.dtype != first.dtype:
                return False
            if running and vector.requires_grad:
                return False
            if vector.dim() != 1 or vector.shape[0] != channels or not _beside(vector, beside):
                return False
    return (norm.running_mean is None) == (norm.running_var is None)


def takes_addend(input: Tensor, addend: Tensor) -> bool:
    """Whether a kernel can add ``addend``, element by element."""
    return (
        type(addend) in _PLAIN
        and addend.shape == input.shape
        and addend.dtype in DTYPES
        # A sum in fp64 would need parameters in fp64.
        and (addend.dtype is not torch.float64 or input.dtype is torch.float64)
        and addend.layout is torch.strided
        and _beside(addend, input)
    )


def _beside(tensor: Tensor, input: Tensor) -> bool:
    return tensor.is_cpu if input.is_cpu else tensor.device == input.device


def takes_statistics(norm: Norm) -> bool:
    """Whether the batch's statistics can be taken and kept: no average without a count."""
    _, _, running_mean, _, num_batches_tracked, momentum, eps = norm
    return (
        eps > 0.0
        and (running_mean is not None or num_batches_tracked is None)
        and (momentum is not None or running_mean is None or num_batches_tracked is not None)
    )


def takes_batch_norm(input: Tensor, norm: Norm, training: bool) -> bool:
    """Whether the kernels do what torch's batch_norm would; where it raises, it should do so itself."""
    if transformed() or not takes_activation(input) or input.numel() == 0:
        return False
    channels = input.shape[1]
    if not takes_vectors(norm, channels, input.dtype, input):
        return False
    if training is True:
        return input.numel() != channels and takes_statistics(norm)  # more than one value each
    return training is False and norm.running_mean is not None and norm.eps >= 0.0
