"""Blocks in a row, between which a value goes twice: the two gradients of one are summed where it was made.

A residual block's input is used by its first convolution and by its join, and autograd adds the two gradients
in a pass of its own. If the block before ends with a batch norm, it can give its result as two tensors in one
memory, whose gradients its backward kernels add while they read them. Only the code here sees the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.module import _has_any_global_hook

from braze._fusion import calls
from braze._fusion.guards import Guards
from braze._fusion.nodes import Modules, following, uses
from braze.nn._activation import has_hooks
from braze.nn._conv_bn import CONVS
from braze.nn._norms import norm_activation
from braze.nn._route import is_plain

__all__ = ["Forked", "chain", "chain_fork", "forked", "link"]

_FORKING = (calls.norm_act, calls.conv_chain, calls.norm_add_act)


class Forked(NamedTuple):
    """The forward of (block, x, x again) that gives (y, y again) or (y, None), while the guards hold."""

    graph: Graph
    guards: Guards


def _is_block(node: Node, modules: Modules) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = modules[str(node.target)]
    library = type(module).__module__.startswith("torch.nn.modules.")
    leaf = library and not isinstance(module, nn.Sequential)
    return not leaf and isinstance(node.args[0], Node) and norm_activation(module) is None


def link(graph: Graph, modules: Modules) -> bool:
    """Makes one call of blocks that follow each other and whose results nobody else uses."""
    linked = False
    done: set[Node] = set()
    for node in list(graph.nodes):
        if node in done or not _is_block(node, modules):
            continue
        run = [node]
        while uses(run[-1]) == 1 and (user := following(run[-1])) in run[-1].users:
            if not _is_block(user, modules):
                break
            run.append(user)
        done.update(run)
        if len(run) < 2:
            continue
        before = node.args[0]
        with graph.inserting_after(run[-1]):
            call = graph.call_function(chain, (before,))
        with graph.inserting_before(call):
            blocks = tuple(graph.get_attr(str(block.target)) for block in run)
        call.args = (before, *blocks)
        run[-1].replace_all_uses_with(call)
        for block in reversed(run):
            graph.erase_node(block)
        linked = True
    return linked


def forked(graph: Graph, modules: Modules) -> Forked | None:
    """The block with its one input and its result twice; None if neither can be."""
    graph = copy.deepcopy(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    if len(inputs) != 1 or not isinstance(output.args[0], Node):
        return None
    guards = Guards()
    takes = _split_input(graph, inputs[0], modules, guards)
    last = output.args[0]
    gives = uses(last) == 1 and last.op == "call_function"
    if gives and last.target in _FORKING:
        last.kwargs = {**last.kwargs, "fork": True}
    elif gives and last.target is chain:
        second = next(
            node for node in graph.nodes if node.op == "placeholder" and node is not inputs[0]
        )
        both = uses(inputs[0]) == 1 and last.args[0] is inputs[0]
        last.target = chain_fork
        last.args = (last.args[0], second if both else None, *last.args[1:])
        takes = takes or both
    else:
        gives = False
        output.args = ((last, None),)
    return Forked(graph, guards) if takes or gives else None


def _split_input(graph: Graph, first: Node, modules: Modules, guards: Guards) -> bool:
    """Gives one of two users of the input a second one to use, or the one that uses it twice."""
    with graph.inserting_after(first):
        second = graph.placeholder("again")
    users = list(first.users)
    if uses(first) != 2:
        return False
    for user in users:
        if user.op == "call_module":
            if type(modules[str(user.target)]) not in CONVS:
                return False
            guards.quiet(str(user.target))
        elif user.op != "call_function" or user.target not in _FORKING:
            return False
    for node in graph.nodes:  # a hook on a convolution could ask for its input's gradient
        if node.op == "get_attr" and isinstance(modules.get(str(node.target)), CONVS):
            guards.quiet(str(node.target))
    if len(users) == 2:
        users[-1].replace_input_with(first, second)
    else:
        args = list(users[0].args)
        args[max(i for i, arg in enumerate(args) if arg is first)] = second
        users[0].args = tuple(args)
    return True


def _forked_run(block: Any, x: Any) -> Callable[..., Any] | None:
    fusion = block.__dict__.get("_braze_fusion")
    if fusion is None or fusion.channels_last or not is_plain(x) or has_hooks(block):
        return None
    found = fusion.find(block, (x,), {})
    if found is None or found[0].forked is None or not found[0].forked_holds(block):
        return None
    run: Callable[..., Any] = found[0].forked
    return run


def chain_fork(x: Any, again: Any, *blocks: Any) -> tuple[Any, Any]:
    """The blocks one after the other, with the input twice (or None) and the result twice (or None)."""
    forks = (
        torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _has_any_global_hook()
    )
    for block in blocks:
        run = _forked_run(block, x) if forks else None
        if run is None:
            x, again = block(x), None
        else:
            x, again = run(block, x, x if again is None else again)
    return x, again


def chain(x: Any, *blocks: Any) -> Any:
    """The blocks one after the other."""
    return chain_fork(x, None, *blocks)[0]
