"""What a node of a traced graph is: an activation, an addition, a dropout, a batch norm, nothing at all."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from braze._fusion import calls
from braze.nn import dropout as braze_dropout
from braze.nn import functional as braze_functional
from braze.nn._activation import (
    Activation,
    has_hooks,
    is_activation_function,
    positional_names,
    resolve,
)
from braze.nn._norms import full_name, norm_activation

__all__ = [
    "activation_of",
    "addition_of",
    "dropout_of",
    "following",
    "is_fresh",
    "is_identity",
    "may_write",
    "norm_of",
    "passes_through",
    "same_activation",
    "still_identity",
    "uses",
]

Modules = dict[str, nn.Module]

# The name may stand for either when a forward looks it up, and torch's hands its name's on.
_DROPOUT_FUNCTIONS = (F.dropout, braze_functional.dropout)
_ALL_DROPOUTS = frozenset(braze_dropout.REPLACED) | frozenset(braze_dropout.REPLACED.values())
# In eval(), or with this attribute zero, they return their input.
_SKIPPABLE: dict[str, str] = {
    "torchvision.ops.stochastic_depth.StochasticDepth": "p",
    "timm.layers.drop.DropPath": "drop_prob",
}
_FRESH = (nn.Linear, nn.modules.conv._ConvNd)


def uses(node: Node) -> int:
    """How often its value is used, counting each argument."""
    count = 0

    def see(argument: Node) -> Node:
        nonlocal count
        count += argument is node
        return argument

    for user in node.users:
        torch.fx.map_arg((user.args, user.kwargs), see)
    return count


def following(node: Node) -> Node:
    """The node that runs after it, so that nothing else is moved by making one call of two."""
    node = node.next
    while node.op == "get_attr":
        node = node.next
    return node


def _only_argument(node: Node) -> Node | None:
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], Node):
        return node.args[0]
    return None


class ActivationNode(NamedTuple):
    activation: Activation
    operand: Node
    inplace: bool


def same_activation(expected: Activation) -> Any:
    """A guard: the module is still this activation."""

    def holds(module: nn.Module) -> bool:
        try:
            return resolve(module) == expected  # refuses hooks
        except (TypeError, ValueError):
            return False

    return holds


def activation_of(node: Node, modules: Modules) -> ActivationNode | None:
    operand = node.args[0] if node.args else None
    if not isinstance(operand, Node):
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if _only_argument(node) is None or type(module) is nn.Identity:
            return None
        try:
            found = resolve(module)
        except (TypeError, ValueError):
            return None
        return ActivationNode(found, operand, bool(getattr(module, "inplace", False)))
    if node.op == "call_method":
        method = getattr(Tensor, str(node.target), None)
        if not is_activation_function(method) or _only_argument(node) is None:
            return None
        return ActivationNode(resolve(method), operand, str(node.target).endswith("_"))
    if node.op != "call_function" or not is_activation_function(node.target):
        return None
    function: Any = node.target
    names = positional_names(function)
    if len(node.args) - 1 > len(names):
        return None
    keywords = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if any(isinstance(value, Node) for value in keywords.values()):
        return None
    inplace = bool(keywords.get("inplace")) or function.__name__.endswith("_")
    try:
        return ActivationNode(resolve(functools.partial(function, **keywords)), operand, inplace)
    except (TypeError, ValueError):
        return None


class Addition(NamedTuple):
    left: Node
    right: Node
    inplace: bool


def addition_of(node: Node) -> Addition | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if not (isinstance(left, Node) and isinstance(right, Node)) or left is right:
        return None
    if node.op == "call_function" and node.target in (operator.add, torch.add):
        return Addition(left, right, False)
    if node.op == "call_function" and node.target is operator.iadd:
        return Addition(left, right, True)
    if node.op == "call_method" and node.target in ("add", "add_"):
        return Addition(left, right, node.target == "add_")
    return None


class DropoutNode(NamedTuple):
    operand: Node
    p: Any  # constants, or None: those of the module
    training: Any
    inplace: bool


def dropout_of(node: Node, modules: Modules) -> DropoutNode | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        operand = _only_argument(node)
        if operand is None or not calls.is_dropout(module):
            return None
        return DropoutNode(operand, None, None, bool(module.inplace))
    if node.op != "call_function" or node.target not in _DROPOUT_FUNCTIONS or len(node.args) > 4:
        return None
    names = ("input", "p", "training", "inplace")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    operand = given.get("input")  # type: ignore[assignment]
    values = (given.get("p", 0.5), given.get("training", True), given.get("inplace", False))
    if not isinstance(operand, Node) or any(isinstance(value, Node) for value in values):
        return None
    return DropoutNode(operand, values[0], values[1], bool(values[2]))


def norm_of(node: Node, modules: Modules) -> Activation | None:
    """The activation that the batch norm ends with itself; None: it is none, or is seen by hooks."""
    if node.op != "call_module" or _only_argument(node) is None:
        return None
    module = modules[str(node.target)]
    return None if has_hooks(module) else norm_activation(module)


def is_identity(module: nn.Module, training: bool) -> bool:
    """Whether calling it in this mode gives its very input."""
    if has_hooks(module):
        return False
    kind = type(module)
    if kind is nn.Identity:
        return True
    attribute = _SKIPPABLE.get(full_name(kind))
    if attribute is not None:
        return not training or getattr(module, attribute) in (0, None)
    return kind in _ALL_DROPOUTS and not training


def still_identity(module: nn.Module) -> bool:
    return is_identity(module, module.training)


def passes_through(node: Node, modules: Modules, training: bool) -> Node | None:
    """The node whose value this one has, because it does nothing."""
    operand = _only_argument(node)
    if node.op == "call_module" and operand is not None:
        return operand if is_identity(modules[str(node.target)], training) else None
    dropout = dropout_of(node, modules)
    return dropout.operand if dropout is not None and dropout.training is False else None


def is_fresh(node: Node, modules: Modules) -> bool:
    """Whether its value is a tensor that nobody else can know."""
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    return isinstance(module, _FRESH) or norm_of(node, modules) is not None


def may_write(node: Node, modules: Modules) -> bool:
    """Whether it might change one of its arguments."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        library = type(module).__module__.startswith(("torch.nn.modules.", "braze.nn."))
        container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        return not library or container or bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")  # dunders too
    if node.op != "call_function" or node.target in calls.ALLOCATING:
        return False
    name = getattr(node.target, "__name__", "_")
    if name.endswith("_") or name in ("setitem", "delitem", *torch.fx.graph.inplace_methods):
        return True
    flags = [*node.args, *node.kwargs.values()]
    return "out" in node.kwargs or any(flag is True for flag in flags)
