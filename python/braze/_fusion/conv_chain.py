"""Convolutions in a row: one call, which braze's kernels can compute without the activations between them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, Node

from braze._fusion import calls
from braze._fusion.nodes import Modules, following, uses

__all__ = ["chain_convolutions"]

_PLAIN = 5  # arguments of norm_act without a sum


def _convolves(node: Node, modules: Modules) -> bool:
    """Whether it is norm_act of a convolution."""
    if node.op != "call_function" or node.target is not calls.norm_act or node.kwargs:
        return False
    conv: Any = node.args[0]
    return conv is not None and isinstance(modules[str(conv.target)], nn.Conv2d)


def chain_convolutions(graph: Graph, modules: Modules) -> None:
    """Makes one call of norm_acts that follow each other and whose results nobody else uses. Nothing is between
    them, so that nothing else is moved."""
    done: set[Node] = set()
    for node in list(graph.nodes):
        if node in done or not _convolves(node, modules):
            continue
        run = [node]
        while len(run[-1].args) == _PLAIN and uses(run[-1]) == 1:
            user = following(run[-1])
            if not _convolves(user, modules) or user.args[2] is not run[-1]:
                break
            run.append(user)
        done.update(run)
        if len(run) < 2:
            continue
        links = tuple((*link.args[:2], *link.args[3:_PLAIN]) for link in run)
        with graph.inserting_before(run[-1]):
            call = graph.call_function(
                calls.conv_chain, (node.args[2], links, *run[-1].args[_PLAIN:])
            )
        run[-1].replace_all_uses_with(call)
        for link in reversed(run):
            graph.erase_node(link)
