"""All of ``torch.nn.functional``, with braze's functions in the place of torch's, and the fused ones."""

import typing as _typing

import torch.nn.functional as _torch_functional

if not _typing.TYPE_CHECKING:
    from torch.nn.functional import *  # noqa: F403

    def __getattr__(name: str) -> object:
        """Names that torch keeps to itself, but that programs use."""
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_torch_functional, name)


from braze.nn._batch_norm_functional import batch_norm as batch_norm
from braze.nn._batch_norm_functional import batch_norm_act as batch_norm_act
from braze.nn._batch_norm_functional import batch_norm_add_act as batch_norm_add_act
from braze.nn._dropout_functional import act_dropout as act_dropout
from braze.nn._dropout_functional import alpha_dropout as alpha_dropout
from braze.nn._dropout_functional import dropout as dropout
from braze.nn._dropout_functional import dropout1d as dropout1d
from braze.nn._dropout_functional import dropout2d as dropout2d
from braze.nn._dropout_functional import dropout3d as dropout3d
from braze.nn._dropout_functional import dropout_add as dropout_add
from braze.nn._dropout_functional import dropout_mask as dropout_mask
from braze.nn._dropout_functional import feature_alpha_dropout as feature_alpha_dropout

if _typing.TYPE_CHECKING:
    # Last: a checker keeps the first of two.
    from torch.nn.functional import *  # type: ignore[assignment]  # noqa: F403
