"""The step shared by braze's optimizers: native plan, gradient accumulation, and torch's code where it must."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from braze import _native
from braze._native import _C
from braze.optim import _torch_path

_NO_WINDOW = -1.0
_WINDOW_KEYS = (
    "accumulated_steps",
    "accumulated_weight",
    "accumulated_pending",
    "accumulated_raw",
)


class FusedStep(Optimizer):
    """Mixin in front of a torch optimizer class: replaces ``step`` and adds gradient accumulation.

    A window is the run of micro-batches that one update is made of. While it is open, each parameter's
    sum is in ``state[p]["grad_sum"]`` and the counts are in ``param_groups[0]``, so ``state_dict``, pickle
    and deepcopy carry them; outside a window there is no trace of them.
    """

    _algorithm: ClassVar[str]
    _torch_class: ClassVar[type[Optimizer]]
    _folds_momentum: ClassVar[bool] = False

    accumulation_steps: int
    accumulation: str

    @staticmethod
    def _check_extras(accumulation_steps: int, accumulation: str, l1: float) -> None:
        if not isinstance(accumulation_steps, int) or isinstance(accumulation_steps, bool):
            raise TypeError(
                f"accumulation_steps must be an int, got {type(accumulation_steps).__name__}"
            )
        if accumulation_steps < 1:
            raise ValueError(f"Invalid accumulation_steps value: {accumulation_steps}")
        if accumulation not in ("mean", "sum"):
            raise ValueError(f"Invalid accumulation value: {accumulation!r}; use 'mean' or 'sum'")
        if not l1 >= 0.0:
            raise ValueError(f"Invalid l1 value: {l1}")

    def _configure(
        self, accumulation_steps: int, accumulation: str, l1: float, capturable: bool = False
    ) -> None:
        self.accumulation_steps = accumulation_steps
        self.accumulation = accumulation
        # Only a group that uses it has the key: a default state_dict keeps exactly torch's keys.
        extras: dict[str, Any] = {"l1": l1} if l1 != 0.0 else {}
        if capturable:
            extras["capturable"] = True
        for key, value in extras.items():
            self.defaults[key] = value
            for group in self.param_groups:
                group.setdefault(key, value)
        self._prepare()

    def _prepare(self) -> None:
        """Everything that is derived: after the constructor, unpickling and deepcopy."""
        defaults = self.defaults
        # Decided by the constructor's arguments: a loaded checkpoint overwrites the flags in the groups.
        self._uses_torch = bool(
            defaults.get("differentiable")
            or defaults.get("foreach")
            or defaults.get("fused") is False
        )
        if not self._uses_torch:
            self._step_supports_amp_scaling = True
        self._updated: bool | Tensor = False  # a tensor: a found_inf not looked at yet
        self._plan = _C.StepPlan(self._algorithm, type(self).__name__)

    @property
    def updated(self) -> bool:
        """Whether the last ``step()`` changed parameters: False while gradients only accumulate, after an
        overflow, and when no parameter had a gradient. Waits for the device if only that knows."""
        if isinstance(self._updated, Tensor):
            self._updated = not bool(self._updated)
        return self._updated

    # ------------------------------------------------------------------ step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step; see the class for the formula.

        With an open accumulation window, or ``accumulation_steps`` > 1, the present gradients join the
        window with weight 1, and parameters change only when the window is complete.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            The closure's value, or None.

        Raises:
            ValueError: parameters share memory, or a gradient or state tensor does not fit its parameter
                (shape, device). Nothing has been changed then.
            TypeError: a gradient, state tensor or hyper-parameter has an unusable type; nothing changed.
            RuntimeError: a parameter is on a CUDA device and braze has no CUDA kernels here; a step inside
                a CUDA graph capture whose state does not exist yet, or whose step counts the CPU keeps.
                Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._updated = False
        grad_scale = getattr(self, "grad_scale", None)
        window = self._window()
        if window is None and self.accumulation_steps == 1:
            found_inf = getattr(self, "found_inf", None)
            # A plain 0 when no parameter has a gradient: GradScaler sums an empty list.
            if not isinstance(found_inf, Tensor):
                found_inf = None
            self._update(1.0, _NO_WINDOW, False, grad_scale, found_inf)
            return loss
        if self._overflowed():
            self._release_gradients()
            return loss
        scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        if window is None and self._only_creates_state():
            self._update(scale, _NO_WINDOW, False)
            return loss

        if grad_scale is not None and window is not None and "accumulated_raw" in window:
            raise RuntimeError(
                f"{type(self).__name__}: accumulate() was called on gradients that still carry the "
                "GradScaler's loss scale, which it could not know. With a GradScaler, let "
                "scaler.step(optimizer) accumulate: construct the optimizer with accumulation_steps=J"
            )
        group = self.param_groups[0]
        steps = group.get("accumulated_steps", 0) + 1
        pending = group.get("accumulated_pending", False)
        if steps < self.accumulation_steps:
            if self._fold(1.0, scale) or pending:
                group = self.param_groups[0]
                group["accumulated_steps"] = steps
                group["accumulated_pending"] = False
            return loss
        weight = group.get("accumulated_weight", 0.0)
        self._update(scale, weight, not pending)
        return loss

    def _window(self) -> dict[str, Any] | None:
        groups = self.param_groups
        return groups[0] if groups and "accumulated_weight" in groups[0] else None

    def _overflowed(self) -> bool:
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def _only_creates_state(self) -> bool:
        """torch.distributed.checkpoint creates a state by stepping with zero gradients and lr 0: such a
        first step must not open a window."""
        if self.state or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        return all(p.grad is None or not bool(p.grad.any()) for p in self._parameters())

    def _update(
        self,
        scale: float,
        window_weight: float,
        need_gradient: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One update from the gradients, or from the window if ``window_weight`` is not negative.

        ``grad_scale`` and ``found_inf`` are a GradScaler's; on a device they are not waited for.
        """
        mean = self.accumulation == "mean"
        if self._uses_torch or torch.compiler.is_compiling():
            reason = "torch"
        else:
            reason = self._plan.step(
                self.param_groups,
                self.state,
                scale,
                window_weight,
                mean,
                need_gradient,
                grad_scale,
                found_inf,
            )
        if reason in ("none", "overflow"):
            return
        if reason == "deferred":
            self._updated = True if found_inf is None else found_inf
            return
        if reason != "":
            self._check_reason(reason)
            if found_inf is not None and bool(found_inf):
                return
            if grad_scale is not None:
                scale /= float(grad_scale)
            window = None if window_weight == _NO_WINDOW else window_weight
            if not _torch_path.step(self, self._torch_class, scale, window, mean, need_gradient):
                return
            if window is not None:
                self._plan.reset()
        self._updated = True
        if window_weight != _NO_WINDOW:
            for key in _WINDOW_KEYS:
                self.param_groups[0].pop(key, None)

    def _check_reason(self, reason: str) -> None:
        if reason.startswith("cuda") and not self._uses_torch:
            raise RuntimeError(
                f"{type(self).__name__}: a parameter is on {reason}, but braze has no CUDA kernels "
                f"here: {_native.cuda_missing()}. Nothing was changed. To use torch's implementation "
                "instead, construct the optimizer with foreach=True"
            )

    # ---------------------------------------------------------- accumulation

    def accumulate(self, weight: float = 1.0) -> None:
        """Folds the present gradients into the window with a weight, and releases them (``.grad`` = None).

        sum += weight * g in fp32 (fp64 for fp64 parameters), in one pass over all parameters. The next
        update uses sum / (all weights) with ``accumulation="mean"``, or the sum itself with ``"sum"``.
        Use the number of tokens or samples as the weight, and the result equals one big batch. Parameters
        without a gradient contribute zero. Without any gradient the call does nothing.

        Args:
            weight: finite and not negative.

        Raises:
            ValueError: a bad weight, or a sparse gradient; as ``step()`` otherwise. Nothing has changed.
        """
        weight = float(weight)
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"accumulate: weight must be finite and >= 0, got {weight}")
        if self._overflowed():
            self._release_gradients()
            return
        grad_scale = getattr(self, "grad_scale", None)
        if self._fold(weight, 1.0 if grad_scale is None else 1.0 / float(grad_scale)):
            group = self.param_groups[0]
            group["accumulated_pending"] = True
            if grad_scale is None:
                group["accumulated_raw"] = True

    def _fold(self, weight: float, scale: float) -> bool:
        into_momentum = self._folds_momentum and self.accumulation == "sum"
        into_momentum = into_momentum and not self._uses_torch
        reason = self._plan.fold(self.param_groups, self.state, weight * scale, into_momentum)
        if reason == "none":
            return False
        if reason != "":
            self._check_reason(reason)
            if reason == "sparse":
                raise ValueError(
                    f"{type(self).__name__}: sparse gradients cannot be accumulated; use "
                    "nn.Embedding(sparse=False), or accumulation_steps=1"
                )
            _torch_path.fold(self, weight * scale)
        group = self.param_groups[0]
        group["accumulated_weight"] = group.get("accumulated_weight", 0.0) + weight
        return True

    def _release_gradients(self) -> None:
        for p in self._parameters():
            p.grad = None

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    # ------------------------------------------------- checkpoints and copies

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "accumulation_steps": self.accumulation_steps,
            "accumulation": self.accumulation,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for key in ("l1", "capturable"):
            if key in self.defaults:
                for group in self.param_groups:
                    group.setdefault(key, self.defaults[key])
        if "_plan" not in self.__dict__:
            self._prepare()
        self._plan.reset()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. The tensors are copied, so that a step never writes into the caller's dict, and
        fp32 accumulators of an open window keep their dtype."""
        seen: dict[str, Any] = {}  # what is loaded, after all other hooks have had their say
        handle = self.register_load_state_dict_pre_hook(lambda _, final: seen.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = seen["state"]
        # torch's conversion returns the very same tensor when there is nothing to convert.
        theirs = {
            id(value)
            for entry in saved.values()
            if isinstance(entry, dict)
            for value in entry.values()
            if isinstance(value, Tensor)
        }
        ids = chain.from_iterable(group["params"] for group in seen["param_groups"])
        for key, p in zip(ids, self._parameters(), strict=True):
            if p not in self.state:
                continue
            entry = self.state[p]
            if "grad_sum" in saved.get(key, ()):
                entry["grad_sum"] = saved[key]["grad_sum"].to(p.device)
            for name, value in entry.items():
                if not isinstance(value, Tensor):
                    continue
                if name == "step" and value.dtype not in (torch.float32, torch.float64):
                    entry[name] = value.to(torch.float32)
                elif id(value) in theirs:
                    entry[name] = value.clone()
        self._plan.reset()
