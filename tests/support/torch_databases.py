"""Runs a check with torch's function, class or namespace and with braze's, and tells what only braze fails.

A check is a function of the thing under test that raises where that does wrong. It says nothing of braze:
what torch's own fails too, in the same run, is no difference.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from differences import DIFFERENCES, Difference
from torch import Tensor

SEED = 5
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
DOUBLE = (torch.float64,)
SINGLE = (torch.float32,)
TOLERANCE = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-6, 2**-6),
    torch.float16: (2**-9, 2**-9),
}


def set_seed(seed: int = SEED) -> None:
    """torch.manual_seed of the CPU alone, which is a hundred times faster."""
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """One check of one sample."""

    subject: str
    check: str
    variant: str
    run: Callable[[Any], None]
    torch: Any
    braze: Any

    @property
    def id(self) -> str:
        return f"{self.subject}/{self.check}/{self.variant}"


class Outcome(NamedTuple):
    """``torch`` and ``braze``: None, or the first line of what was raised."""

    id: str
    torch: str | None
    braze: str | None

    @property
    def differs(self) -> bool:
        return self.torch is None and self.braze is not None


def _error(case: Case, target: Any) -> str | None:
    set_seed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.run(target)
        except Exception as error:
            # Traces of compilers begin with empty lines.
            lines = (str(error).strip() or "no message").splitlines()
            return f"{type(error).__name__}: {lines[0]}"
    return None


def outcome(case: Case) -> Outcome:
    """What is only raised with braze counts: without it, torch's own is not even asked."""
    braze = _error(case, case.braze)
    return Outcome(case.id, _error(case, case.torch), braze)


# Named here, so that collecting tests does not load the databases.
SUBJECTS = {
    "database_ops": (
        "batch_norm",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout-with_train",
        "feature_alpha_dropout-without_train",
    ),
    "database_modules": (
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "SyncBatchNorm",
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
        "TransformerEncoder",
        "TransformerEncoderLayer",
        "TransformerDecoderLayer",
    ),
    "database_optimizers": ("SGD", "Adam", "AdamW"),
}


@functools.cache
def cases(database: str) -> dict[str, list[Case]]:
    """By subject."""
    found: dict[str, list[Case]] = {}
    for case in importlib.import_module(database).cases():
        found.setdefault(case.subject, []).append(case)
    return found


@functools.cache
def outcomes(database: str, subject: str) -> list[Outcome]:
    return [outcome(case) for case in cases(database)[subject]]


def everything() -> Iterator[Outcome]:
    for database, subjects in SUBJECTS.items():
        for subject in subjects:
            yield from outcomes(database, subject)


def row_of(id: str) -> Difference | None:
    """The row of the table that accepts a difference."""
    return next((d for d in DIFFERENCES if any(fnmatchcase(id, p) for p in d.cases)), None)


def stale_rows(found: Iterable[Outcome]) -> list[str]:
    """Patterns of the table that no difference matches any more."""
    differing = [o.id for o in found if o.differs]
    patterns = (p for d in DIFFERENCES for p in d.cases)
    return [p for p in patterns if not any(fnmatchcase(id, p) for id in differing)]


# ---------------------------------------------------------------- for checks


class Check(NamedTuple):
    name: str
    run: Callable[..., None]
    dtypes: tuple[torch.dtype, ...]
    samples: Callable[..., Any]


def register(
    checks: list[Check], dtypes: Iterable[torch.dtype], samples: Callable[..., Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(run: Callable[..., None]) -> Callable[..., None]:
        checks.append(Check(run.__name__, run, tuple(dtypes), samples))
        return run

    return add


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def near(actual: Any, expected: Any, factor: float = 1.0) -> None:
    """Values within rounding; structure, shapes, dtypes and devices exactly."""
    if isinstance(expected, Tensor):
        rtol, atol = TOLERANCE.get(expected.dtype, (0.0, 0.0))
        torch.testing.assert_close(
            actual, expected, rtol=factor * rtol, atol=factor * atol, equal_nan=True
        )
        return
    assert type(actual) is type(expected), (type(actual), type(expected))
    if isinstance(expected, dict):
        assert list(actual) == list(expected), (list(actual), list(expected))
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            near(a, e, factor)
    else:
        assert actual == expected, (actual, expected)


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def raised(call: Callable[[], Any]) -> type[Exception] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


def raises_as(call: Callable[[], Any], truth: Callable[[], Any]) -> None:
    """Both raise the same type of error, or neither raises."""
    found, expected = raised(call), raised(truth)
    assert found is expected, f"raised {found}, not {expected}"


def warned(call: Callable[[], Any]) -> list[tuple[type[Warning], str]]:
    """What it warns of, whether or not it raises."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        raised(call)
    return [(w.category, str(w.message)) for w in found]


def at_seed(function: Callable[..., Any], seed: int = SEED) -> Callable[..., Any]:
    def seeded(*arguments: Any) -> Any:
        set_seed(seed)
        return function(*arguments)

    return seeded


def weights_like(y: Tensor) -> Tensor:
    """The same random gradient for every tensor of that shape, whatever was drawn before."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randint(-8, 9, y.shape, generator=generator).to(y.dtype)
    return (values / 8).as_strided(y.shape, values.stride())


def with_gradients(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> list[Any]:
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights_like(y), allow_unused=True)]


def argument(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As the function gets it, default or not; ``args`` begin after the input."""
    bound = inspect.signature(function).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments[name]


def expand(
    subject: str, checks: list[Check], torch_target: Any, braze_target: Any, *about: Any
) -> Iterator[Case]:
    """Every check with every sample in every dtype; ``samples(*about, dtype)`` gives (name, sample)."""
    for check in checks:
        for dtype in check.dtypes:
            for name, sample in check.samples(*about, dtype):
                run = functools.partial(_run, check.run, sample)
                yield Case(
                    subject, check.name, f"{short(dtype)}/{name}", run, torch_target, braze_target
                )


def _run(check: Callable[..., None], sample: Any, target: Any) -> None:
    check(target, sample)
