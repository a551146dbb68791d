"""From braze's modules back to torch's."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from braze.nn.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct

__all__ = ["to_torch"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def to_torch(model: ModuleT) -> ModuleT:
    """Gives every module of ``braze.nn`` in ``model`` torch's class, in place, and returns ``model``.

    For what knows torch's classes only: ``torch.ao.quantization``, ``torch.fx`` passes, and pickles of whole
    models that are loaded where there is no braze. (A ``state_dict`` needs none of it.) Parameters, buffers,
    names, hooks and modes are kept, the very same objects; a fused model is unfused first. After
    :func:`braze.install` those passes need :func:`braze.uninstall`, too.

    What ``convert_sync_batchnorm`` made of a plain batch norm becomes ``torch.nn.SyncBatchNorm``.

    Args:
        model: any module, also one with nothing of braze in it.

    Raises:
        TypeError: ``model`` is no module.

    Warns:
        UserWarning: some modules have no counterpart in torch and stay: ``BatchNormAct``, ``ConvBNAct``,
            ``SyncBatchNormAct``, ``ActDropout``, ``DropoutAdd``, subclasses and parametrized modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    from braze._fusion import unfuse  # here, as it imports this package

    left = []
    for name, module in unfuse(model).named_modules():
        kind: type[nn.Module] = type(module)
        if kind is SyncBatchNormAct and "activation" not in module.__dict__:
            kind = SyncBatchNorm
        theirs = vars(kind).get("_torch_class")  # not a subclass's: that may compute something else
        if theirs is not None:
            module.__class__ = theirs
        elif any(base.__module__.startswith("braze.") for base in kind.__mro__):
            left.append(f"{name or '(the model)'} ({kind.__name__})")
    if left:
        warnings.warn(
            f"to_torch: torch has no counterpart of {', '.join(left)}; they stay braze's. To be rid of them, "
            "build the model with torch's modules in their place and load this one's state_dict",
            stacklevel=2,
        )
    return model
