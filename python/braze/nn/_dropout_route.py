"""The way of a dropout call: kernels, a composition of torch's operations with the kernels' mask, or torch's
own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch._C._functorch import TransformType
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import has_torch_function

from braze import _native
from braze._native import _C
from braze.nn._route import DTYPES, is_plain, watched

OPS = torch.ops.braze
_TRACED = frozenset((FakeTensor, FunctionalTensor))


def overridden(*inputs: Any) -> bool:
    """Whether a class of tensors or a mode has its own way with torch's functions."""
    return has_torch_function(inputs) and (
        torch.compiler.is_compiling() or not all(map(is_plain, inputs)) or watched()
    )


def check_p(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def kernels(input: Tensor) -> Any:
    """Whose functions take this tensor: pybind's; torch.ops', which compilers and tracers see; or None's."""
    if torch.compiler.is_compiling():
        return OPS if _compilable(input) else None
    if _C.dropout_takes(input):
        return _C
    return OPS if type(input) in _TRACED and _compilable(input) else None


def _compilable(input: Tensor) -> bool:
    return (
        input.dtype in DTYPES
        and input.layout is torch.strided
        and (input.is_cpu or (input.is_cuda and _native.CUDA_FILE is not None))
    )


def call(operators: Any, name: str, *arguments: Any, generator: Generator | None) -> Tensor:
    """An operator's output."""
    operator = getattr(operators, name)
    output: Tensor
    if operators is _C:
        output = operator(*arguments, generator, None)[0]
    else:
        # Compilers merge equal calls, but never two `empty`.
        distinct = torch.empty(0, device=arguments[0].device)
        output = operator(*arguments, generator=generator, distinct=distinct)[0]
    return output


def drop(
    torch_function: Callable[..., Tensor],
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
    alpha: bool = False,
    feature: bool = False,
) -> Tensor:
    if overridden(input) or not isinstance(input, Tensor):
        return torch_function(input, p, training, inplace)
    check_p(p)
    if training is not True or p == 0 or input.numel() == 0:
        return torch_function(input, p, training, inplace)
    operators = kernels(input)
    if operators is _C:
        if not inplace:
            return _C.dropout(input, p, alpha, feature, generator, None)[0]
        _C.dropout_(input, p, alpha, feature, generator)
        return input
    if operators is not None:
        output = call(operators, "dropout", input, p, alpha, feature, generator=generator)
    elif _is_composite(input):
        output = _composite(input, p, alpha, feature, generator)
    elif generator is not None:
        raise ValueError(
            f"generator: torch's own dropout takes none, and braze has no kernels for "
            f"{input.dtype} on {input.device} ({input.layout}); seed the default generator"
        )
    else:
        return torch_function(input, p, True, inplace)
    return input.copy_(output) if inplace else output


def _is_composite(input: Tensor) -> bool:
    """Kept from the kernels by a transform, a tangent or a lazy sign alone."""
    return (
        is_plain(input)
        and _compilable(input)
        and not input.is_nested
        and torch._C._get_tracing_state() is None
    )


def _composite(
    input: Tensor, p: float, alpha: bool, feature: bool, generator: Generator | None
) -> Tensor:
    if input.dim() == 0:  # torch makes the tangent of a number's product fp64
        return _composite(input.reshape(1), p, alpha, feature, generator).reshape(())
    scale, shift, dropped = _C.dropout_terms(p, alpha)
    scaled = input * scale
    if alpha:
        scaled = scaled + shift
    return scaled.masked_fill(_drops(input, p, feature, generator), dropped)


def _drops(input: Tensor, p: float, feature: bool, generator: Generator | None) -> Tensor:
    """The kernels' mask; vmap's by torch's own random numbers, whose samples it says how to draw."""
    shape = input.shape[:2] if feature else input.shape
    if _vmapped():
        kept = torch.full(shape, 1 - round(p * 65536) / 65536, device=input.device)
        mask = torch.bernoulli(kept, generator=generator) == 0
    else:
        ones = input.new_ones(shape) if feature else torch.ones_like(input)
        mask = call(OPS, "dropout", ones, p, generator=generator) == 0
    return mask.view(*shape, *[1] * (input.dim() - 2)) if feature else mask


def _vmapped() -> bool:
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == TransformType.Vmap for level in levels)
