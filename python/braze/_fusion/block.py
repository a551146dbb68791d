"""A module whose class was swapped: the same object, parameters and names, with a fused forward."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from braze._fusion.kinds import ONE_TENSOR, kinds_of
from braze._fusion.plan import Plan, original_class, plan
from braze._fusion.tracing import LOCK, Untraceable
from braze.nn._folded import distrust, drop_folded
from braze.nn._route import is_plain

__all__ = ["BlockFusion", "fused_class", "fusion_of", "in_channels_last", "swap_in", "swap_out"]

_STATE = "_braze_fusion"
_MAX_PLANS = 8
_CLASSES: dict[type[nn.Module], type[Any]] = {}


class BlockFusion:
    """What is known of one block; nothing of it refers to the block, so that copies may share it."""

    def __init__(self, dropout: bool, channels_last: bool = False) -> None:
        self.dropout = dropout
        self.channels_last = channels_last
        self._plans: dict[Any, list[Plan]] = {}
        self.reasons: dict[Any, str] = {}

    def __deepcopy__(self, memo: Any) -> BlockFusion:
        return self

    def __reduce__(self) -> Any:
        return BlockFusion, (self.dropout, self.channels_last)

    def plans(self, training: bool) -> list[Plan]:
        return [p for (mode, _), found in self._plans.items() if mode == training for p in found]

    def prepare(self, module: nn.Module, kinds: Any, training: bool) -> Plan | None:
        """A plan that holds, made if there is none yet."""
        key = (training, kinds)
        with LOCK:
            plans = self._plans.setdefault(key, [])
            for known in plans:
                if known.holds(module):
                    return known
            if key in self.reasons or len(plans) >= _MAX_PLANS:
                return None
            try:
                made = plan(module, kinds, training, dropout=self.dropout)
            except Untraceable as error:
                self.reasons[key] = str(error)
                return None
            plans.append(made)
            return made if made.holds(module) else None

    def find(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, Any] | None:
        """The plan for this call and the tensors to run it with; None: the block's own forward must run."""
        kinds: Any = ONE_TENSOR
        tensors: Any = args
        if len(args) != 1 or kwargs or not is_plain(args[0]):
            found = kinds_of(args, kwargs)
            if found is None:
                return None
            kinds, tensors = found
        # A tracer's graph should be the model's own.
        if _has_any_global_hook() or torch._C._get_tracing_state() is not None:
            return None
        for known in self._plans.get((module.training, kinds), ()):
            if known.holds(module):
                return known, tensors
        if torch.compiler.is_compiling():
            return None
        made = self.prepare(module, kinds, module.training)
        return None if made is None else (made, tensors)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_channels_last(tensor: Tensor) -> Tensor:
    """[N, C, H, W] and [N, C, D, H, W] in that memory format; all others as they are."""
    layout = _CHANNELS_LAST.get(tensor.dim())
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


def _to_channels_last(value: Any) -> Any:
    if is_plain(value):
        return in_channels_last(value)
    if type(value) in (list, tuple):
        return type(value)(map(_to_channels_last, value))
    return value


class FusedBlock:
    """Mixin in front of the class of a block."""

    _braze_original: type[nn.Module]

    def train(self, mode: bool = True) -> Any:
        """As :meth:`torch.nn.Module.train`; folded weights are dropped, by ``eval()`` on CUDA."""
        for module in self.modules():  # type: ignore[attr-defined]
            (drop_folded if mode else distrust)(module)
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        _drop_folded(self)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if arguments and arguments[0] is type(self):
            arguments = (self._braze_original, *arguments[1:])
            return (_remake, (make, *arguments), *rest)
        return (make, arguments, *rest)


def _drop_folded(block: Any) -> None:
    for module in block.modules():
        drop_folded(module)


def _remake(make: Any, original: type[nn.Module], *arguments: Any) -> Any:
    return make(fused_class(original), *arguments)


def fused_class(original: type[nn.Module]) -> type[Any]:
    """The subclass of ``original`` with the fused forward, under the same name."""
    known = _CLASSES.get(original)
    if known is not None:
        return known
    own_forward = original.forward

    @functools.wraps(own_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fusion: BlockFusion | None = self.__dict__.get(_STATE)
        if fusion is None:  # made from the class of a fused one, as nn.Sequential's slices are
            return own_forward(self, *args, **kwargs)
        if fusion.channels_last:
            args = _to_channels_last(args)
            kwargs = {name: _to_channels_last(value) for name, value in kwargs.items()}
        found = fusion.find(self, args, kwargs)
        if found is None:
            return own_forward(self, *args, **kwargs)
        return found[0].run(self, *found[1])

    body = {
        "forward": forward,
        "_braze_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    # setdefault: of two threads, both get the first one's.
    return _CLASSES.setdefault(original, type(original.__name__, (FusedBlock, original), body))


def fusion_of(module: nn.Module) -> BlockFusion | None:
    found: BlockFusion | None = module.__dict__.get(_STATE)
    return found


def swap_in(module: nn.Module, fusion: BlockFusion) -> None:
    module.__class__ = fused_class(original_class(module))
    module.__dict__[_STATE] = fusion


def swap_out(module: nn.Module) -> None:
    module.__dict__.pop(_STATE, None)
    module.__class__ = original_class(module)
