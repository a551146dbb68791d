"""Refuses what a trace would do once and then forget."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["pure"]

# Contexts that change what operators do; a graph has no place for them. Checkpointing enters the last.
_CONTEXTS: tuple[tuple[type, str, str], ...] = (
    (torch.autocast, "__enter__", "enters autocast"),
    (torch.no_grad, "__enter__", "enters no_grad"),
    (torch.enable_grad, "__enter__", "enters enable_grad"),
    (torch.set_grad_enabled, "__init__", "switches gradients on or off"),
    (torch.inference_mode, "__enter__", "enters inference_mode"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "changes what is saved for backward"),
)


class _Writer(io.StringIO):
    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self._error = error
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            raise self._error("its forward prints")
        return len(text)


def _refusing(original: Any, error: type[Exception], what: str) -> Any:
    thread = threading.get_ident()

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise error(f"its forward {what}")
        return original(self, *args, **kwargs)

    return method


@contextlib.contextmanager
def _refused_contexts(error: type[Exception]) -> Iterator[None]:
    replaced = []
    try:
        for owner, name, what in _CONTEXTS:
            original = owner.__dict__[name]
            setattr(owner, name, _refusing(original, error, what))
            replaced.append((owner, name, original))
        apply = torch.autograd.Function.__dict__["apply"]
        refusing = _refusing(apply.__func__, error, "calls a custom autograd function")
        torch.autograd.Function.apply = classmethod(refusing)  # type: ignore[method-assign, assignment]
        replaced.append((torch.autograd.Function, "apply", apply))
        yield
    finally:
        for owner, name, original in reversed(replaced):
            setattr(owner, name, original)


def _random_states() -> tuple[Any, ...]:
    states: list[Any] = [random.getstate(), bytes(torch.get_rng_state().tolist())]
    if torch.cuda.is_initialized():
        states += [bytes(state.tolist()) for state in torch.cuda.get_rng_state_all()]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states.append((kind, keys.tobytes(), *rest))
    return tuple(states)


@contextlib.contextmanager
def pure(error: type[Exception]) -> Iterator[None]:
    """Raises ``error`` if the body prints, warns, draws random numbers, or enters a context that matters."""
    states = _random_states()
    with (
        _refused_contexts(error),
        contextlib.redirect_stdout(_Writer(error)),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        yield
    if warned:
        raise error("its forward warns")
    if _random_states() != states:
        raise error("its forward draws random numbers")
