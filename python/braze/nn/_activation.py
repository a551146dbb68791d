"""The activations that can be fused: one table for all that depends on which there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braze._native import _C


class Activation(NamedTuple):
    """An activation as the kernels know it: ``parameter`` is leaky_relu's slope or elu's alpha, else 0."""

    name: str
    parameter: float = 0.0


ActivationLike = str | nn.Module | type[nn.Module] | Callable[..., Any] | None


class Row(NamedTuple):
    """What Python knows of an activation; its formula and its number are in csrc/math/activation.h."""

    of_torch: Callable[[Tensor, float], Tensor]
    modules: tuple[type[nn.Module], ...]
    functions: tuple[Any, ...]
    parameter: str = ""  # torch's name of the kernels' parameter
    default: float = 0.0
    # torch's other arguments, in their order: with other values it is no activation of this row. A function's
    # defaults are those of the first row that has it.
    fixed: Mapping[str, Any] = {}
    # oneDNN's name for it after a convolution, its scalars (else the parameter) and its algorithm.
    post_op: tuple[str, list[float], str] | None = None

    def __call__(self, z: Tensor, parameter: float) -> Tensor:
        """In torch's operations."""
        return self.of_torch(z, parameter)


ACTIVATIONS: dict[str, Row] = {
    "identity": Row(lambda z, _: z, (nn.Identity,), (), post_op=("none", [], "")),
    "relu": Row(
        lambda z, _: F.relu(z),
        (nn.ReLU,),
        (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        post_op=("relu", [], ""),
    ),
    "hardtanh": Row(
        lambda z, _: F.hardtanh(z),
        (nn.Hardtanh,),
        (F.hardtanh, F.hardtanh_),
        fixed={"min_val": -1.0, "max_val": 1.0},
        post_op=("hardtanh", [-1.0, 1.0], ""),
    ),
    "relu6": Row(
        lambda z, _: F.relu6(z),
        (nn.ReLU6, nn.Hardtanh),
        (F.relu6, F.hardtanh, F.hardtanh_),
        fixed={"min_val": 0.0, "max_val": 6.0},
        post_op=("hardtanh", [0.0, 6.0], ""),
    ),
    "leaky_relu": Row(
        lambda z, slope: F.leaky_relu(z, slope),
        (nn.LeakyReLU,),
        (F.leaky_relu, F.leaky_relu_),
        parameter="negative_slope",
        default=0.01,
        post_op=("leaky_relu", [], ""),
    ),
    "elu": Row(
        lambda z, alpha: F.elu(z, alpha), (nn.ELU,), (F.elu, F.elu_), parameter="alpha", default=1.0
    ),
    "sigmoid": Row(
        lambda z, _: torch.sigmoid(z),
        (nn.Sigmoid,),
        (F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_),
        post_op=("sigmoid", [], ""),
    ),
    "tanh": Row(
        lambda z, _: torch.tanh(z),
        (nn.Tanh,),
        (F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
        post_op=("tanh", [], ""),
    ),
    "silu": Row(lambda z, _: F.silu(z), (nn.SiLU,), (F.silu,), post_op=("swish", [], "")),
    "gelu": Row(
        lambda z, _: F.gelu(z),
        (nn.GELU,),
        (F.gelu,),
        fixed={"approximate": "none"},
        post_op=("gelu", [], "none"),
    ),
    "gelu_tanh": Row(
        lambda z, _: F.gelu(z, approximate="tanh"),
        (nn.GELU,),
        (F.gelu,),
        fixed={"approximate": "tanh"},
        post_op=("gelu", [], "tanh"),
    ),
    "hardswish": Row(
        lambda z, _: F.hardswish(z), (nn.Hardswish,), (F.hardswish,), post_op=("hardswish", [], "")
    ),
    "hardsigmoid": Row(
        lambda z, _: F.hardsigmoid(z),
        (nn.Hardsigmoid,),
        (F.hardsigmoid,),
        post_op=("hardsigmoid", [], ""),
    ),
    "mish": Row(lambda z, _: F.mish(z), (nn.Mish,), (F.mish,)),
    "softplus": Row(
        lambda z, _: F.softplus(z),
        (nn.Softplus,),
        (F.softplus,),
        fixed={"beta": 1.0, "threshold": 20.0},
    ),
}
NAMES: tuple[str, ...] = tuple(_C.ACTIVATION_SLOPES)  # in the order of their numbers
NUMBERS = {name: number for number, name in enumerate(NAMES)}


def parameter_of(name: str, **options: float) -> float:
    """The kernels' parameter of activation ``name``, of options called as torch calls them."""
    row = ACTIVATIONS[name]
    return float(options.get(row.parameter, row.default))


def resolve(
    activation: ActivationLike, negative_slope: float = ACTIVATIONS["leaky_relu"].default
) -> Activation:
    """Which fused activation ``activation`` stands for.

    Args:
        activation: a name, None for identity, an ``nn.Module`` or module class such as ``nn.SiLU()`` or
            ``nn.ReLU``, a function such as ``F.relu``, or a ``functools.partial`` of one.
        negative_slope: leaky_relu's slope where ``activation`` does not bring its own.

    Raises:
        ValueError: there is no such activation. TypeError: it is none of the kinds above.
    """
    if activation is None:
        return Activation("identity")
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise _unknown(activation)
        return Activation(activation, parameter_of(activation, negative_slope=negative_slope))
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        if not any(activation in row.modules for row in ACTIVATIONS.values()):
            raise _unknown(activation)
        activation = activation()
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
    keywords.pop("inplace", None)
    return _of_function(activation, function, keywords, negative_slope)


def _of_module(module: nn.Module) -> Activation:
    found = (
        (name, row)
        for name, row in ACTIVATIONS.items()
        if type(module) in row.modules
        and all(getattr(module, key) == value for key, value in row.fixed.items())
    )
    name, row = next(found, (None, None))
    if name is None or row is None:
        raise _unknown(module)
    if has_hooks(module):
        raise ValueError(
            f"activation={module!r} has hooks, which would never run: a fused activation is computed "
            "inside the kernel. Remove the hooks, or use the activation as a layer of its own"
        )
    return Activation(name, float(getattr(module, row.parameter, row.default)))


def _of_function(
    given: Any, function: Any, keywords: dict[str, Any], negative_slope: float
) -> Activation:
    rows = list(_rows_of(function))
    for name, row in rows:
        options = {"negative_slope": negative_slope, **keywords}
        fixed = {**rows[0][1].fixed, **keywords}
        fixed.pop(row.parameter, None)
        if fixed == row.fixed:
            return Activation(name, parameter_of(name, **options))
    raise _unknown(given)


def _rows_of(function: object) -> Iterator[tuple[str, Row]]:
    return ((name, row) for name, row in ACTIVATIONS.items() if function in row.functions)


def is_activation_function(function: object) -> bool:
    return any(_rows_of(function))


def positional_names(function: object) -> tuple[str, ...]:
    """The names of a function's arguments after the first; there may be fewer."""
    _, row = next(_rows_of(function))
    return (*((row.parameter,) if row.parameter else ()), *row.fixed, "inplace")


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
