"""The two contestants: equal networks, one of torch's parts and one with braze's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import fuse
from .. import nn as braze_nn
from .. import optim as braze_optim
from .config import Config, DemoError
from .data import Data
from .metrics import Scores, confusion_matrix, scores
from .models import build


@dataclass
class Log:
    """What one side recorded: per batch the loss, per update the times in ms, per epoch scores."""

    losses: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    epoch_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    precision: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)

    def add_epoch(self, batches: int, result: Scores) -> None:
        """Close an epoch of ``batches`` batches with the scores on the test split."""
        self.epoch_loss.append(sum(self.losses[-batches:]) / batches)
        self.accuracy.append(result.accuracy)
        self.precision.append(result.precision)
        self.recall.append(result.recall)


@dataclass
class Side:
    """One network with its optimizer, its schedule and its log.

    Args:
        name: ``"torch"`` or ``"braze"``.
        model: the network.
        optimizer: what updates it.
        scheduler: what sets the learning rate after each epoch.
        every_batch: call the optimizer after each batch (it accumulates by itself) rather than
            once per window of batches.
        loss_scale: factor of the loss before backward, for a window summed up in ``.grad``.
        l1: factor of an L1 gradient added by hand; 0 where the optimizer does it.
        device: where the network is.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    every_batch: bool
    loss_scale: float
    l1: float
    device: torch.device
    log: Log = field(default_factory=Log)
    _optimizer_s: float = 0.0
    _step_s: float = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def _optimize(self) -> None:
        if self.l1:
            with torch.no_grad():
                for group in self.optimizer.param_groups:
                    for weight in group["params"]:
                        if weight.grad is not None:
                            weight.grad.add_(weight.sign(), alpha=self.l1)
        self.optimizer.step()

    def train_batch(self, images: Tensor, labels: Tensor, first: bool, last: bool) -> float:
        """Train on one batch of a window and return its mean loss.

        Args:
            images: shape (B, C, S, S), on the device.
            labels: shape (B,), int64, on the device.
            first: the batch opens a window of accumulated batches.
            last: the batch closes it; the parameters change.

        Raises:
            DemoError: braze's optimizer refuses the parameters.
        """
        self.model.train()
        start = self._now()
        if first or self.every_batch:
            self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        (loss if self.loss_scale == 1.0 else loss * self.loss_scale).backward()
        if last or self.every_batch:
            before = self._now()
            try:
                self._optimize()
            except (RuntimeError, TypeError, ValueError) as error:
                raise DemoError(f"{self.name}'s optimizer failed: {error}") from error
            self._optimizer_s += self._now() - before
        self._step_s += self._now() - start
        if last:
            self.log.optimizer_ms.append(self._optimizer_s * 1e3)
            self.log.step_ms.append(self._step_s * 1e3)
            self._optimizer_s = self._step_s = 0.0
            if self.every_batch and not getattr(self.optimizer, "updated", True):
                raise DemoError("braze's optimizer made no update at the end of a window", code=1)
        value = float(loss.detach())
        self.log.losses.append(value)
        return value

    def evaluate(self, data: Data) -> Scores:
        """Return the scores of the network on the test split."""
        self.model.eval()
        total = torch.zeros(data.classes, data.classes, dtype=torch.int64)
        with torch.no_grad():
            pairs = zip(data.test_images.split(512), data.test_labels.split(512), strict=True)
            for pixels, labels in pairs:
                images = data.normalized(pixels.to(torch.float32) * data.scale)
                predicted = self.model(images.to(self.device)).argmax(dim=1).cpu()
                total += confusion_matrix(labels, predicted, data.classes)
        return scores(total)

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue this side, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "log": asdict(self.log),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state is not of such a side.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.log = Log(**state["log"])


def _scheduler(
    module: Any, optimizer: torch.optim.Optimizer, config: Config
) -> torch.optim.lr_scheduler.LRScheduler:
    make: dict[str, Callable[[], torch.optim.lr_scheduler.LRScheduler]] = {
        "constant": lambda: module.ConstantLR(optimizer, factor=1.0),
        "step": lambda: module.StepLR(optimizer, max(1, config.epochs // 3), gamma=0.3),
        "exponential": lambda: module.ExponentialLR(optimizer, gamma=0.9),
        "cosine": lambda: module.CosineAnnealingLR(optimizer, T_max=config.epochs),
    }
    return make[config.schedule]()


def _torch_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    weights, lr, decay = model.parameters(), config.lr, config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(weights, lr=lr, weight_decay=decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
    return torch.optim.SGD(weights, lr=lr, momentum=config.momentum, weight_decay=decay)


def _braze_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    kind: Callable[..., torch.optim.Optimizer] = {
        "sgd": braze_optim.SGD,
        "adam": braze_optim.Adam,
        "adamw": braze_optim.AdamW,
        "cag": braze_optim.CAG,
    }[config.optimizer]
    settings: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "l1": config.l1,
        "accumulation_steps": config.accumulation_steps,
    }
    if config.optimizer in ("sgd", "cag"):
        settings["momentum"] = config.momentum
    try:
        return kind(model.parameters(), **settings)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DemoError(f"braze's optimizer refuses these settings: {error}") from error


def make_sides(config: Config, data: Data) -> tuple[Side, Side]:
    """Build torch's and braze's side with the same initial weights, from ``config.seed``.

    Raises:
        DemoError: braze's optimizer refuses the settings or the device.
    """
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    network = (config.arch, data.channels, data.size, data.classes)
    model = build(*network, nn).to(device)
    twin = build(*network, braze_nn if config.nn == "braze" else nn).to(device)
    twin.load_state_dict(model.state_dict())
    if config.fuse:
        twin = fuse(twin)
    window = config.accumulation_steps

    theirs = _torch_optimizer(model, config)
    ours = _braze_optimizer(twin, config)
    return (
        Side(
            name="torch",
            model=model,
            optimizer=theirs,
            scheduler=_scheduler(torch.optim.lr_scheduler, theirs, config),
            every_batch=False,
            loss_scale=1.0 if config.optimizer == "cag" else 1.0 / window,
            l1=config.l1,
            device=device,
        ),
        Side(
            name="braze",
            model=twin,
            optimizer=ours,
            scheduler=_scheduler(braze_optim.lr_scheduler, ours, config),
            every_batch=True,
            loss_scale=1.0,
            l1=0.0,
            device=device,
        ),
    )
