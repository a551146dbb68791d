"""Refuses what a trace would do once and then forget."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.overrides

__all__ = ["pure"]

# Contexts change what operators do, and a graph has no place for them; checkpointing enters the last.
_REFUSED: tuple[tuple[Any, str], ...] = (
    (torch.autocast.__enter__, "enters autocast"),
    (torch.no_grad.__enter__, "enters no_grad"),
    (torch.enable_grad.__enter__, "enters enable_grad"),
    (torch.set_grad_enabled.__init__, "switches gradients on or off"),
    (torch.inference_mode.__enter__, "enters inference_mode"),
    (torch.autograd.graph.saved_tensors_hooks.__enter__, "changes what is saved for backward"),
    (torch.autograd.Function.apply, "calls a custom autograd function"),
    (warnings.warn, "warns"),
    (print, "prints"),
)
# As the interpreter names them: Python functions by their code, others by themselves.
_WHAT = {getattr(function, "__code__", function): what for function, what in _REFUSED}
_EVENTS = {"call", "c_call"}


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
    """Raises ``error`` if the body prints, warns, draws random numbers, or enters a context that matters.

    The interpreter tells of each call before it is made, in this thread only; nothing is replaced.
    """

    def watch(frame: FrameType, event: str, function: Any) -> None:
        if event in _EVENTS and (what := _WHAT.get(frame.f_code if event == "call" else function)):
            raise error(f"its forward {what}")

    torch.overrides.get_overridable_functions()  # warns when it is made, at its first use
    states = _random_states()
    profile = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(profile)
    if _random_states() != states:
        raise error("its forward draws random numbers")
