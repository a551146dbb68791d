"""The keyword arguments that braze's optimizers take beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict


class Extras(TypedDict, total=False):
    """Each has a default that reproduces torch; :class:`braze.optim.Adam` says what they mean."""

    l1: float
    accumulation_steps: int
    accumulation: str
    max_grad_norm: float | None
    error_if_nonfinite: bool
    ema_decay: float | Callable[[int], float] | None
    ema_warmup: bool


DEFAULTS = Extras(
    l1=0.0,
    accumulation_steps=1,
    accumulation="mean",
    max_grad_norm=None,
    error_if_nonfinite=False,
    ema_decay=None,
    ema_warmup=False,
)
# Those that an optimizer has as attributes, and not its groups.
ATTRIBUTES = tuple(name for name in DEFAULTS if name != "l1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checked(owner: str, given: Any) -> Extras:
    """All of them, with what was not given. Raises before anything is made."""
    for name in given:
        if name not in DEFAULTS:
            raise TypeError(f"{owner}() got an unexpected keyword argument {name!r}")
    extras = Extras(**{**DEFAULTS, **given})
    if not isinstance(extras["accumulation_steps"], int) or isinstance(
        extras["accumulation_steps"], bool
    ):
        raise TypeError(
            f"accumulation_steps must be an int, got {type(extras['accumulation_steps']).__name__}"
        )
    if extras["accumulation_steps"] < 1:
        raise ValueError(f"Invalid accumulation_steps value: {extras['accumulation_steps']}")
    if extras["accumulation"] not in ("mean", "sum"):
        raise ValueError(
            f"Invalid accumulation value: {extras['accumulation']!r}; use 'mean' or 'sum'"
        )
    if not extras["l1"] >= 0.0:
        raise ValueError(f"Invalid l1 value: {extras['l1']}")
    checked_norm(extras["max_grad_norm"])
    for name in ("error_if_nonfinite", "ema_warmup"):
        if not isinstance(extras[name], bool):  # type: ignore[literal-required]
            kind = type(extras[name]).__name__  # type: ignore[literal-required]
            raise TypeError(f"{name} must be a bool, got {kind}")
    if extras["error_if_nonfinite"] and extras["max_grad_norm"] is None:
        raise ValueError("error_if_nonfinite needs max_grad_norm; float('inf') clips nothing")
    decay = extras["ema_decay"]
    if decay is not None and not callable(decay):
        checked_decay(decay, "ema_decay")
    if extras["ema_warmup"] and decay is None:
        raise ValueError("ema_warmup needs ema_decay, a number between 0 and 1")
    return extras


def checked_norm(value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value):
        raise TypeError(f"max_grad_norm must be a number or None, got {type(value).__name__}")
    if not value >= 0.0:
        raise ValueError(f"Invalid max_grad_norm value: {value}; it must be at least 0")
    return float(value)


def checked_decay(value: Any, name: str) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"Invalid {name} value: {value}; it must be between 0 and 1")
    return float(value)
