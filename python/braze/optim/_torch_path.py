"""What a step does where only torch's own code can: the gradients it would use, handed to torch's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm as torch_get_total_norm
from torch.optim.optimizer import Optimizer


def _torch_step_of(cls: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """torch's step without the hook wrapper that torch puts around a class once it is instantiated."""
    step: Any = cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


@dataclass
class Clip:
    """What is asked about the norm of the gradients, and what it was."""

    max_norm: float | None
    find_overflow: bool
    error_if_nonfinite: bool
    norm: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def asks(self) -> bool:
        return self.max_norm is not None or self.find_overflow

    def factor(self, gradients: list[Tensor]) -> Tensor | None:
        """What the gradients are to be multiplied by; None if they overflowed."""
        values = [
            (g.coalesce().values() if g.is_sparse else g).to(
                torch.promote_types(g.dtype, torch.float64)  # squares of finite ones are finite
            )
            for g in gradients
        ]
        norm = torch_get_total_norm(values, 2.0, self.error_if_nonfinite and not self.find_overflow)
        if hasattr(norm, "full_tensor"):  # of shards: over all of them
            norm = norm.full_tensor()
        self.norm = norm.float()
        self.found_inf = norm.isfinite().logical_not().float()
        if self.find_overflow and bool(self.found_inf):
            return None
        if self.max_norm is None:
            return torch.ones(())
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def average(optimizer: Optimizer, updated: list[Tensor], weight: float) -> None:
    """The running averages of what has just been updated."""
    for p in updated:
        state = optimizer.state[p]
        wide = torch.promote_types(p.dtype, torch.float32)
        if "ema" in state:
            state["ema"].lerp_(p.to(wide), weight)
        else:
            state["ema"] = p.detach().to(wide, copy=True)


@torch.no_grad()
def fold(optimizer: Optimizer, weight: float) -> bool:
    """Adds weight * gradient to ``state[p]["grad_sum"]`` in at least fp32, and releases ``.grad``.

    Returns:
        False if there was no gradient.
    """
    folded = False
    for p in _parameters(optimizer):
        if p.grad is None:
            continue
        state = optimizer.state[p]
        if "grad_sum" not in state:
            wide = torch.promote_types(p.dtype, torch.float32)
            state["grad_sum"] = torch.zeros_like(p, dtype=wide)
        state["grad_sum"].add_(p.grad, alpha=weight)
        p.grad = None
        folded = True
    return folded


def step(
    optimizer: Optimizer,
    torch_class: type[Optimizer],
    scale: float,
    window_weight: float | None,
    mean: bool,
    counts: bool,
    clip: Clip,
) -> list[Tensor]:
    """Runs ``torch_class.step``.

    Args:
        optimizer: whose parameters and state to step.
        torch_class: the torch optimizer class it derives from.
        scale: multiplies the present gradients.
        window_weight: sum of the weights of the open accumulation window, or None.
        mean: divide the window's sum by its weights, to which present gradients add 1.
        counts: this call adds 1 to them even if no gradient is present.
        clip: what to do about the gradients' norm; takes what it was.

    Returns:
        The parameters it updated: none if there was nothing to do, or an overflow was found.

    Raises:
        ValueError: the weights sum to 0, or an l1 penalty meets a sparse gradient; nothing has changed.
        RuntimeError: the window is in the momentum buffers already; nothing has changed.
    """
    name = type(optimizer).__name__
    states = [optimizer.state[p] for p in _parameters(optimizer) if p in optimizer.state]
    present = any(p.grad is not None for p in _parameters(optimizer))
    window = window_weight is not None and any("grad_sum" in state for state in states)
    if any("in_window" in state for state in states):
        raise RuntimeError(
            f"{name}: gradients of this window are already in the momentum buffers, but this step "
            "needs torch's code, which would decay them again; keep gradients dense and dispatch modes "
            "off for the whole window"
        )
    if not present and not window:
        return []
    divisor = 1.0
    if window_weight is not None and mean:
        divisor = window_weight + float(present or counts)
        if divisor == 0.0:
            raise ValueError(f"{name}: the weights of the accumulated gradients sum to 0")

    scaled = [
        (group, p, _scaled_gradient(optimizer, p, scale, divisor))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    if clip.asks:
        factor = clip.factor([grad for _, _, grad in scaled if grad is not None])
        if factor is None:
            return []
        scaled = [
            (group, p, None if grad is None else grad * factor.to(grad.device))
            for group, p, grad in scaled
        ]
    grads = [
        (p, p.grad, None if grad is None else _effective_gradient(optimizer, p, grad, group))
        for group, p, grad in scaled
    ]
    # torch must see neither the sums, whose presence it takes for an initialised state, nor the scaler's scale,
    # which is applied already.
    sums = [
        (p, optimizer.state[p].pop("grad_sum"))
        for p in (_parameters(optimizer) if window else ())
        if "grad_sum" in optimizer.state.get(p, ())
    ]
    for p, _ in sums:
        if not optimizer.state[p]:
            del optimizer.state[p]
    hidden: dict[str, Any] = {
        key: optimizer.__dict__.pop(key)
        for key in ("grad_scale", "found_inf")
        if key in optimizer.__dict__
    }
    done = False
    try:
        for p, old, new in grads:
            if new is not old:
                p.grad = new
        _torch_step_of(torch_class)(optimizer)
        done = True
    finally:
        for p, old, new in grads:
            if new is not old:
                p.grad = old
        optimizer.__dict__.update(hidden)
        if not done:
            for p, total in sums:
                optimizer.state[p]["grad_sum"] = total
    return [p for p, _, new in grads if new is not None]


def _scaled_gradient(
    optimizer: Optimizer, p: Tensor, scale: float, divisor: float
) -> Tensor | None:
    grad = p.grad
    total = optimizer.state[p].get("grad_sum") if p in optimizer.state else None
    if grad is not None and scale != 1.0:
        grad = grad * scale
    if total is not None:
        grad = total if grad is None else total + grad
    if grad is None:
        return None
    return grad / divisor if divisor != 1.0 else grad


def _effective_gradient(
    optimizer: Optimizer, p: Tensor, grad: Tensor, group: dict[str, Any]
) -> Tensor:
    l1 = group.get("l1", 0.0)
    if l1 != 0.0:
        if grad.layout is not torch.strided:
            raise ValueError(f"{type(optimizer).__name__}: l1 needs dense gradients")
        sign = torch.view_as_real(p).sign() if p.is_complex() else p.sign()
        sign = torch.view_as_complex(sign) if p.is_complex() else sign
        # torch negates the gradient to maximize; the penalty keeps its sign.
        grad = grad - l1 * sign if group["maximize"] else grad + l1 * sign
    return grad.to(p.dtype) if grad.dtype != p.dtype else grad
