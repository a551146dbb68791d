"""All of ``torch.nn.utils``, with braze's clipping of gradients in the place of torch's."""

import typing as _typing

import torch.nn.utils as _torch_utils

if not _typing.TYPE_CHECKING:
    from torch.nn.utils import *  # noqa: F403

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_torch_utils, name)


from braze.nn.utils import clip_grad as clip_grad
from braze.nn.utils.clip_grad import clip_grad_norm_ as clip_grad_norm_
from braze.nn.utils.clip_grad import clip_grad_value_ as clip_grad_value_
from braze.nn.utils.clip_grad import get_total_norm as get_total_norm

__all__ = _torch_utils.__all__

if _typing.TYPE_CHECKING:
    # Last: a checker keeps the first of two.
    from torch.nn.utils import *  # noqa: F403
