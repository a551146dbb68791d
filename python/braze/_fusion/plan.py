"""From a block to the function that does what its forward does, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node

from braze._fusion.chain import forked, link
from braze._fusion.conv_chain import chain_convolutions
from braze._fusion.guards import Guards
from braze._fusion.kinds import default_kinds
from braze._fusion.match import Fusion, rewrite
from braze._fusion.nodes import Modules, activation_of, addition_of, norm_of, passes_through, uses
from braze._fusion.tracing import BlockTracer, Untraceable, trace
from braze.nn._activation import has_hooks
from braze.nn._norms import why_not

__all__ = ["Plan", "is_library_leaf", "original_class", "plan"]

_MAX_INLINED = 16


class Plan(NamedTuple):
    """``run(block, *tensors)`` is the block's forward while ``holds(block)``."""

    run: Callable[..., Any]
    holds: Callable[[nn.Module], bool]
    fusions: tuple[Fusion, ...]
    left: tuple[tuple[str, str], ...]  # batch norms that stay although something follows, and why
    linked: bool  # blocks in it are called as a chain
    forked: Callable[..., Any] | None
    forked_holds: Callable[[nn.Module], bool]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has without fusion."""
    kind: type[nn.Module] = type(module).__dict__.get("_braze_original") or type(module)
    return kind


def is_library_leaf(module: nn.Module) -> bool:
    kind = original_class(module)
    library = kind.__module__.startswith("torch.nn.modules.") and kind is not nn.Sequential
    return library or isinstance(module, torch.jit.ScriptModule)


def _trace_alone(module: nn.Module, training: bool) -> BlockTracer | None:
    if is_library_leaf(module) or has_hooks(module):
        return None
    kinds, names = default_kinds(module)
    if len(kinds) != 1:
        return None
    try:
        return trace(module, original_class(module).forward, kinds, names, training)
    except Untraceable:
        return None


def _through(node: Any, modules: Modules, training: bool) -> Any:
    """The node whose value this one has, past what does nothing."""
    while (
        isinstance(node, Node) and (before := passes_through(node, modules, training)) is not None
    ):
        node = before
    return node


def _ends_with_norm(module: nn.Module, training: bool) -> bool:
    """Whether what it returns is a batch norm's result."""
    tracer = _trace_alone(module, training)
    if tracer is None:
        return False
    modules = dict(module.named_modules())
    output = next(n for n in reversed(tracer.graph.nodes) if n.op == "output")
    last = _through(output.args[0], modules, training)
    if not isinstance(last, Node) or last.op != "call_module" or uses(last) != 1:
        return False
    own = norm_of(last, modules)
    if own is not None:
        return own.name == "identity"
    return _ends_with_norm(modules[str(last.target)], training)


def _starts_with_activation(module: nn.Module, training: bool) -> bool:
    """Whether its input goes into an activation and nowhere else."""
    tracer = _trace_alone(module, training)
    if tracer is None:
        return False
    modules = dict(module.named_modules())
    first = next((n for n in tracer.graph.nodes if n.op == "placeholder"), None)
    if first is None or uses(first) != 1:
        return False
    return activation_of(next(iter(first.users)), modules) is not None


def _wanted(graph: Graph, modules: Modules, training: bool) -> set[nn.Module]:
    """The children into which the graph should reach: one end of theirs belongs to a pattern here."""
    found: set[nn.Module] = set()
    for node in graph.nodes:
        if addition_of(node) is not None or activation_of(node, modules) is not None:
            for operand in node.all_input_nodes:
                operand = _through(operand, modules, training)
                if operand.op == "call_module" and uses(operand) == 1:
                    child = modules[str(operand.target)]
                    if norm_of(operand, modules) is None and _ends_with_norm(child, training):
                        found.add(child)
        elif norm_of(node, modules) is not None and uses(node) == 1:
            user = next(iter(node.users))
            if user.op == "call_module":
                child = modules[str(user.target)]
                if activation_of(user, modules) is None and _starts_with_activation(
                    child, training
                ):
                    found.add(child)
    return found


def _trace_inlined(
    module: nn.Module, kinds: tuple[Any, Any], training: bool, modules: Modules
) -> BlockTracer:
    forward = original_class(module).forward
    inline: frozenset[nn.Module] = frozenset()
    tracer = trace(module, forward, *kinds, training)
    while True:
        wanted = {m for m in _wanted(tracer.graph, modules, training) if not has_hooks(m)} - inline
        if not wanted or len(inline | wanted) > _MAX_INLINED:
            return tracer
        try:
            inlined = trace(module, forward, *kinds, training, inline | wanted)
        except Untraceable:
            return tracer
        inline, tracer = inline | wanted, inlined


def _left(graph: Graph, modules: Modules) -> list[tuple[str, str]]:
    """Batch norms that stay although an activation or a sum follows, and why."""
    found = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = modules[str(node.target)]
        if isinstance(module, nn.modules.batchnorm._NormBase):
            followers = [
                user
                for user in node.users
                if addition_of(user) is not None or activation_of(user, modules) is not None
            ]
            if not followers:
                continue
            if has_hooks(module):
                reason = "it has hooks"
            elif norm_of(node, modules) is None:
                reason = why_not(module)
            elif uses(node) > 1:
                reason = "its output is used elsewhere, too"
            else:
                reason = "its input or the other summand may be written before the sum is taken"
            found.append((str(node.target), reason))
    return found


def plan(
    module: nn.Module,
    kinds: tuple[Any, Any],
    training: bool,
    *,
    dropout: bool,
) -> Plan:
    """Raises Untraceable."""
    if "forward" in module.__dict__:
        raise Untraceable("its forward was replaced on this very module")
    modules: Modules = dict(module.named_modules(remove_duplicate=False))
    tracer = _trace_inlined(module, kinds, training, modules)
    graph = tracer.graph
    fusions = rewrite(graph, modules, tracer.guards, training, dropout)
    left = _left(graph, modules)
    if training:
        chain_convolutions(graph, modules)
    linked = link(graph, modules)
    owner = type(module).__name__
    twice = forked(graph, modules) if training else None
    return Plan(
        _compile(graph, owner),
        tracer.guards.compiled(),
        tuple(fusions),
        tuple(left),
        linked,
        None if twice is None else _compile(twice.graph, owner),
        (Guards() if twice is None else twice.guards).compiled(),
    )


def _compile(graph: Graph, owner: str) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<braze: fused {owner}>", "exec"), namespace)
    run: Callable[..., Any] = namespace["forward"]
    return run
