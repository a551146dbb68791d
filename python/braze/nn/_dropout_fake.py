"""What dropout's operators return, without computing: for torch.compile, export and FakeTensor."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def _fake_state(input: Tensor) -> Tensor:
    return input.new_empty(2, dtype=torch.int64)


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
    return torch.empty_like(input), _fake_state(input)


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
    return torch.empty_like(input)


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
