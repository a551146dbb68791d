"""Saving both sides to one file, and continuing from it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from .config import Config, DemoError
from .files import write_atomically
from .sides import Side

_FORMAT = 1
_MUST_MATCH = (
    "data",
    "arch",
    "nn",
    "fuse",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "l1",
    "schedule",
    "accumulation_steps",
    "augment",
    "batch_size",
    "seed",
)
# These schedules are laid out over the number of epochs.
_TIED_TO_EPOCHS = ("cosine", "step")


def save(path: Path, config: Config, epoch: int, sides: tuple[Side, Side]) -> None:
    """Write both sides after ``epoch`` epochs; ``torch.load(weights_only=True)`` reads it.

    Raises:
        OSError: the file cannot be written.
    """
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if config.device == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    content: dict[str, Any] = {
        "format": _FORMAT,
        "epoch": epoch,
        "random": random,
        "args": config.plain(),
    }
    buffer = io.BytesIO()
    torch.save(content | {side.name: side.state() for side in sides}, buffer)
    write_atomically(path, buffer.getvalue())


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"no --{name}"
    text = " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return f"--{name.replace('_', '-')} {text}"


def _check_same_run(path: Path, saved: dict[str, Any], config: Config) -> None:
    asked = config.plain()
    saved = {"nn": "torch", "fuse": False, **saved}  # which older files do not name
    tied = ("epochs",) if config.schedule in _TIED_TO_EPOCHS else ()
    names = (*_MUST_MATCH, *tied)
    differing = [name for name in names if saved[name] != asked[name]]
    if differing:
        was = " ".join(_option(name, saved[name]) for name in differing)
        now = " ".join(_option(name, asked[name]) for name in differing)
        raise DemoError(
            f"--resume: {path} was trained with {was}, not with {now}; repeat that, or start "
            "afresh without --resume"
        )


def restore(path: Path, config: Config, sides: tuple[Side, Side]) -> int:
    """Load both sides from a file that :func:`save` wrote and return its epoch.

    Raises:
        DemoError: the file is missing, damaged, of another run, or already complete.
    """
    if not path.is_file():
        raise DemoError(f"--resume: there is no {path}; run once without --resume first")
    afresh = "delete it and run without --resume"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file fails in the zip reader, the unpickler or torch: no common error type.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise DemoError(f"--resume: {path} cannot be read ({reason}); {afresh}") from error
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, not {_FORMAT}")
        _check_same_run(path, content["args"], config)
        epoch = int(content["epoch"])
        if epoch >= config.epochs:
            raise DemoError(
                f"--resume: {path} already holds epoch {epoch} of {config.epochs}; nothing is "
                "left to train: raise --epochs, or start afresh without --resume"
            )
        for side in sides:
            side.load_state(content[side.name])
        torch.set_rng_state(content["random"]["cpu"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else ""
        raise DemoError(
            f"--resume: {path} is not a checkpoint of this demo ({reason}); {afresh}"
        ) from error
    return epoch
