"""The results of a run: figures, a table and a picture."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

from ..bench.files import write_json
from ..bench.memory import stored_bytes
from ..info import build_info
from .data import Data
from .sides import Side, Sides, plain


def parts_of(arguments: Namespace) -> dict[str, str]:
    """What each side is built with, by its name."""
    layers = f"{arguments.nn}.nn"
    layers = f"braze.fuse({layers})" if arguments.fuse else layers
    return {"torch": "torch.optim, torch.nn", "braze": f"braze.optim, {layers}"}


def _figures(side: Side, images: Any) -> dict[str, float]:
    """Fractions, losses, medians of ms per update, and the memory that a batch's forward keeps for backward."""
    log = side.log
    return {
        "final_accuracy": log["accuracy"][-1],
        "best_accuracy": max(log["accuracy"]),
        "best_epoch": log["accuracy"].index(max(log["accuracy"])) + 1,
        "final_loss": log["epoch_loss"][-1],
        "optimizer_ms": median(log["optimizer_ms"]),
        "step_ms": median(log["step_ms"]),
        "stored_mb": stored_bytes(copy.deepcopy(side.model).train(), images) / 1e6,
    }


def summarize(arguments: Namespace, data: Data, sides: Sides, seconds: float) -> dict[str, Any]:
    """Settings, figures and curves, which also become ``result.json``."""
    images = data.normalized(data.train_images[: arguments.batch_size]).to(arguments.device)
    theirs, ours = (_figures(side, images) for side in sides)
    losses = [side.log["losses"] for side in sides]
    differences = [abs(a - b) for a, b in zip(*losses, strict=True)]
    first = len(differences) // len(sides[0].log["epoch_loss"])
    result = {
        "args": plain(arguments),
        "build": build_info(),
        "parts": parts_of(arguments),
        "seconds": seconds,
        # Training amplifies rounding, so the first epoch says more about the update rules.
        "loss_difference_first_epoch": max(differences[:first]),
        "max_loss_difference": max(differences),
        "optimizer_ratio": theirs["optimizer_ms"] / ours["optimizer_ms"],
        "step_ratio": theirs["step_ms"] / ours["step_ms"],
        "torch": {"summary": theirs, "curves": sides[0].log},
        "braze": {"summary": ours, "curves": sides[1].log},
    }
    write_json(result, arguments.out / "result.json")
    return result


def table_of(result: dict[str, Any]) -> str:
    """The comparison."""
    theirs, ours = (result[side]["summary"] for side in ("torch", "braze"))
    lines = [f"{'compared':<32}{'torch':>11}{'braze':>11}"]
    lines += [
        f"{what:<32}{theirs[key]:>11{form}}{ours[key]:>11{form}}"
        for what, key, form in (
            ("test accuracy, final", "final_accuracy", ".2%"),
            ("test accuracy, best", "best_accuracy", ".2%"),
            ("training loss, final", "final_loss", ".4g"),
            ("optimizer step, median ms", "optimizer_ms", ".3f"),
            ("whole training step, median ms", "step_ms", ".3f"),
            ("kept for backward, MB", "stored_mb", ".2f"),
        )
    ]
    text = (
        "\n".join(lines) + "\n"
        f"torch / braze: optimizer step {result['optimizer_ratio']:.2f}, whole step "
        f"{result['step_ratio']:.2f}\nlargest difference of a batch's loss: "
        f"{result['loss_difference_first_epoch']:.1e} in the first epoch, "
        f"{result['max_loss_difference']:.1e} in all"
    )
    if result["args"]["accumulation_steps"] > 1:
        text += (
            "\nTimes are per update. braze's optimizer step includes adding up the gradients of its batches,\n"
            "which torch does in backward: compare the whole training step."
        )
    return text


def draw(path: Path, result: dict[str, Any]) -> bool:
    """Draws the loss curves and the step times; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 5), layout="constrained")
    losses, times = figure.subplots(1, 2, width_ratios=(3, 2))
    args, sides = result["args"], {name: result[name]["curves"] for name in ("torch", "braze")}
    figure.suptitle(f"{args['arch']} on {args['data']}, {args['optimizer']}")
    colors, widths = ("#f0a36b", "#1f4e79"), (3.5, 1.1)
    for (name, log), color, width in zip(sides.items(), colors, widths, strict=True):
        losses.plot(log["losses"], label=result["parts"][name], color=color, linewidth=width)
    losses.set(xlabel="batch", ylabel="training loss", yscale="log")
    losses.legend()
    series = [log[key] for key in ("optimizer_ms", "step_ms") for log in sides.values()]
    boxes = times.boxplot(series, whis=(5, 95), showfliers=False, patch_artist=True)
    for box, color in zip(boxes["boxes"], colors * 2, strict=True):
        box.set(facecolor=color)
    labels = [f"{side}\n{what}" for what in ("optimizer step", "whole step") for side in sides]
    times.set_xticks(range(1, 5), labels)
    times.set(ylabel="ms per update (median; whiskers 5 % to 95 %)", yscale="log")
    figure.savefig(path, dpi=120)
    return True
