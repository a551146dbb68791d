"""Finds what can be fused in a block's graph, and rewrites the graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from braze._fusion import calls
from braze._fusion.guards import Guards
from braze._fusion.nodes import (
    Modules,
    activation_of,
    addition_of,
    dropout_of,
    is_fresh,
    may_write,
    norm_of,
    passes_through,
    same_activation,
    still_identity,
    uses,
)
from braze.nn._activation import Activation
from braze.nn._conv_bn import CONVS
from braze.nn._norms import NORMS, same_norm

__all__ = ["Fusion", "rewrite"]

_ALLOCATING = frozenset(
    (
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.matmul,
        torch.cat,
        torch.mul,
    )
)


class Fusion(NamedTuple):
    """What became one call: "conv+bn+add+relu", and the names of its modules within the block."""

    kind: str
    modules: tuple[str, ...]
    norms: tuple[str, ...]
    follows: bool  # an activation or a sum is part of it


@dataclass
class _Norm:
    """A batch norm's node and what is in front of it."""

    node: Node
    own: Activation
    source: Node
    conv: Node | None = None

    @property
    def members(self) -> list[Node]:
        return [self.node] if self.conv is None else [self.conv, self.node]


@dataclass
class _Match:
    norm: _Norm
    activation: Activation
    last: Node
    members: list[Node] = field(default_factory=list)  # besides the norms'
    activation_node: Node | None = None
    residual: Node | None = None
    second: _Norm | None = None
    stored: str = ""  # the sum in place is stored in, and has the dtype of: "norm" or "residual"


