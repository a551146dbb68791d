"""Equal networks, one of torch's parts and one with braze's, trained on the same batches."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from .. import fuse
from .. import nn as braze_nn
from .. import optim as braze_optim
from .data import CLASSES, Data, DemoError, batches
from .models import build

# By optimizer, what is taken where the command line names no other.
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "accumulation_steps": 1},
    "adam": {"lr": 1e-3, "weight_decay": 0.0, "accumulation_steps": 1},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2, "accumulation_steps": 1},
    "cag": {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "accumulation_steps": 4},
}
_CLASSES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "cag": "CAG"}
SCHEDULES: dict[str, Callable[[Any, int], lr_scheduler.LRScheduler]] = {
    "constant": lambda optimizer, epochs: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "step": lambda optimizer, epochs: lr_scheduler.StepLR(optimizer, max(1, epochs // 3), 0.3),
    "exponential": lambda optimizer, epochs: lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
    "cosine": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
}
_FORMAT = 2
# What a run that is continued may change.
_FREE = ("root", "patience", "threads", "device", "out", "resume", "monitor")


class Side:
    """One network with its optimizer, its schedule and its log.

    The log has the loss of each batch, the times of each update in ms, and loss and accuracy of each epoch.
    """

    def __init__(self, name: str, model: nn.Module, arguments: Namespace) -> None:
        self.name, self.model, self.device = name, model, torch.device(arguments.device)
        self.is_braze = name == "braze"
        self.l1 = arguments.l1
        # A sum of the window's gradients for CAG, their mean for the others.
        self.scale = 1.0 if arguments.optimizer == "cag" else 1.0 / arguments.accumulation_steps
        settings = {key: getattr(arguments, key) for key in OPTIMIZERS[arguments.optimizer]}
        kind = _CLASSES[arguments.optimizer]
        home: Any = braze_optim
        if self.is_braze:
            settings["l1"] = self.l1
        else:
            kind, home = kind.replace("CAG", "SGD"), torch.optim
            del settings["accumulation_steps"]
        try:
            self.optimizer = getattr(home, kind)(model.parameters(), **settings)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DemoError(f"{name}'s optimizer refuses these settings: {error}") from error
        self.scheduler = SCHEDULES[arguments.schedule](self.optimizer, arguments.epochs)
        keys = ("losses", "optimizer_ms", "step_ms", "epoch_loss", "accuracy")
        self.log: dict[str, list[float]] = {key: [] for key in keys}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * perf_counter()

    def _optimize(self) -> None:
        if self.l1 and not self.is_braze:
            with torch.no_grad():
                for weight in self.model.parameters():
                    if weight.grad is not None:
                        weight.grad.add_(weight.sign(), alpha=self.l1)
        self.optimizer.step()

    def train_batch(self, images: Tensor, labels: Tensor, first: bool, last: bool) -> None:
        """Trains on one batch; ``first`` and ``last`` open and close a window of batches that make an update.

        braze's optimizers accumulate by themselves: their step() is called after each batch. torch's are called
        once a window, whose gradients add up in ``.grad``.
        """
        self.model.train()
        if first:
            self.log["optimizer_ms"].append(0.0)
            self.log["step_ms"].append(0.0)
        start = self._now()
        if first or self.is_braze:
            self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        (loss if self.is_braze else loss * self.scale).backward()
        if last or self.is_braze:
            before = self._now()
            self._optimize()
            self.log["optimizer_ms"][-1] += self._now() - before
        self.log["step_ms"][-1] += self._now() - start
        self.log["losses"].append(float(loss.detach()))

    def close_epoch(self, count: int, data: Data) -> None:
        """Notes the loss of ``count`` batches and the accuracy on the test split."""
        self.scheduler.step()
        self.model.eval()
        right = 0
        with torch.no_grad():
            batches = data.test_images.split(512), data.test_labels.split(512)
            for pixels, labels in zip(*batches, strict=True):
                predicted = self.model(data.normalized(pixels).to(self.device)).argmax(dim=1).cpu()
                right += int((predicted == labels).sum())
        self.log["epoch_loss"].append(sum(self.log["losses"][-count:]) / count)
        self.log["accuracy"].append(right / len(data.test_labels))

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {**{name: part.state_dict() for name, part in parts.items()}, "log": self.log}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.log = state["log"]


Sides = tuple[Side, Side]


def make_sides(arguments: Namespace, data: Data) -> Sides:
    """torch's and braze's side, with the same initial weights, from ``--seed``."""
    torch.manual_seed(arguments.seed)
    channels, size = data.train_images.shape[1:3]
    model, twin = (
        build(arguments.arch, channels, size, CLASSES, home).to(arguments.device)
        for home in (nn, braze_nn if arguments.nn == "braze" else nn)
    )
    twin.load_state_dict(model.state_dict())
    if arguments.fuse:
        twin = fuse(twin)
    return Side("torch", model, arguments), Side("braze", twin, arguments)


def plain(arguments: Namespace) -> dict[str, Any]:
    """The settings that a run is made of, as numbers and strings."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    return {k: v for k, v in values.items() if v is None or isinstance(v, int | float | str)}


