"""What a step does where only torch's own code can: the gradients it would use, handed to torch's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


def _torch_step_of(cls: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """torch's step without the hook wrapper that torch puts around a class once it is instantiated."""
    step: Any = cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


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
) -> bool:
    """Runs ``torch_class.step``.

    Args:
        optimizer: whose parameters and state to step.
        torch_class: the torch optimizer class it derives from.
        scale: multiplies the present gradients.
        window_weight: sum of the weights of the open accumulation window, or None.
        mean: divide the window's sum by its weights, to which present gradients add 1.
        counts: this call adds 1 to them even if no gradient is present.

    Returns:
        False if there was nothing to do.

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
        return False
    divisor = 1.0
    if window_weight is not None and mean:
        divisor = window_weight + float(present or counts)
        if divisor == 0.0:
            raise ValueError(f"{name}: the weights of the accumulated gradients sum to 0")

    grads = [
        (p, p.grad, _effective_gradient(optimizer, p, scale, divisor, group))
        for group in optimizer.param_groups
        for p in group["params"]
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
    return True


def _effective_gradient(
    optimizer: Optimizer, p: Tensor, scale: float, divisor: float, group: dict[str, Any]
) -> Tensor | None:
    grad = p.grad
    total = optimizer.state[p].get("grad_sum") if p in optimizer.state else None
    l1 = group.get("l1", 0.0)
    if grad is not None and scale != 1.0:
        grad = grad * scale
    if total is not None:
        grad = total if grad is None else total + grad
    if grad is None:
        return None
    if divisor != 1.0:
        grad = grad / divisor
    if l1 != 0.0:
        if grad.layout is not torch.strided:
            raise ValueError(f"{type(optimizer).__name__}: l1 needs dense gradients")
        sign = torch.view_as_real(p).sign() if p.is_complex() else p.sign()
        sign = torch.view_as_complex(sign) if p.is_complex() else sign
        # torch negates the gradient to maximize; the penalty keeps its sign.
        grad = grad - l1 * sign if group["maximize"] else grad + l1 * sign
    return grad.to(p.dtype) if grad.dtype != p.dtype else grad
