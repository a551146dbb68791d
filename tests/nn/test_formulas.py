"""csrc/math/{arithmetic,activation,batch_norm}.h: worst errors against long double, and special values.

The programs are in tests/math; compiled without vector instructions, as the formulas are for any machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import emulator_build as build
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, CASES
from torch import Tensor

pytestmark = pytest.mark.cpu_only("is about the formulas")

SOURCES = Path(__file__).parents[1] / "math"
# Measured over all exponents and rounded up. exponential: units in the last place, as its header says;
# small_exponential_minus_1 and normal_cdf: units of 2^-23, as theirs say; reduced_range: of log(2) / 2.
ELEMENTARY = {
    "exponential": 1.5,
    "exponential_denormal": 1.5,
    "small_exponential_minus_1": 1.0,
    "exponential_minus_1": 1.5,
    "logarithm_of_1_plus": 1.5,
    "normal_cdf": 1.0,
    "hyperbolic_tangent": 3.0,
    "hyperbolic_tangent_double": 4.0,
    "reduced_range": 1.0001,
    "reduce_exponent": 0.3,
    "power_of_two": 0.0,
}
# Of double: values in units of 2^-53, derivatives against a difference quotient in units of 1e-12.
DOUBLE = (3.0, 1.0)
# The variance over mean / sigma up to 1e6 relative to itself: the documented 1e-6.
BATCH_NORM = {
    "mean_in_sigmas": 1e-6,
    "variance_relative": 1e-6,
    "unbiased_relative": 1e-6,
    "processes_variance_relative": 1e-6,
    "special": 1.0,
    "z_float": 20.0,
    "dx_float": 14.0,
    "frozen_dx_float": 8.0,
    "z_double": 1.0,
    "dx_double": 1.0,
    "frozen_dx_double": 1.0,
    "infinite_mean": 1.0,
}


def program(name: str) -> Path:
    if (reason := build.have("native")) is not None:
        pytest.skip(reason)
    return build.build_program(name, [SOURCES / f"{name}_program.cpp"], "native")


def worst(name: str, *arguments: str) -> dict[str, float]:
    done = build.run(program(name), arguments)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {what: float(error) for what, error, _ in rows}


def activation_bounds() -> dict[str, float]:
    bounds = dict(ELEMENTARY)
    for name, case in CASES.items():
        value, slope = case.bounds
        bounds |= {name: value, f"{name}_derivative": slope}
        bounds |= {f"{name}_double": DOUBLE[0], f"{name}_derivative_double": DOUBLE[1]}
    return bounds


PROGRAMS: list[tuple[str, tuple[str, ...], dict[str, float]]] = [
    ("activation", ("errors",), activation_bounds()),
    ("batch_norm", (), BATCH_NORM),
]


@pytest.mark.parametrize(
    ("name", "arguments", "bounds"), PROGRAMS, ids=["activation", "batch_norm"]
)
def test_errors_are_within_their_bounds(
    name: str, arguments: tuple[str, ...], bounds: dict[str, float]
) -> None:
    errors = worst(name, *arguments)
    assert set(errors) == set(bounds)
    assert {k: v for k, v in errors.items() if not v <= bounds[k]} == {}


@pytest.mark.parametrize(
    ("name", "arguments", "bounds"), PROGRAMS, ids=["activation", "batch_norm"]
)
def test_spoiled_results_are_not(
    name: str, arguments: tuple[str, ...], bounds: dict[str, float]
) -> None:
    """The positive control: every single bound notices."""
    errors = worst(name, *arguments, "wrong")
    assert {k: v for k, v in errors.items() if v <= bounds[k]} == {}


SLOPE = 0.25
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    name: functools.partial(lambda function, z: function(z, SLOPE), function)
    for name, function in ACTIVATIONS.items()
} | {"hardsigmoid": F.hardsigmoid}  # whose derivative at the kinks is torch's
KINKS = sorted({0.0}.union(*(case.kinks for case in CASES.values())))
FINITE = (
    *KINKS,
    -0.0,
    1e-42,
    -1e-42,
    1e-30,
    -1e-30,
    19.9,
    20.1,
    -87.0,
    -104.0,
    104.0,
    -300.0,
    300.0,
)


def points(*x: float) -> dict[tuple[str, str, float], tuple[float, float]]:
    """y and dy/dz by activation, type and x (told apart by its repr, for -0 and nan)."""
    done = build.run(program("activation"), ["points", *(value.hex() for value in x)])
    found = {}
    for line in done.stdout.splitlines():
        name, kind, at, y, dy = line.split()
        found[name, kind, float.fromhex(at)] = (float.fromhex(y), float.fromhex(dy))
    return found


@pytest.mark.parametrize("kind", ["float", "double"])
def test_kinks_and_extremes_are_torchs(kind: str) -> None:
    dtype = torch.float32 if kind == "float" else torch.float64
    found = points(*FINITE)
    for name, function in TORCH.items():
        for x in FINITE:
            z = torch.tensor(x, dtype=dtype).requires_grad_()
            y = function(z)
            (dy,) = torch.autograd.grad(y, z)
            got = found[name, kind, float(z.detach())]
            assert got[0] == pytest.approx(float(y.detach()), rel=1e-5, abs=1e-7), (name, x)
            assert got[1] == pytest.approx(float(dy), rel=1e-5, abs=3e-6), (name, x)


@pytest.mark.parametrize("kind", ["float", "double"])
def test_nan_gives_nan(kind: str) -> None:
    done = build.run(program("activation"), ["points", "nan"])
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 2 * len(TORCH)
    for name, which, _, y, dy in rows:
        if which == kind:
            z = torch.tensor(math.nan).requires_grad_()
            (slope,) = torch.autograd.grad(TORCH[name](z), z)
            assert "nan" in y, name
            # Where torch's slope at nan is a number, ours may be that number.
            assert "nan" in dy or float.fromhex(dy) == pytest.approx(float(slope)), name


@pytest.mark.parametrize("x", [math.inf, -math.inf])
def test_infinities_are_torchs(x: float) -> None:
    found = points(x)
    for name, function in TORCH.items():
        z = torch.tensor(x).requires_grad_()
        y = function(z)
        (dy,) = torch.autograd.grad(y, z)
        slope = 1.0 if name == "mish" and x > 0 else float(dy)  # torch has nan there
        for got, want in zip(found[name, "float", x], (float(y.detach()), slope), strict=True):
            assert got == want or (math.isnan(got) and math.isnan(want)), (name, got, want)
