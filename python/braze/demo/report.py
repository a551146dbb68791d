"""The results of a run: a table, a JSON file and a picture."""

from __future__ import annotations

import io
import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .config import Config
from .files import write_atomically
from .sides import Log

_TORCH_COLOR = "#f0a36b"
_BRAZE_COLOR = "#1f4e79"


@dataclass(frozen=True)
class Summary:
    """The figures of one side: fractions, losses and medians in ms per update."""

    final_accuracy: float
    final_precision: float
    final_recall: float
    best_accuracy: float
    best_precision: float
    best_recall: float
    best_epoch: int
    final_loss: float
    optimizer_ms: float
    step_ms: float


def summarize(log: Log) -> Summary:
    """Return the figures of a log of at least one epoch; the best epoch is by accuracy."""
    best = max(range(len(log.accuracy)), key=lambda index: log.accuracy[index])
    return Summary(
        final_accuracy=log.accuracy[-1],
        final_precision=log.precision[-1],
        final_recall=log.recall[-1],
        best_accuracy=log.accuracy[best],
        best_precision=log.precision[best],
        best_recall=log.recall[best],
        best_epoch=best + 1,
        final_loss=log.epoch_loss[-1],
        optimizer_ms=median(log.optimizer_ms),
        step_ms=median(log.step_ms),
    )


def largest_difference(one: Log, other: Log, batches: int | None = None) -> float:
    """Return the largest absolute difference of two loss curves, batch by batch.

    Args:
        one: a log of at least one batch.
        other: a log of as many batches.
        batches: how many batches from the start to compare; None: all.
    """
    pairs = zip(one.losses[:batches], other.losses[:batches], strict=True)
    return max(abs(a - b) for a, b in pairs)


def table(theirs: Log, ours: Log) -> str:
    """Return the comparison of torch's and braze's log as lines of text."""
    left, right = summarize(theirs), summarize(ours)
    lines = [f"{'':34}{'torch':>11}{'braze':>11}"]
    for when in ("final", "best"):
        for name in ("accuracy", "precision", "recall"):
            values = [getattr(side, f"{when}_{name}") * 100.0 for side in (left, right)]
            lines.append(f"{f'{when} test {name}':34}{values[0]:>9.2f} %{values[1]:>9.2f} %")
    lines.append(f"{'best epoch':34}{left.best_epoch:>11}{right.best_epoch:>11}")
    lines.append(f"{'final training loss':34}{left.final_loss:>11.4g}{right.final_loss:>11.4g}")
    for label, a, b in (
        ("optimizer step, median", left.optimizer_ms, right.optimizer_ms),
        ("whole training step, median", left.step_ms, right.step_ms),
    ):
        lines.append(f"{label:34}{a:>8.3f} ms{b:>8.3f} ms   torch / braze = {a / b:.2f}")
    if len(theirs.losses) > len(theirs.step_ms):
        lines.append(
            "  (per update; braze's optimizer step includes adding up the gradients of the "
            "batches,\n  torch adds them up in backward: compare the whole training step)"
        )
    # Training amplifies rounding, so the first epoch says more about the update rules.
    first = len(theirs.losses) // len(theirs.epoch_loss)
    lines.append("largest difference of the loss of a batch:")
    lines.append(f"{'  in the first epoch':34}{largest_difference(theirs, ours, first):>11.1e}")
    lines.append(f"{'  in the whole run':34}{largest_difference(theirs, ours):>11.1e}")
    return "\n".join(lines)


def parts_of(config: Config) -> dict[str, str]:
    """Return what each side is built with, by its name."""
    layers = f"braze.fuse({config.nn}.nn)" if config.fuse else f"{config.nn}.nn"
    return {"torch": "torch.optim, torch.nn", "braze": f"braze.optim, {layers}"}


def _version() -> str:
    try:
        return version("braze")
    except PackageNotFoundError:
        return "unknown"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def write_json(path: Path, config: Config, theirs: Log, ours: Log, seconds: float) -> None:
    """Write settings, figures and curves as JSON; times in ms, ``seconds`` the whole run.

    Raises:
        OSError: the file cannot be written.
    """
    left, right = summarize(theirs), summarize(ours)
    content = {
        "args": config.plain(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "braze": _version(),
        },
        "parts": parts_of(config),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "max_loss_difference": largest_difference(theirs, ours),
        "optimizer_ratio": left.optimizer_ms / right.optimizer_ms,
        "step_ratio": left.step_ms / right.step_ms,
        "torch": {"summary": vars(left), "curves": vars(theirs)},
        "braze": {"summary": vars(right), "curves": vars(ours)},
    }
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    write_atomically(path, text.encode())


def _labels(config: Config) -> tuple[str, str]:
    if config.nn == "torch" and not config.fuse:
        return "torch.optim", "braze.optim"
    parts = parts_of(config)
    return parts["torch"], parts["braze"]


def _draw_losses(axes: Any, theirs: Log, ours: Log, labels: tuple[str, str]) -> None:
    per_epoch = len(theirs.losses) / len(theirs.epoch_loss)
    epochs = [(index + 1) / per_epoch for index in range(len(theirs.losses))]
    axes.plot(epochs, theirs.losses, color=_TORCH_COLOR, linewidth=3.5, label=labels[0])
    axes.plot(
        epochs, ours.losses, color=_BRAZE_COLOR, linewidth=1.1, linestyle="--", label=labels[1]
    )
    if min(theirs.losses + ours.losses) > 0.0:
        axes.set_yscale("log")
    axes.set_xlim(0, epochs[-1])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss of each batch")
    difference = largest_difference(theirs, ours)
    axes.set_title(f"Loss curves (largest difference {difference:.1e})")
    axes.legend(loc="best")


def _draw_times(axes: Any, theirs: Log, ours: Log, labels: tuple[str, str]) -> None:
    series = [theirs.optimizer_ms, ours.optimizer_ms, theirs.step_ms, ours.step_ms]
    places = [1.0, 1.8, 3.4, 4.2]
    boxes = axes.boxplot(
        series,
        positions=places,
        widths=0.6,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        medianprops={"color": "black"},
    )
    for patch, color in zip(boxes["boxes"], [_TORCH_COLOR, _BRAZE_COLOR] * 2, strict=True):
        patch.set(facecolor=color, alpha=0.85)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, high * 1.8)
    tops = [cap.get_ydata()[0] for cap in boxes["caps"][1::2]]
    for place, values, top in zip(places, series, tops, strict=True):
        axes.annotate(
            f"{median(values):.3g} ms",
            (place, top),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xticks([1.4, 3.8], ["optimizer step", "whole training step"])
    axes.set_xlim(0.4, 4.8)
    axes.set_ylabel("time per update in ms")
    axes.set_title("Step times (median; whiskers 5 % to 95 %)")
    axes.legend(boxes["boxes"][:2], labels, loc="upper left")


def write_picture(path: Path, config: Config, theirs: Log, ours: Log) -> bool:
    """Draw the loss curves and the step times; False where matplotlib is not installed.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    window = config.accumulation_steps
    figure.suptitle(
        f"{config.arch} on {config.data}, {config.optimizer}, batches of {config.batch_size}"
        + (f", {window} batches per update" if window > 1 else "")
    )
    losses, times = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (losses, times):
        axes.grid(True, which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_losses(losses, theirs, ours, _labels(config))
    _draw_times(times, theirs, ours, _labels(config))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
    return True
