"""Memory: braze's results without that of earlier ones, and what a forward keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from braze import memory
from torch import Tensor, nn

T = TypeVar("T")


def without_reuse(call: Callable[[], T]) -> Callable[[], T]:
    """The call with braze's results in malloc's memory, as torch's are: beyond 32 MB, fresh pages."""

    def run() -> T:
        memory.set_reuse(False)
        try:
            return call()
        finally:
            memory.set_reuse(True)

    return run


def stored_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of all memory that a forward keeps for backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(kept.values())