def save(path: Path, arguments: Namespace, epoch: int, sides: Sides) -> None:
    """Writes both sides; ``torch.load(weights_only=True)`` reads it. A crash leaves the old file or the new."""
    content = {"format": _FORMAT, "epoch": epoch, "args": plain(arguments)}
    partial = path.with_suffix(".tmp")
    torch.save(content | {side.name: side.state() for side in sides}, partial)
    partial.replace(path)


def restore(path: Path, arguments: Namespace, sides: Sides) -> int:
    """Loads both sides from a file that :func:`save` wrote, and returns its epoch.

    Raises:
        DemoError: the file is missing, damaged, of another run, or already complete.
    """
    if not path.is_file():
        raise DemoError(f"--resume: there is no {path}; run once without --resume first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, not {_FORMAT}")
        asked, saved, epoch = plain(arguments), content["args"], int(content["epoch"])
        # The other schedules are laid out over the number of epochs.
        open_ended = arguments.schedule in ("constant", "exponential")
        free = (*_FREE, "epochs") if open_ended else _FREE
        differing = [name for name in asked if name not in free and saved[name] != asked[name]]
        if not differing and epoch < arguments.epochs:
            for side in sides:
                side.load_state(content[side.name])
    # A damaged file fails in the zip reader, the unpickler, torch or here: no common error type.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:100]
        raise DemoError(
            f"--resume: {path} is no checkpoint of this demo ({type(error).__name__}: {reason}); delete it and "
            "run without --resume"
        ) from error
    if differing:
        was, now = (", ".join(f"{n} {of[n]}" for n in differing) for of in (saved, asked))
        raise DemoError(f"--resume: {path} was trained with {was}, not with {now}")
    if epoch >= arguments.epochs:
        raise DemoError(f"--resume: {path} already holds epoch {epoch}; raise --epochs")
    return epoch


def _train_epoch(arguments: Namespace, data: Data, sides: Sides, epoch: int) -> int:
    window, size = arguments.accumulation_steps, arguments.batch_size
    count = len(data.train_labels) // size // window * window
    if count == 0:
        raise DemoError(
            f"one update takes {size * window} images (--batch-size {size} x --accumulation-steps {window}), "
            f"the training split has {len(data.train_labels)}: lower one of them"
        )
    source = batches(data, count, size, arguments.augment, arguments.seed, epoch)
    for index, (images, labels) in enumerate(source):
        images, labels = images.to(arguments.device), labels.to(arguments.device)
        # Taking turns per update: the side that goes second finds warm caches.
        for side in sides if index // window % 2 == 0 else sides[::-1]:
            # The same seed for both, so that dropout drops the same units.
            torch.manual_seed(arguments.seed + ((epoch * count + index) << 31))
            side.train_batch(images, labels, index % window == 0, (index + 1) % window == 0)
        losses = [side.log["losses"][-1] for side in sides]
        if not all(map(math.isfinite, losses)):
            raise DemoError(
                f"training diverged in epoch {epoch} (losses {losses}): the learning rate is too high; try "
                f"--lr {arguments.lr / 10:g}",
                code=1,
            )
    return count


def train(arguments: Namespace, data: Data, checkpoint: Path) -> Sides:
    """Trains torch's and braze's side on the same batches and prints a line per epoch.

    After each epoch with a better test accuracy of braze's side both are saved to ``checkpoint``, from which
    ``--resume`` continues.

    Raises:
        DemoError: a setting is refused, the checkpoint cannot be used, or training diverged.
    """
    sides = make_sides(arguments, data)
    done = restore(checkpoint, arguments, sides) if arguments.resume else 0
    for epoch in range(done + 1, arguments.epochs + 1):
        count = _train_epoch(arguments, data, sides, epoch)
        for side in sides:
            side.close_epoch(count, data)
        theirs, ours = (side.log for side in sides)
        print(
            f"epoch {epoch}/{arguments.epochs}, torch / braze: "
            f"loss {theirs['epoch_loss'][-1]:.4f} / {ours['epoch_loss'][-1]:.4f}, "
            f"accuracy {theirs['accuracy'][-1]:.1%} / {ours['accuracy'][-1]:.1%}",
            flush=True,
        )
        best = ours["accuracy"].index(max(ours["accuracy"])) + 1
        if best == epoch:
            save(checkpoint, arguments, epoch, sides)
        if 0 < arguments.patience <= epoch - best:
            print(f"stopped: no better accuracy for {arguments.patience} epochs")
            break
    return sides
