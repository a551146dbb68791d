"""torch's names for braze's: :func:`install` and :func:`uninstall`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

import braze.nn.functional
from braze import amp, nn, optim

__all__ = ["REPLACED", "install", "uninstall"]


def _own(theirs: ModuleType, ours: ModuleType) -> dict[Any, Any]:
    """What torch has in ``theirs``, for all names of which ``ours`` has something else."""
    found = {}
    for name, value in vars(theirs).items():
        replacement = vars(ours).get(name, value)
        if replacement is not value and callable(value) and not name.startswith("_"):
            found[value] = replacement
    return found


_FUNCTIONS = _own(torch.nn.functional, braze.nn.functional)
# torch's classes and functions, and braze's that stand for them.
REPLACED: dict[Any, Any] = {
    **_own(torch.nn, nn),
    **_own(torch.nn.utils, nn.utils),
    **_own(torch.amp, amp),
    **_own(torch.optim, optim),
    **_FUNCTIONS,
}


def _scripted_as(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: function


for _theirs, _ours in _FUNCTIONS.items():
    # torch.jit.script compiles what this gives, also of the functions that torch's own forwards call.
    _ours.__prepare_scriptable__ = _scripted_as(_theirs)

_lock = threading.RLock()
_holders: set[Installation] = set()  # installed while there is one


class Installation:
    """What :func:`install` returns; as a context manager it takes that call back at its end."""

    def __enter__(self) -> Installation:
        _hold(self)
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            if self in _holders:
                _holders.remove(self)
                if not _holders:
                    _swap({ours: theirs for theirs, ours in REPLACED.items()})


def _hold(installation: Installation) -> None:
    with _lock:
        if not _holders:
            _swap(REPLACED)
        _holders.add(installation)


def _swap(pairs: dict[Any, Any]) -> None:
    """Puts the second of a pair wherever torch.nn, torch.optim and torch.amp have the first."""
    by_id = {id(old): new for old, new in pairs.items()}
    for name, module in list(sys.modules.items()):
        if not f"{name}.".startswith(("torch.nn.", "torch.optim.", "torch.amp.")):
            continue
        for attribute, value in list(vars(module).items()):
            # A class stays where pickle and its own methods look for it.
            if id(value) in by_id and not (isinstance(value, type) and value.__module__ == name):
                setattr(module, attribute, by_id[id(value)])


def install() -> Installation:
    """Makes programs that are written for torch use braze: call it first.

    From then on ``torch.optim`` has braze's SGD, Adam, AdamW and RMSprop, ``torch.nn`` its BatchNorm,
    LazyBatchNorm, Dropout, AlphaDropout, FeatureAlphaDropout and SyncBatchNorm classes,
    ``torch.nn.functional`` its ``batch_norm`` and the six dropouts, ``torch.nn.utils`` its clipping of
    gradients, ``torch.amp`` its GradScaler: all that braze has under torch's names. So Lightning, Accelerate,
    transformers and timm, which look them up when they need them, use them unasked.
    The functions are those that torch's own modules call, too, ``MultiheadAttention`` and modules made before
    among them; ``TransformerEncoderLayer`` and ``TransformerDecoderLayer`` are made with braze's Dropout.

    Returns:
        An object for ``with``, at whose end the call is taken back: ``with braze.install(): ...``. Calls may
        be nested and repeated; torch's names are back when every ``with`` has ended, but after a call that is
        outside any ``with`` only after :func:`uninstall`.

    Differences from the import swap (``import braze.nn as nn``), and limits:
        - Names taken before stay torch's: ``from torch.nn import Dropout`` above the call, base classes, and
          tables that packages such as timm make when they are imported.
        - So do those of ``torch.nn.modules.batchnorm``, ``torch.nn.modules.dropout``, ``torch.optim.sgd`` and
          the like, where pickle looks for torch's classes.
        - What is first imported while braze is installed keeps braze's classes afterwards.
        - What asks for torch's very classes and functions, such as ``torch.ao.quantization``, takes a model
          after :func:`uninstall` and :func:`braze.nn.to_torch`.
        - Another process has torch's names until it calls it itself, unless it is a fork of this one.
        - torch's functions themselves (``f = torch.nn.functional.dropout``, taken before) cannot be pickled
          meanwhile, and ``isinstance(optimizer, torch.optim.SGD)`` does not hold for optimizers made before.
    """
    installation = Installation()
    _hold(installation)
    return installation


def uninstall() -> None:
    """Gives torch's names back to torch, however often :func:`install` was called. Does nothing if it was not.

    Modules and optimizers that were made meanwhile stay braze's: see :func:`braze.nn.to_torch`.
    """
    with _lock:
        for installation in list(_holders):
            installation.__exit__()
