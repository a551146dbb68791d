"""What a block was called with, as far as its forward may depend on it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from braze.nn._route import is_plain

__all__ = ["default_kinds", "kinds_of"]

ONE_TENSOR: tuple[tuple[Any, ...], tuple[Any, ...]] = (("tensor",), ())
_CONSTANTS = (type(None), bool, int, float, str)


class _Unknown(Exception):
    pass


def _kind(value: Any, tensors: list[Tensor]) -> Any:
    if is_plain(value):
        tensors.append(value)
        return "tensor"
    if type(value) in _CONSTANTS:
        return (type(value), value)
    if type(value) in (list, tuple):
        return (type(value), tuple(_kind(item, tensors) for item in value))
    raise _Unknown


def kinds_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]] | None:
    """The kinds of a call's arguments and the tensors among them, or None if there is one of no known kind."""
    tensors: list[Tensor] = []
    try:
        kinds = tuple(_kind(value, tensors) for value in args)
        names = tuple((name, _kind(kwargs[name], tensors)) for name in sorted(kwargs))
    except _Unknown:
        return None
    return (kinds, names), tensors


def default_kinds(module: nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Those of a call with a tensor for each argument that has no default."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ONE_TENSOR
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return tuple("tensor" for _ in needed) or ("tensor",), ()
