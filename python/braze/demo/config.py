"""What a run of the demo is told to do, and the error it reports to a person."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DATASETS = ("digits", "mnist", "cifar10")
ARCHITECTURES = ("lenet", "alexnet", "vgg", "resnet", "googlenet")
# Where the layers of braze's side come from; torch's side has torch.nn.
NAMESPACES = ("torch", "braze")
OPTIMIZERS = ("sgd", "adam", "adamw", "cag")
SCHEDULES = ("constant", "step", "exponential", "cosine")
AUGMENTATIONS = ("shift", "rotate", "crop", "flip")

DEFAULT_LR = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3, "cag": 0.05}
DEFAULT_MOMENTUM = {"sgd": 0.9, "adam": 0.0, "adamw": 0.0, "cag": 0.0}
DEFAULT_WEIGHT_DECAY = {"sgd": 0.0, "adam": 0.0, "adamw": 1e-2, "cag": 0.0}
DEFAULT_ACCUMULATION = {"sgd": 1, "adam": 1, "adamw": 1, "cag": 4}
DEFAULT_AUGMENT = {
    "digits": ("shift", "rotate"),
    "mnist": ("shift", "rotate"),
    "cifar10": ("crop", "flip"),
}


class DemoError(Exception):
    """A failure explained in one line to the person who ran the demo.

    Args:
        message: what happened, why, and what to do about it.
        code: the exit code of the process; 2 for a wrong command, 1 for a run that failed.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


@dataclass(frozen=True)
class Config:
    """All settings of one run, already checked by the command line."""

    data: str
    root: Path | None
    arch: str
    nn: str
    fuse: bool
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    l1: float
    schedule: str
    accumulation_steps: int
    augment: tuple[str, ...]
    patience: int
    min_delta: float
    epochs: int
    batch_size: int
    seed: int
    threads: int | None
    device: str
    out: Path
    resume: bool

    def plain(self) -> dict[str, Any]:
        """Return the settings as a dict of numbers, strings, lists and None."""
        values = asdict(self)
        values["root"] = None if self.root is None else str(self.root)
        values["out"] = str(self.out)
        values["augment"] = list(self.augment)
        return values
