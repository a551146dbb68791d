"""Training both sides on the same batches."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from .checkpoint import restore, save
from .config import Config, DemoError
from .data import Data, batches, batches_per_epoch
from .progress import Progress
from .sides import Side, make_sides


def epochs_without_gain(accuracies: list[float], min_delta: float) -> int:
    """Return how many epochs passed since the accuracy last rose by more than ``min_delta``."""
    best, stale = -math.inf, 0
    for accuracy in accuracies:
        if accuracy > best + min_delta:
            best, stale = accuracy, 0
        else:
            stale += 1
    return stale


def _check_finite(losses: list[float], config: Config, epoch: int) -> None:
    if not all(math.isfinite(loss) for loss in losses):
        shown = " and ".join(f"{loss:g}" for loss in losses)
        raise DemoError(
            f"training diverged in epoch {epoch} (losses {shown}): the learning rate is too "
            f"high; try --lr {config.lr / 10:g}",
            code=1,
        )


def _train_epoch(config: Config, data: Data, sides: tuple[Side, Side], epoch: int) -> int:
    window = config.accumulation_steps
    count = batches_per_epoch(data.train_labels.shape[0], config.batch_size, window)
    progress = Progress(f"epoch {epoch}/{config.epochs}", count)
    source = batches(data, count, config.batch_size, config.augment, config.seed, epoch)
    device = sides[0].device
    try:
        for index, (images, labels) in enumerate(source):
            images, labels = images.to(device), labels.to(device)
            first, last = index % window == 0, (index + 1) % window == 0
            # Taking turns per update: the side that goes second finds warm caches.
            order = sides if index // window % 2 == 0 else sides[::-1]
            for side in order:
                # The same seed for both, so that dropout drops the same units.
                torch.manual_seed(config.seed + ((epoch * count + index) << 31))
                side.train_batch(images, labels, first, last)
            losses = [side.log.losses[-1] for side in sides]
            _check_finite(losses, config, epoch)
            progress.update(index + 1, f"loss {losses[0]:.4f} / {losses[1]:.4f}")
    finally:
        progress.clear()
    return count


def _report_epoch(config: Config, sides: tuple[Side, Side], epoch: int) -> None:
    def pair(name: str) -> str:
        values = [getattr(side.log, name)[-1] * 100.0 for side in sides]
        return f"{values[0]:5.1f} / {values[1]:5.1f}"

    theirs, ours = (side.log for side in sides)
    width = len(str(config.epochs))
    print(
        f"epoch {epoch:{width}}/{config.epochs}"
        f"  loss {theirs.epoch_loss[-1]:.4f} / {ours.epoch_loss[-1]:.4f}"
        f"  accuracy {pair('accuracy')}  precision {pair('precision')}"
        f"  recall {pair('recall')}",
        flush=True,
    )


def train(config: Config, data: Data, checkpoint: Path) -> tuple[Side, Side]:
    """Train torch's and braze's side on the same batches, printing a line per epoch.

    After each epoch with a better test accuracy (of braze's side) both are saved.

    Args:
        config: the settings; with ``resume`` training continues from ``checkpoint``.
        data: the data set.
        checkpoint: the file of the best epoch.

    Returns:
        Torch's and braze's side, in this order, with their logs.

    Raises:
        DemoError: a setting is refused, the checkpoint cannot be used, or training diverged.
        OSError: the checkpoint cannot be written.
    """
    sides = make_sides(config, data)
    done = restore(checkpoint, config, sides) if config.resume else 0
    if config.resume:
        print(f"continuing after epoch {done}, from {checkpoint}")
    print("per epoch, torch / braze: training loss; test accuracy, precision, recall in %")
    for epoch in range(done + 1, config.epochs + 1):
        count = _train_epoch(config, data, sides, epoch)
        for side in sides:
            side.scheduler.step()
            side.log.add_epoch(count, side.evaluate(data))
        _report_epoch(config, sides, epoch)
        history = sides[1].log.accuracy
        if epoch == 1 or history[-1] > max(history[:-1]):
            save(checkpoint, config, epoch, sides)
        if 0 < config.patience <= epochs_without_gain(history, config.min_delta):
            if epoch < config.epochs:
                print(f"stopped early: no better accuracy for {config.patience} epochs")
            break
    return sides
