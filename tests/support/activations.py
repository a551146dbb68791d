"""What tests know of each activation: what torch computes, and all the forms in which it may be given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from braze._native import _C
from torch import Tensor, nn


class Case(NamedTuple):
    of_torch: Callable[[Tensor, float], Tensor]
    forms: tuple[Any, ...]  # modules, functions, and names of methods
    # Worst errors of value and derivative in float, in units of 2^-24 max(1, |value|).
    bounds: tuple[float, float]
    kinks: tuple[float, ...] = ()
    # (upper, lower) where the derivative is one of two constants; a lower of None is the parameter.
    slopes: tuple[float, float | None] | None = None
    parameter: float = 0.0  # a positive slope, so that its sign cannot hide in a symmetric sample


def hardsigmoid(z: Tensor) -> Tensor:
    """torch's own rounds 1/6 to fp32 in the derivative, also in fp64, and has no second derivative."""
    return (z + 3).clamp(0, 6) / 6 if z.dtype is torch.float64 else F.hardsigmoid(z)


CASES: dict[str, Case] = {
    "identity": Case(lambda z, _: z, (), (0.0, 0.0)),
    "relu": Case(
        lambda z, _: F.relu(z),
        (nn.ReLU(), nn.ReLU(True), F.relu, torch.relu, torch.relu_, "relu", "relu_"),
        (0.0, 0.0),
        (0.0,),
        (1.0, 0.0),
    ),
    "relu6": Case(
        lambda z, _: F.relu6(z),
        (
            nn.ReLU6(),
            nn.Hardtanh(0.0, 6.0),
            F.relu6,
            functools.partial(F.hardtanh, min_val=0.0, max_val=6.0),
        ),
        (0.0, 0.0),
        (0.0, 6.0),
        (1.0, 0.0),
    ),
    "leaky_relu": Case(
        lambda z, slope: F.leaky_relu(z, slope),
        (nn.LeakyReLU(0.2), functools.partial(F.leaky_relu, negative_slope=0.3)),
        (0.5, 0.0),
        (0.0,),
        (1.0, None),
        parameter=0.1,
    ),
    "elu": Case(
        lambda z, alpha: F.elu(z, alpha),
        (nn.ELU(0.7), functools.partial(F.elu, alpha=0.5)),
        (1.0, 1.0),
        (0.0,),
        parameter=0.7,
    ),
    "sigmoid": Case(
        lambda z, _: torch.sigmoid(z), (nn.Sigmoid(), torch.sigmoid, "sigmoid_"), (2.0, 1.5)
    ),
    "tanh": Case(lambda z, _: torch.tanh(z), (nn.Tanh(), torch.tanh, "tanh"), (3.0, 4.0)),
    "silu": Case(lambda z, _: F.silu(z), (nn.SiLU(), nn.SiLU(True), F.silu), (3.0, 4.0)),
    "gelu": Case(lambda z, _: F.gelu(z), (nn.GELU(), F.gelu), (3.0, 3.0)),
    "gelu_tanh": Case(
        lambda z, _: F.gelu(z, approximate="tanh"),
        (nn.GELU("tanh"), functools.partial(F.gelu, approximate="tanh")),
        (3.0, 4.0),
    ),
    "hardswish": Case(
        lambda z, _: F.hardswish(z), (nn.Hardswish(), F.hardswish), (3.0, 2.0), (-3.0, 3.0)
    ),
    "hardsigmoid": Case(
        lambda z, _: hardsigmoid(z),
        (nn.Hardsigmoid(), F.hardsigmoid),
        (1.5, 0.2),
        (-3.0, 3.0),
        (1.0 / 6.0, 0.0),
    ),
    "mish": Case(lambda z, _: F.mish(z), (nn.Mish(), F.mish), (3.0, 3.0)),
    "softplus": Case(lambda z, _: F.softplus(z), (nn.Softplus(), F.softplus), (2.5, 2.0)),
    "hardtanh": Case(
        lambda z, _: F.hardtanh(z),
        (nn.Hardtanh(), F.hardtanh, F.hardtanh_),
        (0.0, 0.0),
        (-1.0, 1.0),
        (1.0, 0.0),
    ),
}
NAMES = tuple(_C.ACTIVATION_SLOPES)  # by number, as the inner operators take them
ACTIVATIONS = {name: case.of_torch for name, case in CASES.items()}
KINKS = {name: case.kinks for name, case in CASES.items() if case.kinks}
PARAMETERS = {name: case.parameter for name, case in CASES.items() if case.parameter}
# One bit tells the derivative.
TWO_SLOPES = tuple(name for name, case in CASES.items() if case.slopes is not None)
MODULES = {
    name: next((form for form in case.forms if isinstance(form, nn.Module)), nn.Identity())
    for name, case in CASES.items()
}
