"""Slow references: the optimizers' formulas in plain torch, and bitwise comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Flags = dict[str, Any]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _effective_gradient(
    p: Tensor, g: Tensor, weight_decay: float, l1: float, maximize: bool
) -> Tensor:
    g = -g if maximize else g
    if weight_decay:
        g = g + weight_decay * p
    if l1:
        g = g + l1 * p.sign()
    return g


def sgd_step(
    p: Tensor,
    g: Tensor,
    state: State,
    arithmetic: torch.dtype,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    l1: float = 0.0,
) -> tuple[Tensor, State]:
    """The parameter and state after one step, each rounded once to the dtype it came in."""
    wide, grad = p.to(arithmetic), g.to(arithmetic)
    grad = _effective_gradient(wide, grad, weight_decay, l1, maximize)
    if momentum == 0.0:
        return (wide - lr * grad).to(p.dtype), {}
    old = state.get("momentum_buffer")
    buffer = grad if old is None else momentum * old.to(arithmetic) + (1 - dampening) * grad
    direction = grad + momentum * buffer if nesterov else buffer
    kept = p.dtype if old is None else old.dtype
    return (wide - lr * direction).to(p.dtype), {"momentum_buffer": buffer.to(kept)}


def adam_step(
    p: Tensor,
    g: Tensor,
    state: State,
    arithmetic: torch.dtype,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
    l1: float = 0.0,
) -> tuple[Tensor, State]:
    """As sgd_step; ``step`` is the number of this step, from 1."""
    wide, grad = p.to(arithmetic), g.to(arithmetic)
    grad = _effective_gradient(wide, grad, 0.0 if decoupled else weight_decay, l1, maximize)
    old = {key: value.to(arithmetic) for key, value in state.items() if key != "step"}
    zero = torch.zeros_like(wide)
    first = betas[0] * old.get("exp_avg", zero) + (1 - betas[0]) * grad
    second = betas[1] * old.get("exp_avg_sq", zero) + (1 - betas[1]) * grad * grad
    new = {"exp_avg": first, "exp_avg_sq": second}
    largest = second
    if amsgrad:
        largest = new["max_exp_avg_sq"] = torch.maximum(old.get("max_exp_avg_sq", zero), second)
    denominator = largest.sqrt() / (1 - betas[1] ** step) ** 0.5 + eps
    decayed = wide * (1 - lr * weight_decay) if decoupled else wide
    result = decayed - lr / (1 - betas[0] ** step) * (first / denominator)
    rounded = {
        key: value.to(state[key].dtype if key in state else p.dtype) for key, value in new.items()
    }
    return result.to(p.dtype), rounded


def optimizer_step(
    kind: str, p: Tensor, g: Tensor, state: State, arithmetic: torch.dtype, step: int, flags: Flags
) -> tuple[Tensor, State]:
    if kind == "sgd":
        return sgd_step(p, g, state, arithmetic, **flags)
    return adam_step(p, g, state, arithmetic, step=step, **flags)


def magnitudes(
    kind: str, p: Tensor, g: Tensor, state: State, step: int, flags: Flags
) -> tuple[Tensor, State]:
    """In fp64, the sums of the absolute values of the terms that one step adds up: what rounding
    errors are relative to when terms cancel."""
    wide = {key: value.double().abs() for key, value in state.items() if key != "step"}
    plain = dict(flags, maximize=False)
    p, g = p.double().abs(), g.double().abs()
    # Subtracting with a negative rate adds.
    total, moments = optimizer_step(
        kind, p, g, wide, torch.float64, step, dict(plain, lr=-flags["lr"])
    )
    if kind == "sgd":
        return total, moments
    betas, eps = flags.get("betas", (0.9, 0.999)), flags.get("eps", 1e-8)
    true = dict(wide)
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        if key in moments:
            true[key] = moments[key]
    key = "max_exp_avg_sq" if flags.get("amsgrad") else "exp_avg_sq"
    denominator = true[key].sqrt() / (1 - betas[1] ** step) ** 0.5 + eps
    update = flags["lr"] / (1 - betas[0] ** step) * moments["exp_avg"] / denominator
    return p + p * flags["lr"] * flags.get("weight_decay", 0.0) + update, moments


def bits(t: Tensor) -> Tensor:
    """The bit patterns, with every NaN as one pattern."""
    real = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    if not real.is_floating_point():
        return real
    real = torch.where(real.isnan(), torch.full_like(real, torch.nan), real)
    return real.contiguous().view(_INTEGERS[real.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values apart, in the tensors' own dtype; NaN equals NaN and nothing else."""
    integer = _INTEGERS[a.element_size()]
    sign = torch.iinfo(integer).min

    def ordered(t: Tensor) -> Tensor:
        raw = t.detach().contiguous().view(integer).to(torch.int64)
        return torch.where(raw < 0, sign - raw, raw)

    distance = (ordered(a) - ordered(b)).abs()
    nan_a, nan_b = a.isnan(), b.isnan()
    distance = torch.where(nan_a & nan_b, 0, distance)
    return torch.where(nan_a ^ nan_b, torch.iinfo(torch.int64).max, distance)
