"""All of ``torch.amp``, with a GradScaler that braze's optimizers need not wait for in the place of torch's."""

import sys as _sys
from types import ModuleType as _ModuleType
from typing import Any

import torch.amp as _torch_amp
from torch.amp import *  # noqa: F403
from torch.amp import autocast_mode as autocast_mode
from torch.amp import grad_scaler as grad_scaler
from torch.optim import Optimizer

from braze.optim._step import FusedStep as _FusedStep

__all__ = [  # as __all__ of torch.amp, which has none before torch 2.14
    name
    for name, value in vars(_torch_amp).items()
    if not name.startswith("_") and not isinstance(value, _ModuleType)
]

for _module in (autocast_mode, grad_scaler):
    _sys.modules.setdefault("braze" + _module.__name__.removeprefix("torch"), _module)


class GradScaler(_torch_amp.GradScaler):  # type: ignore[no-redef]
    """``torch.amp.GradScaler``, whose ``step`` leaves the search for overflows to braze's optimizers.

    g = .grad / scale; if every g is finite, the optimizer's update with g, ``max_grad_norm`` of g included;
    otherwise nothing changes, and ``update()`` makes the scale smaller. torch reads and writes all gradients
    for that before the step, and waits for the answer on the host unless the optimizer has ``fused=True``.
    Here the optimizer's own step does it in two passes that write no gradient, and on a device the host never
    waits once the optimizer's state exists: ``optimizer.skipped`` and ``optimizer.grad_norm`` hold the
    answers there.

    Arguments, errors, the other methods and ``state_dict`` are torch's; checkpoints go both ways. Other
    optimizers, and braze's with ``foreach=True``, ``fused=False`` or ``differentiable=True``, step exactly
    as under torch's scaler.

    Differences from torch's:

    - After ``step``, ``.grad`` still carries the scale, unless ``unscale_`` was called before.
    - Gradients in fp16 are taken, without ``fused=True`` too. ``unscale_`` refuses them as torch's does.
    - An fp64 gradient whose square is beyond fp64 counts as an overflow.
    - After an overflow ``step`` was called nonetheless, so that its hooks ran, and ``updated`` is False.
    - Step counts that an optimizer kept on the CPU for parameters on a device move to the device. A step
      that is skipped there, unknown to the CPU, counts for ``ema_warmup``.

    What waits for the device: the step that makes an average or a damped momentum buffer, sparse gradients
    and others that torch's code has to step, and accumulation. There torch's protocol holds: a micro-batch
    that overflows is left out of the window and does not count in it. Where several ``backward()`` add up in
    ``.grad`` before one ``step``, an overflow in any of them skips that step.
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step()`` with unscaled gradients, if all of them are finite; see the class.

        Raises:
            RuntimeError: a closure was passed, or ``step`` was called since the last ``update()``.
            AssertionError: ``scale()`` was never called, or no parameter has a gradient.
        """
        state = self._per_optimizer_states[id(optimizer)] if self._enabled else None
        if (
            state is None
            or state["stage"] is grad_scaler.OptState.STEPPED
            or args
            or kwargs
            or not isinstance(optimizer, _FusedStep)
            or not optimizer.takes_scaled_gradients
        ):
            return super().step(optimizer, *args, **kwargs)
        scale, _ = self._check_scale_growth_tracker("step")
        found = state["found_inf_per_device"]
        unscaled = state["stage"] is grad_scaler.OptState.UNSCALED
        if unscaled and not found:
            return super().step(optimizer)
        if unscaled:
            total = sum(t.to(scale.device, non_blocking=True) for t in found.values())
            result = optimizer.step_scaled(None, total)
        else:
            result = optimizer.step_scaled(scale, None)
            if (skipped := optimizer._skipped) is not None:
                # The optimizer keeps its own: update() adds the others into the first one it gets.
                found[skipped.device] = skipped.reshape(()).clone()
            elif not optimizer._step_supports_amp_scaling:
                raise AssertionError("No inf checks were recorded for this optimizer.")
        state["stage"] = grad_scaler.OptState.STEPPED
        return result
