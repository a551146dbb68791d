"""What dropout's operators return, without computing: for torch.compile, export and FakeTensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _state(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input.new_empty(2, dtype=torch.int64)


def _output(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(input)


def _output_and_state(input: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _output(input), _state(input)


def _of_saved(grad: Tensor, saved: Tensor, *_: Any, **__: Any) -> Tensor:
    return _output(saved)


_FAKES: dict[str, Callable[..., Any]] = {
    "dropout": _output_and_state,
    "dropout_add": _output_and_state,
    "act_dropout": _output_and_state,
    "dropout_": _state,
    "act_dropout_": _state,
    "dropout_apply": _output,
    "act_dropout_backward": _of_saved,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"braze::{_name}", _fake)
