"""What dropout's operators give for fake tensors: shapes, dtypes and strides."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def _fake_state(input: Tensor) -> Tensor:
    return input.new_empty(2, dtype=torch.int64)


def _fake_output(input: Tensor, feature: bool) -> Tensor:
    if feature and not (input.is_contiguous() or input.movedim(1, -1).is_contiguous()):
        return torch.empty_like(input, memory_format=torch.contiguous_format)
    return torch.empty_like(input)


@torch.library.register_fake("braze::dropout")
def _(
    input: Tensor,
    p: float,
    alpha: bool = False,
    feature: bool = False,
    *,
    generator: Generator | None = None,
    distinct: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _fake_output(input, feature), _fake_state(input)


@torch.library.register_fake("braze::dropout_")
def _(
    input: Tensor,
    p: float,
    alpha: bool = False,
    feature: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    return _fake_state(input)


@torch.library.register_fake("braze::dropout_apply")
def _(
    input: Tensor,
    rng_state: Tensor,
    p: float,
    alpha: bool = False,
    feature: bool = False,
    gradient: bool = False,
) -> Tensor:
    return _fake_output(input, feature)


@torch.library.register_fake("braze::dropout_add")
def _(
    input: Tensor,
    residual: Tensor,
    p: float,
    *,
    generator: Generator | None = None,
    distinct: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), _fake_state(input)


@torch.library.register_fake("braze::act_dropout")
def _(
    input: Tensor,
    p: float,
    activation: str,
    parameter: float = 0.0,
    *,
    generator: Generator | None = None,
    distinct: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), _fake_state(input)


@torch.library.register_fake("braze::act_dropout_")
def _(
    input: Tensor,
    p: float,
    activation: str,
    parameter: float = 0.0,
    *,
    generator: Generator | None = None,
) -> Tensor:
    return _fake_state(input)


@torch.library.register_fake("braze::act_dropout_backward")
def _(
    grad: Tensor,
    saved: Tensor,
    rng_state: Tensor,
    p: float,
    activation: str,
    parameter: float = 0.0,
) -> Tensor:
    return torch.empty_like(saved)
