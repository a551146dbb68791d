"""The step shared by braze's optimizers: native plan, gradient accumulation, and torch's code where it must."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame as _dynamo
from torch.optim.optimizer import Optimizer

from braze import _native
from braze._native import _C
from braze.optim import _torch_path
from braze.optim._average import WeightAverages
from braze.optim._extras import ATTRIBUTES, DEFAULTS, Extras, checked_norm
from braze.optim._stats import GradStats

_NO_WINDOW = -1.0
_GRAD_SCALER = torch.amp.GradScaler(enabled=False)  # for its pass over the gradients
_F = TypeVar("_F", bound=Callable[..., Any])


def _opaque(function: _F) -> _F:
    """torch.compile calls it as it stands. Unlike torch.compiler.disable it costs an eager call nothing."""
    try:
        skip = _dynamo._FrameAction.SKIP
        _dynamo.set_code_exec_strategy(function.__code__, _dynamo._FrameExecStrategy(skip, skip))
    except AttributeError:  # a torch whose internals are others
        return cast(_F, torch._disable_dynamo(function))
    function.__dict__["_torchdynamo_disable"] = True
    return function


class _Window(NamedTuple):
    """What an open accumulation window counts."""

    steps: int = 0  # calls of step()
    weight: float = 0.0  # the sum of all weights
    pending: bool = False  # accumulate() was called after the last step()
    raw: bool = False  # accumulate() took gradients that a GradScaler may have scaled


_WINDOW_KEYS = tuple(f"accumulated_{field}" for field in _Window._fields)


class FusedStep(WeightAverages):
    """Mixin in front of a torch optimizer class: replaces ``step`` and adds gradient accumulation.

    A window is the run of micro-batches that one update is made of. While it is open, each parameter's
    sum is in ``state[p]["grad_sum"]``. Its counts are kept here, because anyone may replace
    ``param_groups``, and in ``param_groups[0]``, which ``state_dict``, pickle and wrappers such as
    ZeroRedundancyOptimizer carry. Once closed it stays there as zeros, to overwrite such a wrapper's copy;
    ``state_dict`` leaves those out.
    """

    _algorithm: ClassVar[str]
    _torch_class: ClassVar[type[Optimizer]]
    _folds_momentum: ClassVar[bool] = False

    accumulation_steps: int
    accumulation: str
    max_grad_norm: float | None
    error_if_nonfinite: bool
    collect_grad_stats: bool
    """Whether steps collect what ``grad_stats()`` tells. Off by default."""

    def _configure(self, extras: Extras, **group_extras: Any) -> None:
        """After the torch class's constructor. Only a group that uses an extra has its key: a default
        ``state_dict`` keeps exactly torch's keys."""
        for key in ATTRIBUTES:
            setattr(self, key, extras[key])  # type: ignore[literal-required]
        if extras["l1"] != 0.0:
            group_extras["l1"] = extras["l1"]
        for key, value in group_extras.items():
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
        self._remember(None)
        self.collect_grad_stats = False
        self._updated: bool | Tensor = False  # a tensor: a found_inf not looked at yet
        self._grad_norm: Tensor | None = None
        self._skipped: Tensor | None = None  # not 0: the last step found an overflow
        self._scaler_asks: bool = False  # the step is to find the overflow itself
        self._counts_moved = False
        self._plan = _C.StepPlan(self._algorithm, type(self).__name__)

    @property
    def updated(self) -> bool:
        """Whether the last ``step()`` changed parameters: False while gradients only accumulate, after an
        overflow, and when no parameter had a gradient. Waits for the device if only that knows. Without
        ``fused=True`` a GradScaler that finds an overflow makes no call, and this stays as it was."""
        if isinstance(self._updated, Tensor):
            self._updated = not bool(self._updated)
        return self._updated

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of all gradients of the last ``step()`` before clipping, unscaled: fp32, without
        dimensions, on the device of the gradients, not waited for. The next step writes into the same
        tensor: clone what is to be kept. None if that step had no reason to measure it."""
        return self._grad_norm

    @property
    def skipped(self) -> Tensor:
        """Whether the last ``step()`` found an overflow and changed nothing: a bool without dimensions, on
        the device that knows, not waited for."""
        if self._skipped is None:
            return torch.tensor(False)
        return (self._skipped != 0).reshape(())

    # ------------------------------------------------------------------ step

    def _patch_step_function(self) -> None:
        """torch wraps the class's ``step`` in its hooks, in a function whose code all optimizers share."""
        before = type(self).step
        super()._patch_step_function()
        wrapper: Any = type(self).step
        if wrapper is not before:
            wrapper.__code__ = wrapper.__code__.replace()
            _opaque(wrapper)

    @_opaque
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step; see the class for the formula.

        With an open accumulation window, or ``accumulation_steps`` > 1, the present gradients join the
        window with weight 1, and parameters change only when the window is complete. A call without any
        gradient is one whose gradients are zero, except after ``accumulate()``, which it then stands for.

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
        self._grad_norm = self._skipped = None
        grad_scale = getattr(self, "grad_scale", None)
        window = self._window()
        if window is None and self.accumulation_steps == 1:
            found_inf = getattr(self, "found_inf", None)
            # A plain 0 when no parameter has a gradient: GradScaler sums an empty list.
            if not isinstance(found_inf, Tensor):
                found_inf = None
            self._update(1.0, _NO_WINDOW, False, grad_scale, found_inf)
            if grad_scale is not None and not self._scaler_asks:
                self._unscale_gradients(grad_scale, found_inf)
            return loss
        if self._overflowed():
            self._release_gradients()
            return loss
        scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        if window is None and self._only_creates_state():
            self._update(scale, _NO_WINDOW, False)
            return loss

        window = window or _Window()
        if grad_scale is not None and window.raw:
            raise RuntimeError(
                f"{type(self).__name__}: accumulate() was called on gradients that still carry the "
                "GradScaler's loss scale, which it could not know. With a GradScaler, let "
                "scaler.step(optimizer) accumulate: construct the optimizer with accumulation_steps=J"
            )
        steps = window.steps + 1
        if steps < self.accumulation_steps:
            counts = self._fold(1.0, scale) or not window.pending
            self._set_window(_Window(steps, window.weight + counts, False, window.raw))
            return loss
        self._update(scale, window.weight, not window.pending)
        self._set_window(None)
        if grad_scale is not None:
            self._unscale_gradients(grad_scale, None)
        return loss

    def _unscale_gradients(self, grad_scale: Tensor, found_inf: Tensor | None) -> None:
        """Leaves ``.grad`` as torch's fused step does: unscaled, except after an overflow. Nothing waits."""
        if not self.defaults.get("fused"):
            return
        factor = grad_scale.double().reciprocal().float()
        if found_inf is not None:
            overflow = found_inf.to(factor.device, non_blocking=True) != 0
            factor = factor.masked_fill(overflow, 1.0)
        _GRAD_SCALER._unscale_grads_(self, factor, torch.zeros_like(factor), True)

    def _overflowed(self) -> bool:
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def _only_creates_state(self) -> bool:
        """torch.distributed.checkpoint creates a state by stepping with zero gradients and lr 0: such a
        first step must not open a window."""
        if self.state or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    def _update(
        self,
        scale: float,
        window_weight: float,
        counts: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One update from the gradients, or from the window if ``window_weight`` is not negative.

        ``counts``: the call that closes the window weighs 1 even without a gradient. ``grad_scale`` and
        ``found_inf`` are a GradScaler's; on a device they are not waited for.
        """
        mean = self.accumulation == "mean"
        finds_overflow = self._scaler_asks
        max_norm = checked_norm(self.max_grad_norm)
        weight = self._average_weight()
        if self._uses_torch:
            reason = "torch"
        else:
            reason = self._plan.step(
                self.param_groups,
                self.state,
                scale,
                window_weight,
                mean,
                counts,
                grad_scale,
                found_inf,
                -1.0 if max_norm is None else max_norm,
                finds_overflow,
                self.error_if_nonfinite,
                self.collect_grad_stats,
                weight,
                self._counts_moved,
            )
        if reason in ("", "deferred", "overflow"):
            if max_norm is not None or finds_overflow or self.collect_grad_stats:
                self._grad_norm = self._plan.norm
            self._skipped = self._plan.found_inf if finds_overflow else found_inf
        if reason in ("none", "overflow"):
            return
        if reason == "deferred":
            self._updated = True if self._skipped is None else self._skipped
        elif reason == "":
            self._updated = True
        else:
            self._check_reason(reason)
            self._skipped = found_inf
            if found_inf is not None and bool(found_inf):
                return
            if grad_scale is not None:
                scale /= float(grad_scale)
            window = None if window_weight == _NO_WINDOW else window_weight
            clip = _torch_path.Clip(max_norm, finds_overflow, self.error_if_nonfinite)
            updated = _torch_path.step(self, self._torch_class, scale, window, mean, counts, clip)
            self._grad_norm = clip.norm
            if finds_overflow:
                self._skipped = clip.found_inf
            if not updated:
                return
            if window is not None:
                self._plan.reset()
            if weight >= 0.0:
                _torch_path.average(self, updated, weight)
            self._updated = True
        if weight >= 0.0:
            self._count_average()

    def _check_reason(self, reason: str) -> None:
        if reason.startswith("cuda") and not self._uses_torch:
            raise RuntimeError(
                f"{type(self).__name__}: a parameter is on {reason}, but braze has no CUDA kernels "
                f"here: {_native.cuda_missing()}. Nothing was changed. To use torch's implementation "
                "instead, construct the optimizer with foreach=True"
            )

    @property
    def takes_scaled_gradients(self) -> bool:
        """Whether ``step_scaled`` can be called: torch's code is not asked for, and nothing accumulates."""
        return (
            not self._uses_torch
            and self.accumulation_steps == 1
            and self._window() is None
            and "grad_scale" not in self.__dict__  # one that the scaler's is to be multiplied with
        )

    def step_scaled(self, scale: Tensor | None, found_inf: Tensor | None) -> Any:
        """What :class:`braze.amp.GradScaler` calls: ``step()`` with gradients that are scaled by ``scale``,
        in which it finds overflows itself, or with unscaled ones and what was found in them."""
        if not self._counts_moved:  # where a step that the CPU need not know of can count itself
            for p in self._parameters():
                count = self.state[p].get("step") if p in self.state else None
                if p.is_cuda and isinstance(count, Tensor) and count.is_cpu:
                    self.state[p]["step"] = count.to(p.device, torch.float32)
            self._counts_moved = True
        self.__dict__.update(grad_scale=scale, found_inf=found_inf)
        self._scaler_asks = found_inf is None
        try:
            return self.step()
        finally:
            self._scaler_asks = False
            del self.__dict__["grad_scale"], self.__dict__["found_inf"]

    # ------------------------------------------------------------- statistics

    def grad_stats(self) -> dict[Tensor, GradStats]:
        """Of each parameter of the last ``step()``, by parameter, if ``collect_grad_stats`` was True then: its
        unscaled gradient before clipping, accumulated where that was so, and its update. Waits for the device.
        The pass over the gradients that a step with ``max_grad_norm`` or :class:`braze.amp.GradScaler` makes
        anyway collects it. Empty where the call accumulated only, and where torch's code did the step."""
        return {p: GradStats(*values) for p, *values in self._plan.statistics()}

    # ---------------------------------------------------------- accumulation

    def _window(self) -> _Window | None:
        """The open window. What ``param_groups[0]`` says counts first: a wrapper may have loaded it."""
        groups = self.param_groups
        if groups and _WINDOW_KEYS[0] in groups[0]:
            window = _Window(*(groups[0].get(key, 0) for key in _WINDOW_KEYS))
            if any(window):
                self._remember(window)
            elif self._counts is not None:  # a closed one was loaded: these sums belong to none
                for entry in self.state.values():
                    entry.pop("grad_sum", None)
                    entry.pop("in_window", None)
                self._remember(None)
        return self._counts

    def _set_window(self, window: _Window | None) -> None:
        self._remember(window)
        for i, group in enumerate(self.param_groups):
            if i == 0:
                group.update(zip(_WINDOW_KEYS, window or _Window(), strict=True))
            else:  # the groups were in another order
                for key in _WINDOW_KEYS:
                    group.pop(key, None)

    def _remember(self, window: _Window | None) -> None:
        self._counts = window
        # True makes a GradScaler hand over its scale: to fused kernels, and where step() has to refuse it.
        self._step_supports_amp_scaling = bool(self.defaults.get("fused")) or (
            window is not None and window.raw
        )

    @_opaque
    def accumulate(self, weight: float = 1.0) -> None:
        """Folds the present gradients into the window with a weight, and releases them (``.grad`` = None).

        sum += weight * g in fp32 (fp64 for fp64 parameters), in one pass over all parameters. The next
        update uses sum / (all weights) with ``accumulation="mean"``, or the sum itself with ``"sum"``.
        Use the number of tokens or samples as the weight, and the result equals one big batch. Parameters
        without a gradient contribute zero, and the weight counts even if none has one. A GradScaler's
        ``unscale_`` comes before.

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
        window = self._window() or _Window()
        folded = self._fold(weight, 1.0 if grad_scale is None else 1.0 / float(grad_scale))
        raw = window.raw or (folded and grad_scale is None)
        self._set_window(_Window(window.steps, window.weight + weight, True, raw))

    def _fold(self, weight: float, scale: float) -> bool:
        into_state = self._folds_momentum and self.accumulation == "sum"
        # Only a sum of its own can be measured.
        into_state = into_state and not self._uses_torch and self.max_grad_norm is None
        into_state = into_state and not self.collect_grad_stats
        reason = self._plan.fold(self.param_groups, self.state, weight * scale, into_state)
        if reason == "none":
            return False
        if reason != "":
            self._check_reason(reason)
            if reason == "sparse":
                raise ValueError(
                    f"{type(self).__name__}: sparse gradients cannot be accumulated; use "
                    "nn.Embedding(sparse=False), or accumulation_steps=1"
                )
            return _torch_path.fold(self, weight * scale)
        return True

    def _release_gradients(self) -> None:
        for p in self._parameters():
            p.grad = None

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    # ------------------------------------------------- checkpoints and copies

    @_opaque
    def state_dict(self) -> dict[str, Any]:
        """As torch's; an open window is in it, in keys of the first group and of the state."""
        window = self._window()
        if window is not None:
            self._set_window(window)
            return super().state_dict()
        closed = [(g, {k: g.pop(k) for k in _WINDOW_KEYS if k in g}) for g in self.param_groups]
        try:
            return super().state_dict()
        finally:
            for group, zeros in closed:
                group.update(zeros)

    def __getstate__(self) -> dict[str, Any]:
        if (window := self._window()) is not None:
            self._set_window(window)
        return {
            **super().__getstate__(),
            **{key: getattr(self, key) for key in ATTRIBUTES},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of an older version lacks some.
        given = {*self.__dict__, *state}
        missing = {k: v for k, v in DEFAULTS.items() if k in ATTRIBUTES and k not in given}
        super().__setstate__({**missing, **state})
        for key in ("l1", "capturable"):
            if key in self.defaults:
                for group in self.param_groups:
                    group.setdefault(key, self.defaults[key])
        if "_plan" not in self.__dict__:
            self._prepare()
        self._remember(None)
        self._window()
        self._counts_moved = False
        self._plan.reset()

    @_opaque
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. The tensors are copied, so that a step never writes into the caller's dict, and
        fp32 accumulators of an open window and running averages keep their dtype."""
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
            for name in ("grad_sum", "ema"):
                if name in saved.get(key, ()):
                    entry[name] = saved[key][name].to(p.device)
            for name, value in entry.items():
                if not isinstance(value, Tensor):
                    continue
                if name == "step" and value.dtype not in (torch.float32, torch.float64):
                    entry[name] = value.to(torch.float32)
                elif id(value) in theirs:
                    entry[name] = value.clone()
        self._plan.reset()
