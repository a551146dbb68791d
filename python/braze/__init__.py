"""braze: fused training kernels for PyTorch.

``import braze.nn as nn`` is a drop-in for ``torch.nn``, ``import braze.optim as optim`` for ``torch.optim``;
``braze.install()`` puts them into torch for programs that cannot be changed, and ``braze.fuse(model)`` fuses a
model that is there already.
"""

from braze import _native as _native
from braze import amp as amp
from braze import memory as memory
from braze import nn as nn
from braze import optim as optim
from braze._fusion import FusionError as FusionError
from braze._fusion import FusionReport as FusionReport
from braze._fusion import fuse as fuse
from braze._fusion import fusion_report as fusion_report
from braze._fusion import unfuse as unfuse
from braze._install import install as install
from braze._install import uninstall as uninstall
from braze.info import build_info as build_info

__version__ = "0.1.0"
__all__ = [
    "FusionError",
    "FusionReport",
    "amp",
    "build_info",
    "fuse",
    "fusion_report",
    "install",
    "memory",
    "nn",
    "optim",
    "unfuse",
    "uninstall",
]
