"""What is folded into a convolution, kept beside it: the weights, and what was learnt about running them.

W' = W g / sqrt(v + eps) per output channel, b' = (b - m) g / sqrt(v + eps) + beta, in fp64, rounded once.
Source: Jacob et al., "Quantization and Training of Neural Networks", 2018, section 3.2;
``torch.nn.utils.fusion.fuse_conv_bn_weights``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from braze._native import _C

__all__ = ["Call", "Folded", "distrust", "drop_folded", "find", "fold", "keep", "making"]

_fingerprint = _C.fingerprint
_ATTRIBUTE = "_braze_folded"


class Call(NamedTuple):
    """activation(norm(conv(x)) + residual), of shape ``shape``; all in ``x``'s dtype and on its device."""

    conv: nn.Conv2d
    norm: Any
    x: Tensor
    residual: Tensor | None
    shape: tuple[int, ...]
    last: bool  # in channels-last format
    activation: str
    parameter: float


class Folded:
    """What was folded from which tensors. Copies and pickles of it are empty."""

    def __init__(
        self,
        key: tuple[Any, ...] = (),
        sources: tuple[Tensor | None, ...] = (),
        faster: dict[tuple[Any, ...], bool] | None = None,
    ) -> None:
        self.key = key
        self.sources = sources  # kept alive, so that no other tensors take their place
        self.bias: Tensor | None = None
        self.plain: Tensor | None = None
        # oneDNN's, by the input's shape: with another one it may pack a packed weight anew at every call.
        self.packed: dict[torch.Size, Tensor] = {}
        # The bias as the statistics that the batch norm's kernel takes.
        self.stats: Tensor | None = None
        # By shape, dtype and the like: whether cuDNN's fused call is faster. No matter of the weights' values.
        self.faster: dict[tuple[Any, ...], bool] = {} if faster is None else faster

    def __deepcopy__(self, memo: Any) -> Folded:
        return Folded()

    def __reduce__(self) -> Any:
        return Folded, ()


def drop_folded(conv: nn.Module) -> None:
    """Forgets what was folded into ``conv``."""
    conv.__dict__.pop(_ATTRIBUTE, None)


def distrust(conv: nn.Module) -> None:
    """Has what was folded into ``conv`` folded again if the host cannot see whether it is still right: a write
    through ``tensor.data`` leaves no trace but in a device's memory."""
    folded: Folded | None = conv.__dict__.get(_ATTRIBUTE)
    if folded is not None and not all(t is None or t.is_cpu for t in folded.sources):
        folded.key = ()


def find(call: Call) -> Folded:
    """What is folded from these six tensors as they are; an empty one, for :func:`keep`, if nothing is."""
    conv, norm = call.conv, call.norm
    sources = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    key = (_fingerprint(sources), norm.eps, call.x.dtype, call.last)
    folded: Folded | None = conv.__dict__.get(_ATTRIBUTE)
    if folded is None:
        return Folded(key, sources)
    return folded if folded.key == key else Folded(key, sources, folded.faster)


def keep(conv: nn.Module, folded: Folded) -> None:
    conv.__dict__[_ATTRIBUTE] = folded


@contextmanager
def making(call: Call) -> Iterator[None]:
    """In here tensors that outlive the caller's modes are made."""
    autocast = torch.autocast(call.x.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


def fold(folded: Folded) -> tuple[Tensor, Tensor]:
    """The folded weight in the convolution's dtype, and the bias in fp64."""
    weight, bias, gamma, beta, mean, var = folded.sources
    _, eps, dtype, _ = folded.key
    assert weight is not None and mean is not None and var is not None
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.double()
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(dtype), shift
