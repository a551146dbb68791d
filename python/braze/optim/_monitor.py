"""Finds layers whose gradients vanish, explode or are not finite while a network trains."""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from operator import index
from statistics import median
from typing import Any, NamedTuple

from torch.nn import Module

from braze.optim._stats import GradStats
from braze.optim._step import FusedStep

# By kind, what a report says of it, and which of several values is the worst.
_KINDS: dict[str, tuple[str, str, Callable[..., float]]] = {
    "non-finite": ("gradients are not finite in", "in up to {:.0%} of the samples", max),
    "vanishing": ("gradients vanish in", "norm down to {:.1e} of the output layer's", min),
    "exploding": ("gradients explode in", "norm up to {:.1e} of the output layer's", max),
    "small updates": ("updates are too small in", "down to {:.1e} of the norm", min),
    "large updates": ("updates are too large in", "up to {:.1e} of the norm", max),
}


class GradientProblem(NamedTuple):
    """What is wrong with a parameter, by the rules of :class:`GradientMonitor`."""

    parameter: str
    kind: str  #: "non-finite", "vanishing", "exploding", "small updates" or "large updates"
    value: float  #: the fraction of samples that are not finite, mₗ / R, or uₗ


def _median(values: Iterable[float]) -> float:
    return median([value for value in values if math.isfinite(value)] or [math.nan])


