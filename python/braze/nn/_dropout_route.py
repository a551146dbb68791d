"""Which dropout calls the kernels take, and the way of each call: kernels, a composition of torch's
operations, or torch's own function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

from braze._native import _C
from braze.nn._route import is_plain

OPS = torch.ops.braze


def overridden(*inputs: Tensor) -> bool:
    """Whether a class of tensors or a mode has its own way with torch's functions; that of
    ``torch.set_default_device`` has none with a dropout."""
    return has_torch_function(inputs) and (
        torch.compiler.is_compiling()
        or not all(map(is_plain, inputs))
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    )


def check_p(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def _keep(input: Tensor, p: float, feature: bool, generator: Generator | None) -> Tensor:
    """A mask by torch's own random numbers, as functorch's transforms need them."""
    shape = list(input.shape)
    if feature:
        shape[2:] = [1] * (len(shape) - 2)
    keep = 1 - round(p * 65536) / 65536
    return input.new_empty(shape).bernoulli_(keep, generator=generator) != 0


def _composite(
    input: Tensor, p: float, alpha: bool, feature: bool, generator: Generator | None
) -> Tensor:
    scale, shift, dropped = _C.dropout_terms(p, alpha)
    scaled = input * scale
    if alpha:
        scaled = scaled + shift
    return torch.where(_keep(input, p, feature, generator), scaled, dropped)


def distinct(input: Tensor) -> Tensor:
    """Compilers merge equal calls, but never two ``empty``."""
    return torch.empty(0, device=input.device)


def drop(
    input: Tensor,
    p: float,
    inplace: bool,
    alpha: bool,
    feature: bool,
    generator: Generator | None,
    torch_function: Callable[..., Tensor],
) -> Tensor:
    if torch.compiler.is_compiling():
        if not compilable(input):
            return torch_function(input, p, True, inplace)
        output: Tensor = OPS.dropout(
            input, p, alpha, feature, generator=generator, distinct=distinct(input)
        )[0]
        return input.copy_(output) if inplace else output
    if _C.dropout_takes(input):
        if not inplace:
            return _C.dropout(input, p, alpha, feature, generator, None)[0]
        _C.dropout_(input, p, alpha, feature, generator)
        return input
    if not _is_composite(input):
        if generator is not None:
            raise ValueError(
                f"generator: torch's own dropout takes none, and braze has no kernels for "
                f"{input.dtype} on {input.device} ({input.layout}); seed the default generator"
            )
        return torch_function(input, p, True, inplace)
    output = _composite(input, p, alpha, feature, generator)
    return input.copy_(output) if inplace else output


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compilable(input: Tensor) -> bool:
    return (
        input.dtype in _DTYPES
        and input.layout is torch.strided
        and (
            input.device.type == "cpu" or (input.device.type == "cuda" and "cuda" in _C.backends())
        )
    )


def _is_composite(input: Tensor) -> bool:
    """Kept from the kernels by a transform alone."""
    return input.dtype in _DTYPES and input.layout is torch.strided and not input.is_meta


def taken(input: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return compilable(input)
    return _C.dropout_takes(input)
