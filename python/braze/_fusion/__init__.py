"""Fusing whole models: :func:`fuse`, :func:`unfuse`, :func:`fusion_report`."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from braze._fusion.block import BlockFusion, fusion_of, in_channels_last, swap_in, swap_out
from braze._fusion.kinds import default_kinds
from braze._fusion.plan import is_library_leaf
from braze._fusion.report import OPTIONS, BlockReport, FusionReport, own_norms, report
from braze._fusion.verify import FusionError, check_same
from braze.nn import dropout as braze_dropout
from braze.nn._folded import drop_folded
from braze.nn._norms import REPLACED, norm_activation

__all__ = ["BlockReport", "FusionError", "FusionReport", "fuse", "fusion_report", "unfuse"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_SWAPPED = "_braze_swapped"


def fuse(
    model: ModuleT,
    *,
    channels_last: bool = False,
    dropout: bool = True,
    example: Any = None,
) -> ModuleT:
    """Fuses batch norms, activations, sums and dropouts in ``model``, in place, and returns it.

    Classes are swapped, the tree is not: parameters, names, ``state_dict``, hooks and optimizers made before
    stay valid, ``isinstance`` too. In training, norm -> activation, norm -> sum -> activation and norm + norm
    -> activation become one call of :mod:`braze.nn.functional`, a convolution's bias before a batch norm is
    not added, activation -> dropout and dropout -> sum are one pass; on CUDA, 1x1 and 3x3 convolutions in a row
    with these between them never store the activations where braze's kernels are chosen (``BRAZE_CONV``). In
    ``eval()`` without gradients,
    convolution, batch norm, sum and activation are one convolution of oneDNN on the CPU; on CUDA one of cuDNN
    if that is faster (with ReLU only), or one and a kernel. The folded weights are kept until a tensor they
    come from changes, and dropped by ``train()``, ``.to()`` and the like. On the CPU no change is missed, as
    they are read at each call; on CUDA what is written through ``tensor.data`` is seen after the next
    ``eval()``. A captured CUDA graph has none, unless the parameters are frozen (``requires_grad_(False)``)
    and the model was called before: then it goes on with those of the capture.

    Every module's own forward is traced on its own, with its children as leaves, once for training and once
    for evaluation. What it read of itself is checked again at every call; when that no longer holds (an
    attribute or a child was changed, a hook registered), the forward is traced again or runs as it is. Left
    alone, with the reason in :func:`fusion_report`: a forward that branches on tensors, assigns attributes,
    enters contexts such as ``no_grad`` or ``autocast``, prints, or draws random numbers by itself.

    Args:
        model: any module. Fusing again starts afresh.
        channels_last: converts the parameters to that memory format, and the inputs of every call.
        dropout: also use braze's dropout, whose masks are others than torch's for the same seed.
        example: an input, a tuple of positional or a mapping of keyword arguments. The model is run on copies,
            before and after: in fp64 in training and evaluation, comparing outputs, gradients of all parameters
            and buffers, without dropout; and in its own dtype in evaluation.

    Raises:
        TypeError: ``model`` is no module, or one of ``torch.jit``, which has no forward to be traced.
        FusionError: with ``example``, the fused model computes something else. The model is left as it was.

    Differences from the model as it was: intermediate values are not rounded to 16 bits or stored; hooks on a
    module registered afterwards make its block run unfused; ``torch.jit.script`` needs :func:`unfuse` first.
    """
    _check_module(model)
    unfuse(model)
    before = copy.deepcopy(model) if example is not None else None
    try:
        _swap(model, channels_last, dropout)
        if before is not None:
            after = copy.deepcopy(model)
            check_same(before, _to_channels_last(after) if channels_last else after, example)
    except BaseException:
        unfuse(model)
        raise
    return _to_channels_last(model) if channels_last else model


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model is a {type(model).__name__} of torch.jit, whose forward is compiled already: give "
            "braze.fuse the model that was scripted or traced (torch.jit.trace takes a fused one, "
            "torch.jit.script does not)"
        )


def _to_channels_last(model: ModuleT) -> ModuleT:
    for parameter in [*model.parameters(), *model.buffers()]:
        parameter.data = in_channels_last(parameter.data)
    return model


def _swap(model: nn.Module, channels_last: bool, dropout: bool) -> None:
    model.__dict__[OPTIONS] = {"dropout": dropout}
    replaced = {**REPLACED, **(braze_dropout.REPLACED if dropout else {})}
    for module in model.modules():
        ours = replaced.get(type(module))
        if ours is not None:
            module.__dict__[_SWAPPED] = type(module)
            module.__class__ = ours
    for module in list(model.modules()):
        if is_library_leaf(module) or norm_activation(module) is not None:
            if module is not model or not channels_last:
                continue
        fusion = BlockFusion(dropout, channels_last and module is model)
        for training in (True, False):
            fusion.prepare(module, default_kinds(module), training)
        plans = fusion.plans(True) + fusion.plans(False)
        # Where a tensor for each argument was no good, a call may bring others.
        later = bool(fusion.reasons) and bool(own_norms(module))
        if fusion.channels_last or later or any(plan.fusions or plan.linked for plan in plans):
            try:
                swap_in(module, fusion)
            except TypeError:  # a class with slots, or made in C++
                swap_out(module)


def unfuse(model: ModuleT) -> ModuleT:
    """Gives every module the class it had before :func:`fuse`, in place; returns ``model``.

    Parameters stay as they are, in channels-last format too if they were converted.
    """
    model.__dict__.pop(OPTIONS, None)
    for module in model.modules():
        drop_folded(module)
        original = module.__dict__.pop(_SWAPPED, None)
        if original is not None and type(module) in (
            *REPLACED.values(),
            *braze_dropout.REPLACED.values(),
        ):
            module.__class__ = original
        if fusion_of(module) is not None:
            swap_out(module)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """What :func:`fuse` did to ``model``, or would do: every block, what is fused, what is left and why.

    Raises TypeError as :func:`fuse` does.
    """
    _check_module(model)
    return report(model)
