"""Dropout and batch norm whose results are compared between devices and machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from braze._native import _C
from braze.nn import BatchNormAct2d
from braze.nn.functional import dropout_mask
from torch import Tensor

from .golden_cases import NAMES, bf16, fp16, fp32, values


class Pass(Protocol):
    """``tolerance``: of a tensor's largest element; None: every bit. ``short``: run first and by sanitizers."""

    @property
    def name(self) -> str: ...
    @property
    def short(self) -> bool: ...
    @property
    def tolerance(self) -> float | None: ...
    def run(self, device: str) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Mask:
    """One mask: a function of these four numbers alone."""

    numel: int
    p: float
    seed: int
    offset: int
    short: bool = False
    tolerance: float | None = None

    @property
    def name(self) -> str:
        return f"dropout/{self.numel}/{self.p}/{self.seed:x}-{self.offset:x}"

    def run(self, device: str) -> dict[str, Tensor]:
        place = "cpu" if device == "emulated" else device
        return {"mask": dropout_mask(self.numel, self.p, self.seed, self.offset, place).cpu()}


# NHWC, NCHW; and NCHW whose planes of 49 elements begin nowhere in particular, one element off.
PLACES = {"NHWC": (4, 24, 10, 12), "NCHW": (4, 24, 10, 12), "unaligned": (4, 10, 7, 7)}


def _placed(key: str, place: str, dtype: torch.dtype, device: str) -> Tensor:
    shape = PLACES[place]
    x = values(key, shape, dtype)
    if place == "NHWC":
        return x.to(device, memory_format=torch.channels_last)
    if place == "NCHW":
        return x.to(device)
    flat = torch.empty(x.numel() + 1, dtype=dtype, device=device)
    return flat[1:].view(shape).copy_(x)


@dataclass(frozen=True)
class Dropped:
    """What is dropped, forward and backward, with the mask of one seed and offset."""

    place: str
    dtype: torch.dtype
    short: bool = True
    tolerance: float | None = None

    @property
    def name(self) -> str:
        return f"dropped/{self.place}/{NAMES[self.dtype]}"

    def run(self, device: str) -> dict[str, Tensor]:
        state = torch.tensor([-12345678901234, 8], device=device)
        x = _placed(f"{self.name}/x", self.place, self.dtype, device)
        dy = _placed(f"{self.name}/dy", self.place, self.dtype, device)
        backward = torch.ops.braze.act_dropout_backward
        results = {
            "plain": _C.dropout_apply(x, state, 0.3, False, False, False),
            "alpha": _C.dropout_apply(x, state, 0.3, True, False, False),
            "channels": _C.dropout_apply(x, state, 0.3, False, True, False),
            "gradient": _C.dropout_apply(dy, state, 0.3, False, False, True),
            "relu": backward(dy, x, state, 0.3, "relu", 0.0),
            "gelu": backward(dy, x, state, 0.3, "gelu", 0.0),
        }
        return {name: tensor.cpu() for name, tensor in results.items()}


@dataclass(frozen=True)
class Normed:
    """A forward and backward of act(bn(x)) or act(bn(x) + residual), and a forward in eval()."""

    place: str
    dtype: torch.dtype
    activation: str
    join: bool
    short: bool = True

    @property
    def name(self) -> str:
        join = "add+" if self.join else ""
        return f"batch_norm/{self.place}/{join}{self.activation}/{NAMES[self.dtype]}"

    @property
    def tolerance(self) -> float:
        # Sums of another order, then rounded: to the next number of the dtype at worst.
        return {fp32: 1e-5, fp16: 2.0**-10, bf16: 2.0**-7}[self.dtype]

    def run(self, device: str) -> dict[str, Tensor]:
        channels = PLACES[self.place][1]
        norm = BatchNormAct2d(channels, activation=self.activation)
        with torch.no_grad():
            assert norm.weight is not None and norm.bias is not None
            norm.weight.copy_(values(f"{self.name}/weight", (channels,), fp32).abs() + 0.5)
            norm.bias.copy_(values(f"{self.name}/bias", (channels,), fp32))
        norm = norm.to(device)
        x, dy, residual = (
            _placed(f"{self.name}/{key}", self.place, self.dtype, device)
            for key in ("x", "dy", "residual")
        )
        inputs = [x, residual] if self.join else [x]
        for tensor in inputs:
            tensor.requires_grad_()
        y = norm(*inputs)
        named = dict(zip(["x", "residual"], inputs, strict=False)) | dict(norm.named_parameters())
        gradients = torch.autograd.grad(y, list(named.values()), dy)
        results = {"y": y, **dict(norm.named_buffers())}
        results |= {f"{name}.grad": g for name, g in zip(named, gradients, strict=True)}
        with torch.no_grad():
            results["eval"] = norm.eval()(*inputs)
        return {name: tensor.detach().cpu() for name, tensor in results.items()}


def _passes() -> Iterator[Pass]:
    # Around a block's eight lanes, vectors and chunks; every word of key and counter; rare and frequent p.
    for n in (1, 7, 8, 9, 15, 17, 63, 65, 1023, 1025, 65535, 65537):
        yield Mask(n, 0.5, 1, 0, n < 100)
    for p in (0.0, 1e-5, 0.1, 0.9, 0.99999, 1.0):
        yield Mask(4097, p, 2, 4, p == 0.1)
    for seed in (0, 0xFFFFFFFF, 0x100000000, 0xFEDCBA9876543210):
        for offset in (0, 0xFFFFFFFF, 0x100000000, 0x0123456789ABCDEF):
            yield Mask(1000, 0.3, seed, offset)
    for place in PLACES:
        for dtype in (fp32, bf16, fp16):
            yield Dropped(place, dtype)
            for join in (False, True):
                yield Normed(place, dtype, "relu", join)
            yield Normed(place, dtype, "silu", False)


PASSES: tuple[Pass, ...] = tuple(_passes())
