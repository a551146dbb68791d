"""Layouts in memory that an activation may come in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


def _offset(t: Tensor) -> Tensor:
    memory = t.new_empty(t.numel() + 1)
    return memory[1:].view(t.shape).copy_(t)


def _every_other(t: Tensor) -> Tensor:
    memory = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))
    return memory[..., ::2].copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": _offset,
    "every_other": _every_other,
    "expanded": lambda t: t[:1].expand(t.shape) if t.shape[0] else t,
}
