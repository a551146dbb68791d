"""All of ``torch.nn``, with braze's modules in the place of torch's, and the fused ones."""

import typing as _typing

from torch.serialization import add_safe_globals as _add_safe_globals

if not _typing.TYPE_CHECKING:
    from torch.nn import *  # noqa: F403

import braze.nn.functional as functional  # noqa: F401  (`from` finds the star's, torch's)
import braze.nn.utils as utils  # noqa: F401
from braze.nn import _aliases, _folded
from braze.nn._to_torch import to_torch as to_torch
from braze.nn.batch_norm import BatchNorm1d as BatchNorm1d
from braze.nn.batch_norm import BatchNorm2d as BatchNorm2d
from braze.nn.batch_norm import BatchNorm3d as BatchNorm3d
from braze.nn.batch_norm import BatchNormAct1d as BatchNormAct1d
from braze.nn.batch_norm import BatchNormAct2d as BatchNormAct2d
from braze.nn.batch_norm import BatchNormAct3d as BatchNormAct3d
from braze.nn.batch_norm import LazyBatchNorm1d as LazyBatchNorm1d
from braze.nn.batch_norm import LazyBatchNorm2d as LazyBatchNorm2d
from braze.nn.batch_norm import LazyBatchNorm3d as LazyBatchNorm3d
from braze.nn.conv_bn_act import ConvBNAct1d as ConvBNAct1d
from braze.nn.conv_bn_act import ConvBNAct2d as ConvBNAct2d
from braze.nn.conv_bn_act import ConvBNAct3d as ConvBNAct3d
from braze.nn.conv_bn_act import ConvBNReLU1d as ConvBNReLU1d
from braze.nn.conv_bn_act import ConvBNReLU2d as ConvBNReLU2d
from braze.nn.conv_bn_act import ConvBNReLU3d as ConvBNReLU3d
from braze.nn.dropout import ActDropout as ActDropout
from braze.nn.dropout import AlphaDropout as AlphaDropout
from braze.nn.dropout import Dropout as Dropout
from braze.nn.dropout import Dropout1d as Dropout1d
from braze.nn.dropout import Dropout2d as Dropout2d
from braze.nn.dropout import Dropout3d as Dropout3d
from braze.nn.dropout import DropoutAdd as DropoutAdd
from braze.nn.dropout import FeatureAlphaDropout as FeatureAlphaDropout
from braze.nn.sync_batch_norm import SyncBatchNorm as SyncBatchNorm
from braze.nn.sync_batch_norm import SyncBatchNormAct as SyncBatchNormAct
from braze.nn.sync_batch_norm import convert_sync_batchnorm as convert_sync_batchnorm

_aliases.install()
# Pickles of models load with weights_only=True where the user allows the other classes in them.
_add_safe_globals(
    [
        _folded.Folded,
        *(
            v
            for v in vars().values()
            if isinstance(v, type) and v.__module__.startswith("braze.nn.")
        ),
    ]
)

if _typing.TYPE_CHECKING:
    # Last, and without torch's `functional`: a checker keeps the first of two.
    from torch.nn import attention as attention
    from torch.nn import factory_kwargs as factory_kwargs
    from torch.nn import init as init
    from torch.nn import modules as modules
    from torch.nn import parallel as parallel
    from torch.nn import parameter as parameter
    from torch.nn.modules import *  # type: ignore[assignment]  # noqa: F403
    from torch.nn.parallel import DataParallel as DataParallel
    from torch.nn.parameter import Buffer as Buffer
    from torch.nn.parameter import Parameter as Parameter
    from torch.nn.parameter import UninitializedBuffer as UninitializedBuffer
    from torch.nn.parameter import UninitializedParameter as UninitializedParameter
