"""The activations that can be fused, by name, and what else may stand for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Activation(NamedTuple):
    """An activation as the kernels know it: ``parameter`` is leaky_relu's slope or elu's alpha, else 0."""

    name: str
    parameter: float = 0.0


ActivationLike = str | nn.Module | type[nn.Module] | Callable[..., Any] | None

NAMES = (
    "identity",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "sigmoid",
    "tanh",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
    "hardsigmoid",
    "mish",
)
_DEFAULT_SLOPE = 0.01
_DEFAULT_ALPHA = 1.0

_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Mish: "mish",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    torch.Tensor.relu: "relu",
    torch.Tensor.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.elu: "elu",
    F.elu_: "elu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    torch.Tensor.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    torch.Tensor.tanh: "tanh",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.mish: "mish",
}
# Keyword arguments that functools.partial may have bound, and which name each belongs to.
_KEYWORDS = {"negative_slope": "leaky_relu", "alpha": "elu", "approximate": "gelu"}


def resolve(activation: ActivationLike, negative_slope: float = _DEFAULT_SLOPE) -> Activation:
    """Which fused activation ``activation`` stands for.

    Args:
        activation: one of the thirteen names, None for identity, an ``nn.Module`` or module class such as
            ``nn.SiLU()`` or ``nn.ReLU``, a function such as ``F.relu``, or a ``functools.partial`` of one.
        negative_slope: leaky_relu's slope where ``activation`` does not bring its own.

    Raises:
        ValueError: there is no such activation. TypeError: it is none of the kinds above.
    """
    if activation is None:
        return Activation("identity")
    if isinstance(activation, str):
        return _named(activation, activation, negative_slope)
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        if activation in _MODULES:
            activation = activation()
        else:
            raise _unknown(activation)
    if isinstance(activation, nn.Module):
        return _of_module(activation)
    keywords: dict[str, Any] = {}
    function: Any = activation
    if isinstance(activation, functools.partial):
        if activation.args:
            raise _unknown(activation)
        function, keywords = activation.func, dict(activation.keywords)
    if not callable(function):
        raise TypeError(
            "activation must be a name, None, an nn.Module or a function, got "
            f"{type(activation).__name__}"
        )
    return _of_function(activation, function, keywords, negative_slope)


def _named(
    given: Any, name: str, negative_slope: float, alpha: float = _DEFAULT_ALPHA
) -> Activation:
    if name not in NAMES:
        raise _unknown(given)
    if name == "leaky_relu":
        return Activation(name, float(negative_slope))
    return Activation(name, float(alpha) if name == "elu" else 0.0)


def _of_module(module: nn.Module) -> Activation:
    kind = type(module)
    if kind is nn.Hardtanh and (module.min_val, module.max_val) == (0.0, 6.0):
        name = "relu6"
    elif kind in _MODULES:
        name = _MODULES[kind]
    else:
        raise _unknown(module)
    if has_hooks(module):
        raise ValueError(
            f"activation={module!r} has hooks, which would never run: a fused activation is computed "
            "inside the kernel. Remove the hooks, or use the activation as a layer of its own"
        )
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        name = "gelu_tanh"
    slope = getattr(module, "negative_slope", _DEFAULT_SLOPE)
    return _named(module, name, slope, getattr(module, "alpha", _DEFAULT_ALPHA))


def _of_function(
    given: Any, function: Any, keywords: dict[str, Any], negative_slope: float
) -> Activation:
    name = _FUNCTIONS[function] if is_activation_function(function) else None
    keywords.pop("inplace", None)
    if name is None or any(_KEYWORDS.get(key) != name for key in keywords):
        raise _unknown(given)
    if keywords.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    slope = keywords.get("negative_slope", negative_slope)
    return _named(given, name, slope, keywords.get("alpha", _DEFAULT_ALPHA))


def is_activation_function(function: object) -> bool:
    try:
        return function in _FUNCTIONS
    except TypeError:  # not hashable
        return False


def _unknown(activation: Any) -> ValueError:
    return ValueError(
        f"activation={activation!r} cannot be fused; use one of {', '.join(NAMES)}, or None, or the "
        "torch.nn module or torch.nn.functional function of one of them (nn.SiLU(), nn.GELU('tanh'), "
        "F.relu). For any other, use activation=None and the activation as a layer of its own"
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its ``forward``, or another one than its class's."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