class _Rewriter:
    def __init__(self, graph: Graph, modules: Modules, guards: Guards) -> None:
        self.graph = graph
        self.modules = modules
        self.guards = guards
        self.fusions: list[Fusion] = []

    # --- what is there ---

    def skip_what_does_nothing(self, training: bool) -> None:
        for node in list(self.graph.nodes):
            operand = passes_through(node, self.modules, training)
            if operand is None:
                continue
            if node.op == "call_module":
                self.guards.holds(str(node.target), still_identity)
            node.replace_all_uses_with(operand)
            self.graph.erase_node(node)

    def number(self) -> None:
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}

    def between(self, first: Node, last: Node, members: list[Node]) -> list[Node]:
        a, b = self.order[first], self.order[last]
        return [n for n, i in self.order.items() if a < i < b and n not in members]

    def may_move(self, watched: Node, first: Node, last: Node, members: list[Node]) -> bool:
        """Whether ``watched`` can be read at ``last`` instead of at ``first``: nobody writes it before."""
        writers = [n for n in self.between(first, last, members) if may_write(n, self.modules)]
        aliases = self._aliases(watched) if writers else set()
        return not any(argument in aliases for n in writers for argument in n.all_input_nodes)

    def _aliases(self, node: Node, past: Node | None = None) -> set[Node]:
        """Every node that might share memory with ``node``: unless an operation between allocates."""
        found, open_ = {node}, [node]
        while open_:
            current = open_.pop()
            near = list(current.users)
            if current.op == "placeholder":  # a caller may give the same tensor twice
                near += [n for n in self.graph.nodes if n.op == "placeholder"]
            elif not self._allocates(current):
                near += current.all_input_nodes
            for other in near:
                allocated = other in current.users and self._allocates(other)
                if other in found or other is past or allocated:
                    continue
                found.add(other)
                open_.append(other)
        return found

    def is_private(self, value: Node, last: Node) -> bool:
        """Whether nobody could tell that ``last`` writes ``value``: its memory is read by nobody else later."""
        for node in self._aliases(value, last):
            if node.op in ("placeholder", "get_attr"):
                return False
            if any(self.order[user] > self.order[last] for user in node.users):
                return False
        return uses(value) == 1

    def _allocates(self, node: Node) -> bool:
        if is_fresh(node, self.modules):
            return True
        if node.op == "call_function":
            return node.target in calls.ALLOCATING or node.target in _ALLOCATING
        addition = addition_of(node)
        return addition is not None and not addition.inplace

    def norm_at(self, node: Node) -> _Norm | None:
        own = norm_of(node, self.modules)
        if own is None:
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        found = _Norm(node, own, source)
        if (
            source.op == "call_module"
            and isinstance(self.modules[str(source.target)], CONVS)
            and len(source.args) == 1
            and not source.kwargs
            and isinstance(source.args[0], Node)
            and uses(source) == 1
        ):
            found.conv = source
        return found

    # --- batch norms ---

    def grow(self, norm: _Norm) -> _Match:
        """As far as the values between are used for nothing else."""
        match = _Match(norm, norm.own, norm.node)
        if norm.own.name != "identity" or uses(norm.node) != 1:
            return match
        user = next(iter(norm.node.users))
        addition = addition_of(user)
        if addition is not None:
            other = addition.right if addition.left is norm.node else addition.left
            stored = ""
            if addition.inplace:
                stored = "norm" if addition.left is norm.node else "residual"
            if stored == "residual" and not self.is_private(other, user):
                return match
            grown = _Match(norm, norm.own, user, [user], None, other, None, stored)
            second = self.norm_at(other)
            if second is not None and second.own.name == "identity" and uses(other) == 1:
                grown.second = second
            if grown.second is not None and not self._sum_may_move(grown):
                grown.second = None
            if not self._sum_may_move(grown):
                return match
            match = grown
            if uses(user) != 1:
                return match
            user = next(iter(user.users))
        activation = activation_of(user, self.modules)
        if activation is None:
            return match
        final = _Match(
            norm,
            activation.activation,
            user,
            [*match.members, user],
            user,
            match.residual,
            match.second,
            match.stored,
        )
        return final if self._sum_may_move(final) else match

    def _sum_may_move(self, match: _Match) -> bool:
        members = self._members(match)
        norms = [match.norm] + ([match.second] if match.second else [])
        for norm in norms:
            if not self.may_move(norm.source, norm.node, match.last, members):
                return False
            if any(
                other.op == "call_module"
                and self.modules[str(other.target)] is self.modules[str(norm.node.target)]
                for other in self.between(norm.node, match.last, members)
            ):
                return False  # statistics would be updated in another order
        if match.second is not None:
            first, second = (self.modules[str(norm.node.target)] for norm in norms)
            return first is not second
        if match.residual is not None and match.members:
            return self.may_move(match.residual, match.members[0], match.last, members)
        return True

    def _members(self, match: _Match) -> list[Node]:
        second = match.second.members if match.second else []
        return [*match.norm.members, *second, *match.members]

    def _keep_conv(self, norm: _Norm, match: _Match) -> None:
        """A convolution is part of the call unless its input could be written before it."""
        if norm.conv is None:
            return
        source = norm.conv.args[0]
        assert isinstance(source, Node)
        members = self._members(match)
        repeated = any(
            other.op == "call_module" and other.target == norm.conv.target
            for other in self.between(norm.conv, match.last, members)
        )
        if repeated or not self.may_move(source, norm.conv, match.last, members):
            norm.conv = None

    def module(self, node: Node | None) -> Node | None:
        """The module that ``node`` calls, as a value."""
        return None if node is None else self.graph.get_attr(str(node.target))

    def replace_norm(self, match: _Match) -> None:
        for norm in [match.norm] + ([match.second] if match.second else []):
            self._keep_conv(norm, match)
        norm, second = match.norm, match.second
        plain = type(self.modules[str(norm.node.target)]) in NORMS
        if match.last is norm.node and norm.conv is None and plain and norm.own.name == "identity":
            return  # the module itself does it
        kinds = ["bn"] if norm.conv is None else ["conv", "bn"]
        members = self._members(match)
        with self.graph.inserting_before(match.last):
            first = (self.module(norm.conv), self.module(norm.node), _input(norm))
            act = (match.activation.name, match.activation.parameter)
            if second is not None:
                kinds.append("bn" if second.conv is None else "conv+bn")
                both = (*first, self.module(second.conv), self.module(second.node), _input(second))
                fused = self.graph.call_function(calls.norm_add_act, (*both, *act, match.stored))
            else:
                join = () if match.residual is None else (match.residual, match.stored)
                fused = self.graph.call_function(calls.norm_act, (*first, *act, *join))
        if match.residual is not None:
            kinds.append("add")
        if match.activation.name != "identity":
            kinds.append(match.activation.name)
        norms = [n for n in (norm, second) if n is not None]
        self._replace(match.last, fused, members)
        for found in norms:
            own = found.own
            self.guards.holds(str(found.node.target), same_norm(own))
            self.guards.quiet(str(found.node.target))
        self._guard_activation(match.activation_node, match.activation)
        self._record(kinds, members, [str(n.node.target) for n in norms])

    def _guard_activation(self, node: Node | None, activation: Activation) -> None:
        if node is not None and node.op == "call_module":
            self.guards.holds(str(node.target), same_activation(activation))

    def _record(self, kinds: list[str], members: list[Node], norms: list[str]) -> None:
        names = [str(node.target) for node in members if node.op == "call_module"]
        follows = kinds[-1] not in ("conv", "bn", "conv+bn")
        self.fusions.append(Fusion("+".join(kinds), tuple(names), tuple(norms), follows))

    def _replace(self, last: Node, fused: Node, members: list[Node]) -> None:
        last.replace_all_uses_with(fused)
        for member in sorted(members, key=self.order.__getitem__, reverse=True):
            self.graph.erase_node(member)
        self.number()

    # --- dropout ---

    def replace_dropout(self, node: Node) -> None:
        dropout = dropout_of(node, self.modules)
        if dropout is None:
            return
        source = dropout.operand
        private = uses(source) == 1 and is_fresh(source, self.modules)
        activation = activation_of(source, self.modules)
        if activation is not None and uses(source) == 1:
            operand = activation.operand
            if activation.inplace and not (uses(operand) == 1 and is_fresh(operand, self.modules)):
                return
            if not self.may_move(operand, source, node, [source, node]):
                return
            act = (activation.activation.name, activation.activation.parameter)
            members, kind = [source, node], f"{act[0]}+dropout"
            first: tuple[Any, ...] = (operand, *act)
            function: Any = calls.act_dropout
            last = node
            self._guard_activation(source, activation.activation)
        else:
            if (dropout.inplace and not private) or uses(node) != 1:
                return
            last = next(iter(node.users))
            addition = addition_of(last)
            if addition is None:
                return
            other = addition.right if addition.left is node else addition.left
            # In eval() dropout gives its very input, which an addition in place would change.
            if addition.inplace and not (addition.left is node and private):
                return
            if not self.may_move(source, node, last, [node, last]):
                return
            members, kind = [node, last], "dropout+add"
            first = (source, other, addition.inplace)
            function = calls.dropout_add
        with self.graph.inserting_before(last):
            if node.op == "call_module":
                rest: tuple[Any, ...] = (self.module(node),)
                self.guards.holds(str(node.target), calls.is_dropout)
            else:
                rest = (None, dropout.p, dropout.training)
            fused = self.graph.call_function(function, (*first, *rest))
        self._replace(last, fused, members)
        self._record([kind], members, [])


def _input(norm: _Norm) -> Any:
    return norm.source if norm.conv is None else norm.conv.args[0]


def rewrite(
    graph: Graph, modules: Modules, guards: Guards, training: bool, dropout: bool
) -> list[Fusion]:
    """Fuses in ``graph`` what can be; ``guards`` gets the conditions. Returns what was fused."""
    rewriter = _Rewriter(graph, modules, guards)
    rewriter.skip_what_does_nothing(training)
    rewriter.number()
    # Joins of two first: none of the two must be fused alone before.
    for joins_two in (True, False):
        for node in list(graph.nodes):
            norm = rewriter.norm_at(node) if node in rewriter.order else None
            if norm is not None:
                match = rewriter.grow(norm)
                if (match.second is not None) == joins_two:
                    rewriter.replace_norm(match)
    if dropout:
        for node in list(graph.nodes):
            if node in rewriter.order:
                rewriter.replace_dropout(node)
    return rewriter.fusions
