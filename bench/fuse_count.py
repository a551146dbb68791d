"""Which batch norms an activation or a sum follows, seen in a real forward; without braze's own analysis."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_NAMES = (
    "relu relu6 leaky_relu elu sigmoid hardsigmoid tanh silu gelu hardswish mish hardtanh clamp prelu "
    "rrelu selu celu softplus logsigmoid hardshrink softshrink tanhshrink threshold softsign "
    "add __add__ __radd__ __iadd__"
).split()


def _functions() -> frozenset[Any]:
    """torch's activations and sums, by every name and in place or not."""
    found = []
    for home in (torch, F, Tensor, torch._C._nn):
        for name in _NAMES:
            found += [getattr(home, name, None), getattr(home, name + "_", None)]
    return frozenset(function for function in found if function is not None)


FOLLOWERS = _functions()
_BATCH_NORMS = frozenset({F.batch_norm, torch.batch_norm})


class _Follow(TorchFunctionMode):
    """Records, by the identity of tensors, what the results of batch norms are handed to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._owners: dict[int, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight, module.running_mean):
                    if tensor is not None:
                        self._owners[id(tensor)] = name
        # Results by identity, which is theirs as long as they live: so they are kept, with their versions.
        self._results: dict[int, tuple[str, Tensor, int]] = {}
        self.uses: dict[str, list[bool]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        taken = [self._results[id(t)] for t in tensors if id(t) in self._results]
        result = function(*args, **kwargs)
        made = _tensors(result)
        for name, tensor, version in taken:
            changed = tensor._version != version
            # Not a use: a question like .shape, and what hands its input on, like .contiguous().
            if made and (changed or all(t is not tensor for t in made)):
                self.uses.setdefault(name, []).append(function in FOLLOWERS)
            if changed:
                self._results.pop(id(tensor), None)
        if function in _BATCH_NORMS:
            owners = [self._owners[id(t)] for t in tensors if id(t) in self._owners]
            for tensor in made if owners else ():
                self._results[id(tensor)] = (owners[0], tensor, tensor._version)
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Followed(NamedTuple):
    """``every``: batch norms whose result goes into an activation or a sum. ``only``: and nowhere else."""

    every: list[str]
    only: list[str]


def norms_followed(model: nn.Module, *inputs: Tensor) -> Followed:
    """Names of the batch norms whose result goes straight into an activation or a sum.

    Runs ``model``, which must not be fused, forward in its mode. A module that hands its input on, as
    ``nn.Identity`` does, is nothing in between; a slice, a view or a random mask is.
    """
    with _Follow(model) as seen, torch.no_grad():
        model(*inputs)
    every = sorted(name for name, uses in seen.uses.items() if any(uses))
    return Followed(every, [name for name in every if seen.uses[name] == [True]])