def _check(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    try:
        error: type[Exception] | None = None if fits(value) else ValueError
    except TypeError:
        error = TypeError
    if error:
        raise error(f"{name} must be {wanted}, got {value!r}")


class GradientMonitor:
    """Watches the gradients of a model through one of braze's optimizers, which measures them in its step.

    Of the last ``window`` samples, with medians over those that are finite, let

    - mₗ = median ‖gₗ‖₂ and uₗ = median ‖Δpₗ‖₂ / ‖pₗ‖₂ of a parameter l;
    - R = sqrt(Σ mₖ²) over the parameters k of the output layer, whose gradients have passed through no
      layer that could shrink or magnify them (1 if that is 0).

    Then l has the first of these problems that applies:

    - *non-finite*: one of its samples has NaN or infinite elements;
    - *vanishing*: mₗ ≤ ``vanishing`` · R;
    - *exploding*: mₗ ≥ ``exploding`` · R;
    - *small updates*: uₗ < ``updates[0]``; rounding swallows them;
    - *large updates*: uₗ > ``updates[1]``; the learning rate is too high.

    All but the first are asked of parameters with two dimensions or more, if there are any: a bias before a
    batch norm has no gradient, and a bias that was zero changes by any factor. Where activations grow with
    depth, too, the output layer's gradients do as well: that shows as large updates, or as non-finite. A
    branch that starts at nearly zero (a zero-initialized batch norm, a layer scale) does vanish at first.

    The model and the optimizer are held weakly; the optimizer holds the monitor until :meth:`close`, or the
    end of a ``with``. A sample waits for the device: close before a CUDA graph is captured.

    Args:
        model: gives the parameters their names.
        optimizer: one of braze's, of parameters of the model. ``collect_grad_stats`` is set where it samples.
        window: samples that are kept.
        every: calls of ``step()`` from one sample to the next. A step that only accumulates gives none; the
            next one that updates is taken.
        vanishing, exploding, updates: 0 <= vanishing < 1 < exploding, 0 <= updates[0] < updates[1].
        reference: the output layer's name in ``model.named_modules()``. None: the layer of the last
            parameter that has gradients, in the model's order.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``reference`` is no module with parameters.
    """

    def __init__(
        self,
        model: Module,
        optimizer: FusedStep,
        *,
        window: int = 20,
        every: int = 1,
        vanishing: float = 1e-3,
        exploding: float = 1e3,
        updates: tuple[float, float] = (1e-8, 0.1),
        reference: str | None = None,
    ) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not hasattr(optimizer, "grad_stats"):
            raise TypeError(f"optimizer must be one of braze.optim's, got {type(optimizer)}")
        known = dict(model.named_parameters())
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not ours.intersection(map(id, known.values())):
            raise ValueError("optimizer must have parameters of the model, got none of them")
        for name, count in (("window", window), ("every", every)):
            _check(name, count, lambda n: index(n) >= 1, "an int of at least 1")
        _check("vanishing", vanishing, lambda x: 0 <= x < 1, "a number in [0, 1)")
        _check("exploding", exploding, lambda x: x > 1, "a number above 1")
        _check("updates", updates, lambda u: len(u) == 2 and 0 <= u[0] < u[1], "a rising pair")
        self._layer = "" if reference is None else f"{reference}."
        if not any(name.startswith(self._layer) for name in known):
            raise ValueError(f"reference must be a module with parameters, got {reference!r}")
        self._every, self._limits = every, (vanishing, exploding, *updates)
        self._model: Callable[[], Module | None] = weakref.ref(model)
        self._optimizer: Callable[[], FusedStep | None] = weakref.ref(optimizer)
        self._steps = self._wait = 0  # calls of step() so far, and until the next sample
        self._samples: deque[tuple[int, dict[str, GradStats]]] = deque(maxlen=window)
        self._dims: dict[str, int] = {}  # by parameter, in the model's order
        self._collected: bool = optimizer.collect_grad_stats
        optimizer.collect_grad_stats = True
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Any, *_: object) -> None:
        self._steps += 1
        if self._wait:
            self._wait -= 1
        elif self._sample(optimizer):
            self._wait = self._every - 1
        optimizer.collect_grad_stats = self._collected or not self._wait

    def _sample(self, optimizer: Any) -> bool:
        model, stats = self._model(), optimizer.grad_stats()
        # After a step that only accumulates they are the last update's; an overflow's are its own.
        if model is None or not (optimizer.updated or any(s.non_finite for s in stats.values())):
            return False
        named = dict(model.named_parameters())
        sample = {name: stats[p] for name, p in named.items() if p in stats and p.numel()}
        if sample:
            self._dims = {name: p.dim() for name, p in named.items()}
            self._samples.append((self._steps, sample))
        return bool(sample)

    def close(self) -> None:
        """Stops sampling; what was sampled stays. A second call does nothing."""
        self._hook.remove()
        if (optimizer := self._optimizer()) is not None:
            optimizer.collect_grad_stats = self._collected
        self._optimizer = lambda: None

    def __enter__(self) -> GradientMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _figures(self) -> dict[str, tuple[float, float, float]]:
        """By parameter the fraction of samples that are not finite, and mₗ / R and uₗ, NaN if not asked."""
        names = [name for name in self._dims if any(name in s for _, s in self._samples)]
        series = {name: [s[name] for _, s in self._samples if name in s] for name in names}
        norms = {name: _median(s.norm for s in series[name]) for name in names}
        last = names[-1] if names else ""
        layer = self._layer or last[: last.rfind(".") + 1]
        output = (m for name, m in norms.items() if name.startswith(layer) and m == m)
        scale = math.hypot(*output) or 1.0
        asked = {name for name in names if self._dims[name] > 1} or names
        return {
            name: (
                sum(s.non_finite > 0 for s in samples) / len(samples),
                norms[name] / scale if name in asked else math.nan,
                _median(s.update_ratio for s in samples) if name in asked else math.nan,
            )
            for name, samples in series.items()
        }

    def problems(self) -> list[GradientProblem]:
        """At most one of each parameter, by the rules above; empty if all is well or nothing was sampled."""
        vanishing, exploding, low, high = self._limits
        found = []
        for name, (bad, norm, update) in self._figures().items():
            wrong = (bad > 0, norm <= vanishing, norm >= exploding, update < low, update > high)
            rules = zip(_KINDS, (bad, norm, norm, update, update), wrong, strict=True)
            found += [GradientProblem(name, kind, value) for kind, value, so in rules if so][:1]
        return found

    def report(self) -> str:
        """One line: the problems by kind with their worst value, or that the gradients are healthy."""
        problems, parts = self.problems(), []
        for kind, (phrase, figure, worst) in _KINDS.items():
            if those := [problem for problem in problems if problem.kind == kind]:
                names = ", ".join(problem.parameter for problem in those[:4])
                more = f" and {len(those) - 4} more" if len(those) > 4 else ""
                value = figure.format(worst(problem.value for problem in those))
                parts.append(f"{phrase} {names}{more} ({value})")
        norms = [norm for _, norm, _ in self._figures().values() if norm == norm]
        if parts or not norms:
            return "; ".join(parts) or "no gradients have been sampled yet"
        relative = f"{min(norms):.1e} to {max(norms):.1e} of the output layer's"
        return f"gradients are healthy (norms {relative})"

    def heat_map(self, path: str | os.PathLike[str]) -> None:
        """Writes a PNG: log10 ‖g‖₂ by parameter and step; red where it is NaN or infinite.

        Gradients that are zero or missing have the colour of the smallest. Raises ImportError without
        matplotlib, RuntimeError before the first sample.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"heat_map needs matplotlib, which cannot be imported ({error}); pip install matplotlib"
            ) from error
        if not (names := list(self._figures())):
            raise RuntimeError("heat_map: no gradients have been sampled yet")
        norms = [[s[n].norm if n in s else 0.0 for _, s in self._samples] for n in names]
        low = min((v for row in norms for v in row if 0.0 < v < math.inf), default=1.0)
        logs = [[math.log10(max(v, low)) if v < math.inf else v for v in row] for row in norms]
        figure = Figure(figsize=(9, min(2 + 0.18 * len(names), 100)), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel="step", facecolor="red")
        colors = axes.pcolormesh([step for step, _ in self._samples], range(len(names)), logs)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        figure.colorbar(colors, label="log10 of the gradient's norm")
        figure.savefig(os.fspath(path), format="png")

    def write(self, writer: Any, step: int | None = None) -> None:
        """Adds the last sample to a TensorBoard ``SummaryWriter`` or anything with its ``add_scalar``.

        Tags are ``grad_norm/<parameter>`` and ``update_ratio/<parameter>``; ``step`` None is the number of
        calls of ``optimizer.step()`` up to the sample. TypeError or ValueError for another writer or step.
        """
        if not hasattr(writer, "add_scalar"):
            raise TypeError(f"writer must have add_scalar(), got {type(writer)}")
        _check("step", step, lambda n: n is None or index(n) >= 0, "None or an int of at least 0")
        sampled, sample = self._samples[-1] if self._samples else (0, {})
        for name, stats in sample.items():
            for tag, value in (("grad_norm", stats.norm), ("update_ratio", stats.update_ratio)):
                writer.add_scalar(f"{tag}/{name}", value, sampled if step is None else step)
