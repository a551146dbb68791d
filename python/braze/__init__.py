"""braze: fused training kernels for PyTorch.

``import braze.nn as nn`` is a drop-in for ``torch.nn``, ``import braze.optim as optim`` for ``torch.optim``.
"""

from braze import _native as _native
from braze import nn as nn
from braze import optim as optim
from braze.info import build_info as build_info

__version__ = "0.1.0"
__all__ = ["build_info", "nn", "optim"]
