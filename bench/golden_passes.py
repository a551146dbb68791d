"""Dropout and batch norm whose results are compared between devices and machines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from braze._native import _C
from braze.nn import BatchNormAct2d
from braze.nn.functional import dropout_mask
from torch import Tensor

from .golden_cases import NAMES, Golden, bf16, fp16, fp32, values


def _mask(numel: int, p: float, seed: int, offset: int, device: str) -> dict[str, Tensor]:
    place = "cpu" if device == "emulated" else device
    return {"mask": dropout_mask(numel, p, seed, offset, place).cpu()}


def mask(numel: int, p: float, seed: int, offset: int, short: bool = False) -> Golden:
    """One mask: a function of these four numbers alone."""
    name = f"dropout/{numel}/{p}/{seed:x}-{offset:x}"
    return Golden(name, partial(_mask, numel, p, seed, offset), short)


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


def dropped(place: str, dtype: torch.dtype) -> Golden:
    """What is dropped, forward and backward, with the mask of one seed and offset."""
    title = f"dropped/{place}/{NAMES[dtype]}"

    def run(device: str) -> dict[str, Tensor]:
        state = torch.tensor([-12345678901234, 8], device=device)
        x, dy = (_placed(f"{title}/{key}", place, dtype, device) for key in ("x", "dy"))
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

    return Golden(title, run, True)


def normed(place: str, dtype: torch.dtype, activation: str, join: bool) -> Golden:
    """A forward and backward of act(bn(x)) or act(bn(x) + residual), and a forward in eval()."""
    title = f"batch_norm/{place}/{'add+' if join else ''}{activation}/{NAMES[dtype]}"
    # Sums of another order, then rounded: to the next number of the dtype at worst.
    tolerance = {fp32: 1e-5, fp16: 2.0**-10, bf16: 2.0**-7}[dtype]

    def run(device: str) -> dict[str, Tensor]:
        channels = PLACES[place][1]
        norm = BatchNormAct2d(channels, activation=activation)
        with torch.no_grad():
            assert norm.weight is not None and norm.bias is not None
            norm.weight.copy_(values(f"{title}/weight", (channels,), fp32).abs() + 0.5)
            norm.bias.copy_(values(f"{title}/bias", (channels,), fp32))
        norm = norm.to(device)
        x, dy, residual = (
            _placed(f"{title}/{key}", place, dtype, device) for key in ("x", "dy", "residual")
        )
        inputs = [x, residual] if join else [x]
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

    return Golden(title, run, True, tolerance)


def _passes() -> Iterator[Golden]:
    # Around a block's eight lanes, vectors and chunks; every word of key and counter; rare and frequent p.
    for n in (1, 7, 8, 9, 15, 17, 63, 65, 1023, 1025, 65535, 65537):
        yield mask(n, 0.5, 1, 0, n < 100)
    for p in (0.0, 1e-5, 0.1, 0.9, 0.99999, 1.0):
        yield mask(4097, p, 2, 4, p == 0.1)
    for seed in (0, 0xFFFFFFFF, 0x100000000, 0xFEDCBA9876543210):
        for offset in (0, 0xFFFFFFFF, 0x100000000, 0x0123456789ABCDEF):
            yield mask(1000, 0.3, seed, offset)
    for place in PLACES:
        for dtype in (fp32, bf16, fp16):
            yield dropped(place, dtype)
            for join in (False, True):
                yield normed(place, dtype, "relu", join)
            yield normed(place, dtype, "silu", False)


PASSES: tuple[Golden, ...] = tuple(_passes())
