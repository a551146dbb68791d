"""Modules in pairs, torch's and braze's with the same state, and what to feed them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import braze.nn as bnn
import torch
from torch import Tensor, nn

# Relative to the largest value: of results rounded once to that dtype, and of sums in it.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


def _plain(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values[: torch.Size(shape).numel()].view(shape).clone()


def _channels_last(*shape: int) -> Callable[[Tensor], Tensor]:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return lambda values: _plain(*shape)(values).contiguous(memory_format=last)


# name: (dimensions of the module, values -> input). Every input has 5 channels.
INPUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "NC": (1, _plain(6, 5)),
    "NCL": (1, _plain(4, 5, 7)),
    "NLC": (1, lambda v: _plain(4, 7, 5)(v).transpose(1, 2)),
    "CN": (1, lambda v: _plain(5, 6)(v).t()),
    "NCHW": (2, _plain(3, 5, 4, 6)),
    "NHWC": (2, _channels_last(3, 5, 4, 6)),
    "NC11": (2, _plain(6, 5, 1, 1)),
    "1CHW": (2, _plain(1, 5, 3, 3)),
    "every other column": (2, lambda v: _plain(3, 5, 4, 6)(v)[..., ::2]),
    "NCWH": (2, lambda v: _plain(3, 5, 6, 4)(v).transpose(2, 3)),
    "expanded": (2, lambda v: _plain(3, 5, 1, 6)(v).expand(3, 5, 4, 6)),
    "some channels": (2, lambda v: _channels_last(3, 8, 4, 6)(v)[:, 2:7]),
    "NCDHW": (3, _plain(2, 5, 3, 2, 3)),
    "NDHWC": (3, _channels_last(2, 5, 3, 2, 3)),
}
CONFIGS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None, "track_running_stats": False},
]
# dtype of the input, of parameters and buffers
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]


def values(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1000, generator=generator, dtype=torch.float64) * 2 + 0.5).to(dtype)


def make_input(layout: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return INPUTS[layout][1](values(seed, dtype)).detach().requires_grad_()


def pair(
    dims: int, *, params: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """torch's BatchNorm and braze's, of 5 channels and with the same numbers."""
    result = []
    for module in (nn, bnn):
        made = getattr(module, f"BatchNorm{dims}d")(5, dtype=params, **kwargs)
        with torch.no_grad():
            for i, p in enumerate(made.parameters()):
                p.copy_(torch.linspace(0.5 - i, 1.5, 5))
            if made.running_mean is not None:
                made.running_mean.copy_(torch.linspace(-1, 1, 5))
                made.running_var.copy_(torch.linspace(0.5, 2, 5))
        result.append(made)
    return result[0], result[1]


def in_double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def assert_near(
    actual: Tensor, truth: Tensor, what: str, factor: float = 1.0, least: float = 1e-3
) -> None:
    """`truth` is in double; differences count relative to its largest value, or to `least`."""
    assert actual.shape == truth.shape, what
    if truth.numel() == 0:
        return
    assert bool(torch.isfinite(actual).all()), f"{what} is not finite"
    actual, truth = actual.detach(), truth.detach()
    error = float((actual.double() - truth).abs().max())
    allowed = factor * TOLERANCE[actual.dtype] * max(float(truth.abs().max()), least)
    assert error <= allowed, f"{what}: off by {error:.3g}, {allowed:.3g} allowed"


def gradients(module: nn.Module, input: Tensor, y: Tensor, seed: int = 7) -> dict[str, Tensor]:
    """Of a loss whose gradient is the same random tensor, exactly, for every dtype and layout."""
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randint(-64, 65, y.shape, generator=generator).to(y.dtype) / 32
    wanted = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, [input, *wanted.values()], dy.to(y.device))
    return dict(zip(["input", *wanted], found, strict=True))


def assert_same_state(actual: nn.Module, truth: nn.Module, factor: float = 1.0) -> None:
    expected = truth.state_dict()
    assert actual.state_dict().keys() == expected.keys()
    for name, value in actual.state_dict().items():
        if value.dtype is torch.int64:
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
        else:
            assert_near(value, expected[name], name, factor)
