"""Slow references: the optimizers' formulas in plain torch, and bitwise comparison."""

from __future__ import annotations

from collections.abc import Callable
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


def _rounded(new: State, state: State, p: Tensor) -> State:
    return {k: v.to(state[k].dtype if k in state else p.dtype) for k, v in new.items()}


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
    return result.to(p.dtype), _rounded(new, state, p)


def _rmsprop_step(
    p: Tensor,
    g: Tensor,
    state: State,
    arithmetic: torch.dtype,
    *,
    step: int,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
    l1: float = 0.0,
) -> tuple[Tensor, State]:
    wide = p.to(arithmetic)
    grad = _effective_gradient(wide, g.to(arithmetic), weight_decay, l1, maximize)
    old = {key: value.to(arithmetic) for key, value in state.items() if key != "step"}
    zero = torch.zeros_like(wide)
    second = alpha * old.get("square_avg", zero) + (1 - alpha) * grad * grad
    new = {"square_avg": second}
    if centered:
        average = new["grad_avg"] = alpha * old.get("grad_avg", zero) + (1 - alpha) * grad
        second = (second - average * average).clamp(min=0)
    direction = grad / (second.sqrt() + eps)
    if momentum:
        direction = direction + momentum * old.get("momentum_buffer", zero)
        new["momentum_buffer"] = direction
    return (wide - lr * direction).to(p.dtype), _rounded(new, state, p)


def _rmsprop_magnitudes(
    p: Tensor, g: Tensor, state: State, step: int, flags: Flags
) -> tuple[Tensor, State]:
    wide = {key: value.double() for key, value in state.items() if key != "step"}
    plain = {k: flags[k] for k in flags.keys() & {"lr", "alpha", "weight_decay", "l1"}}
    absolute = {key: value.abs() for key, value in wide.items()}
    args = p.double().abs(), g.double().abs(), absolute, torch.float64
    _, moments = _rmsprop_step(*args, step=step, centered=True, **plain)
    alpha, zero = flags.get("alpha", 0.99), torch.zeros_like(args[0])
    gradient = (moments["grad_avg"] - alpha * absolute.get("grad_avg", zero)) / (1 - alpha)
    _, true = _rmsprop_step(p.double(), g.double(), wide, torch.float64, step=step, **flags)
    second, condition = true["square_avg"], torch.ones_like(zero)
    if flags.get("centered"):
        square = true["grad_avg"] ** 2
        condition = 1 + (second + square) / (second - square).clamp(min=1e-300)
        second = (second - square).clamp(min=0)
    direction = gradient / (second.sqrt() + flags.get("eps", 1e-8)) * condition
    momentum = flags.get("momentum", 0.0)
    direction = direction + momentum * absolute.get("momentum_buffer", zero)
    moments["momentum_buffer"] = direction
    return args[0] + flags["lr"] * direction, moments


def _lion_step(
    p: Tensor,
    g: Tensor,
    state: State,
    arithmetic: torch.dtype,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    l1: float = 0.0,
) -> tuple[Tensor, State]:
    wide = p.to(arithmetic)
    grad = _effective_gradient(wide, g.to(arithmetic), 0.0, l1, maximize)
    old = state["exp_avg"].to(arithmetic) if state else torch.zeros_like(wide)
    mixed = betas[0] * old + (1 - betas[0]) * grad
    sign = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch's sign of NaN is 0
    new = {"exp_avg": betas[1] * old + (1 - betas[1]) * grad}
    return (wide * (1 - lr * weight_decay) - lr * sign).to(p.dtype), _rounded(new, state, p)


def _lion_magnitudes(
    p: Tensor, g: Tensor, state: State, step: int, flags: Flags
) -> tuple[Tensor, State]:
    betas = flags.get("betas", (0.9, 0.99))
    zero = torch.zeros_like(p, dtype=torch.float64)
    old = state["exp_avg"].double() if state else zero
    size = _effective_gradient(p.double().abs(), g.double().abs(), 0.0, flags.get("l1", 0.0), False)
    true = _effective_gradient(
        p.double(), g.double(), 0.0, flags.get("l1", 0.0), flags.get("maximize", False)
    )
    mixed, terms = (betas[0] * m + (1 - betas[0]) * v for m, v in ((old, true), (old.abs(), size)))
    # Where the terms cancel, rounding decides the sign.
    narrow = torch.finfo(torch.float64 if p.dtype == torch.float64 else torch.float32)
    either = (terms > 0) & (mixed.abs() <= 16 * narrow.eps * terms + 4 * narrow.tiny * narrow.eps)
    scale = p.double().abs() * (1 + flags["lr"] * flags.get("weight_decay", 0.0)) + flags["lr"]
    scale = torch.where(either, scale / narrow.eps, scale)
    return scale, {"exp_avg": betas[1] * old.abs() + (1 - betas[1]) * size}


STEPS: dict[str, Callable[..., tuple[Tensor, State]]] = {
    "sgd": lambda *args, step, **flags: sgd_step(*args, **flags),
    "adam": adam_step,
    "rmsprop": _rmsprop_step,
    "lion": _lion_step,
}


def optimizer_step(
    kind: str, p: Tensor, g: Tensor, state: State, arithmetic: torch.dtype, step: int, flags: Flags
) -> tuple[Tensor, State]:
    return STEPS[kind](p, g, state, arithmetic, step=step, **flags)


def magnitudes(
    kind: str, p: Tensor, g: Tensor, state: State, step: int, flags: Flags
) -> tuple[Tensor, State]:
    """In fp64, the sums of the absolute values of the terms that one step adds up: what rounding
    errors are relative to when terms cancel."""
    if kind == "rmsprop":
        return _rmsprop_magnitudes(p, g, state, step, flags)
    if kind == "lion":
        return _lion_magnitudes(p, g, state, step, flags)
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
