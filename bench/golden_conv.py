"""Convolutions between batch norms, bit for bit: their numbers are small multiples of a power of two, so that
every product and every sum is exact in fp32, in whatever order a device adds. Statistics, which are not, have a
tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from braze._native import _C
from braze.nn._activation import NUMBERS
from torch import Tensor

from .golden_cases import NAMES, Golden, Results, bf16, fp16, fp32, values

_SLOPE = 0.25


@dataclass(frozen=True)
class Convolution:
    """Of images [n, c, h, w] to k channels, padded by half the kernel. ``activation``: of the batch norm
    before, if there is one. ``implicit``: the gradient of its output is made of two tensors."""

    name: str
    size: tuple[int, int, int, int]
    k: int
    kernel: int
    stride: int = 1
    activation: str = ""
    implicit: bool = False

    @property
    def window(self) -> tuple[int, int]:
        return self.stride, self.kernel // 2

    @property
    def act(self) -> tuple[int, float]:
        return NUMBERS[self.activation or "identity"], _SLOPE


class Numbers:
    """A case's tensors on a device."""

    def __init__(self, conv: Convolution, dtype: torch.dtype, device: str) -> None:
        self.key = f"conv/{conv.name}"
        self.dtype, self.device = dtype, "cpu" if device == "emulated" else device
        n, c, *sides = conv.size
        out = [-(-side // conv.stride) for side in sides]
        self.x = self.image("x", *conv.size)
        self.weight = self.image("weight", conv.k, c, conv.kernel, conv.kernel)
        self.stats = self.rows("stats", c) if conv.activation else None
        self.grad: list[Tensor | None] = [self.image("grad", n, conv.k, *out), None, None, None]
        if conv.implicit:
            steps = self.powers("steps", 2, conv.k), self.quarters("constant", 1, conv.k)
            coefficients = torch.cat(steps)
            z = self.image("z", n, conv.k, *out)
            self.grad[1:] = z, self.rows("behind", conv.k), coefficients

    def quarters(self, key: str, *shape: int) -> Tensor:
        """Multiples of 1/4 from -2 to 2."""
        return (self._integers(key, shape, 17) - 8) / 4

    def powers(self, key: str, *shape: int) -> Tensor:
        """1/2, 1 and 2."""
        return torch.exp2(self._integers(key, shape, 3) - 1)

    def _integers(self, key: str, shape: tuple[int, ...], count: int) -> Tensor:
        x = (values(f"{self.key}/{key}", shape, fp32) * 2**14).round().remainder(count)
        return x.to(self.device)

    def image(self, key: str, *shape: int) -> Tensor:
        x = self.quarters(key, *shape).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def rows(self, key: str, channels: int) -> Tensor:
        """Statistics: mean, nothing below it, invstd, scale, shift."""
        mean, shift = self.quarters(key, 2, channels)
        invstd, scale = self.powers(key, 2, channels)
        return torch.stack([mean, torch.zeros_like(mean), invstd, scale, shift])


def products(conv: Convolution, dtype: torch.dtype, device: str) -> Results:
    """The output and the gradients, with what the batch norm before gets of its own."""
    of = Numbers(conv, dtype, device)
    norm = (None, None, None, None, None, 0.5, 1e-5)
    output, _ = _C.conv_norm_forward(of.x, of.stats, *conv.act, of.weight, *conv.window, *norm)
    before = (of.x, of.stats, None) if conv.activation else (None, None, None)
    d, *more = _C.conv_norm_input_grad(
        *of.grad, of.weight, *before, *conv.act, conv.size[2:], *conv.window
    )
    kernel = (conv.kernel, *conv.window)
    found = {"output": output, "d": d}
    if conv.activation:
        found |= dict(zip(("coefficients", "grad_weight", "grad_bias"), more, strict=True))
    for name, wide in (("weight.grad", False), ("weight.grad32", True)):
        found[name] = _C.conv_norm_weight_grad(of.x, of.stats, *conv.act, *of.grad, *kernel, wide)
    return {name: tensor.cpu() for name, tensor in found.items()}


def statistics(conv: Convolution, dtype: torch.dtype, device: str) -> Results:
    """Of the output, as the batch norm behind keeps them."""
    of = Numbers(conv, dtype, device)
    vectors = {
        "weight": of.powers("norm.weight", conv.k),
        "bias": of.quarters("norm.bias", conv.k),
        "running_mean": of.quarters("running_mean", conv.k),
        "running_var": of.powers("running_var", conv.k),
        "num_batches_tracked": torch.full((), 3, device=of.device),
    }
    norm = (*vectors.values(), 0.5, 1e-5)
    _, rows = _C.conv_norm_forward(of.x, of.stats, *conv.act, of.weight, *conv.window, *norm)
    mean, low, invstd, scale, shift = rows
    found = {"mean": mean + low, "invstd": invstd, "scale": scale, "bias": shift + low * scale}
    found |= dict(list(vectors.items())[2:])
    return {name: tensor.cpu() for name, tensor in found.items()}


# Tiles of 128 pixels and of 64 or 128 channels that are full, and that are not.
CONVOLUTIONS = (
    Convolution("1x1", (2, 64, 12, 8), 136, 1, activation="relu", implicit=True),
    Convolution("1x1s2", (3, 72, 8, 6), 64, 1, 2),
    Convolution("3x3", (2, 24, 9, 7), 72, 3, activation="leaky_relu", implicit=True),
    Convolution("3x3s2", (2, 136, 7, 6), 16, 3, 2, activation="relu6"),
)
CONVS: tuple[Golden, ...] = tuple(
    Golden(
        f"{title}/{conv.name}/{NAMES[dtype]}",
        partial(run, conv, dtype),
        short=tolerance is None,
        tolerance=tolerance,
    )
    for conv in CONVOLUTIONS
    for dtype in (bf16, fp16)
    for title, run, tolerance in (("conv", products, None), ("conv_statistics", statistics, 1e-6))
)
