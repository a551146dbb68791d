"""All of ``torch.optim``, with braze's SGD, Adam, AdamW and RMSprop in the place of torch's, CAG and Lion."""

import sys as _sys
import typing as _typing

import torch.optim as _torch_optim
from torch.optim import lr_scheduler as lr_scheduler
from torch.optim import swa_utils as swa_utils

if not _typing.TYPE_CHECKING:
    from torch.optim import *  # noqa: F403

from braze.optim._monitor import GradientMonitor as GradientMonitor
from braze.optim.adam import Adam as Adam
from braze.optim.adamw import AdamW as AdamW
from braze.optim.cag import CAG as CAG
from braze.optim.lion import Lion as Lion
from braze.optim.rmsprop import RMSprop as RMSprop
from braze.optim.sgd import SGD as SGD

if _typing.TYPE_CHECKING:
    # Last: a checker keeps the first of two.
    from torch.optim import *  # type: ignore[assignment]  # noqa: F403

__all__ = [*_torch_optim.__all__, "CAG", "GradientMonitor", "Lion"]

# `import braze.optim.lr_scheduler` and the like give torch's very modules, unless braze has its own.
for _name, _module in list(_sys.modules.items()):
    if _name.startswith("torch.optim."):
        _sys.modules.setdefault("braze" + _name.removeprefix("torch"), _module)
