"""The command line of the demo: arguments, their checks, and exit codes."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .config import (
    ARCHITECTURES,
    AUGMENTATIONS,
    DATASETS,
    DEFAULT_ACCUMULATION,
    DEFAULT_AUGMENT,
    DEFAULT_LR,
    DEFAULT_MOMENTUM,
    DEFAULT_WEIGHT_DECAY,
    NAMESPACES,
    OPTIMIZERS,
    SCHEDULES,
    Config,
    DemoError,
)

_PROG = "python -m braze demo"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        raise DemoError(f"{message} (see {_PROG} --help)")


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    limits = f">= {low}" if high is None else f"between {low} and {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, got {text!r}")
        return value

    return parse


def _real(low: float, *, above: bool = False, below: float = math.inf) -> Callable[[str], float]:
    limits = f"{'>' if above else '>='} {low:g}"
    if below < math.inf:
        limits += f" and < {below:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # Written so that NaN, which compares false with everything, is refused.
        if not ((value > low if above else value >= low) and value < below):
            raise argparse.ArgumentTypeError(f"must be a finite number {limits}, got {text!r}")
        return value

    return parse


def _per_optimizer(defaults: dict[str, float] | dict[str, int]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in defaults.items())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROG,
        allow_abbrev=False,
        description="Train one network with torch.optim and its twin with braze.optim (and braze.nn or "
        "braze.fuse), from the same weights and on the same batches; compare the curves and the time of a "
        "step.",
        epilog="The test split also selects the best epoch, so the best accuracy is optimistic.",
    )
    add = parser.add_argument
    what = parser.add_argument_group
    add("--data", choices=DATASETS, default="digits", help="data set (default: digits)")
    add("--root", type=Path, metavar="DIR", help="where the files of mnist or cifar10 are")
    add("--arch", choices=ARCHITECTURES, default="lenet", help="network (default: lenet)")
    add(
        "--nn",
        choices=NAMESPACES,
        default="torch",
        help="layers of braze's side: torch.nn, as torch's side has, or braze.nn (default: torch)",
    )
    add(
        "--fuse",
        action="store_true",
        help="pass the network of braze's side through braze.fuse",
    )
    add(
        "--augment",
        nargs="+",
        metavar="NAME",
        help="any of shift, rotate, crop, flip; or none "
        "(default: shift rotate; for cifar10: crop flip)",
    )
    group = what("optimizer")
    add = group.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="default: adam")
    add(
        "--lr",
        type=_real(0.0, above=True),
        help=f"learning rate (default: {_per_optimizer(DEFAULT_LR)})",
    )
    add(
        "--momentum",
        type=_real(0.0, below=1.0),
        help=f"of sgd and cag (default: sgd {DEFAULT_MOMENTUM['sgd']:g}, cag 0)",
    )
    add(
        "--weight-decay",
        type=_real(0.0),
        help=f"default: {_per_optimizer(DEFAULT_WEIGHT_DECAY)}",
    )
    add("--l1", type=_real(0.0), default=0.0, help="factor of the L1 penalty (default: 0)")
    add("--schedule", choices=SCHEDULES, default="cosine", help="default: cosine")
    add(
        "--accumulation-steps",
        type=_integer(1),
        metavar="J",
        help=f"batches per update (default: {_per_optimizer(DEFAULT_ACCUMULATION)})",
    )
    group = what("run")
    add = group.add_argument
    add("--epochs", type=_integer(1), default=20, help="default: 20")
    add("--batch-size", type=_integer(2), default=32, help="images per batch (default: 32)")
    add(
        "--patience",
        type=_integer(0),
        default=0,
        help="stop after this many epochs without a better test accuracy; 0: never (default)",
    )
    add(
        "--min-delta",
        type=_real(0.0, below=1.0),
        default=0.0,
        help="gain in accuracy that counts as better, as a fraction (default: 0)",
    )
    add("--seed", type=_integer(0, 2**31 - 1), default=0, help="default: 0")
    add(
        "--threads",
        type=_integer(1, 1024),
        help="CPU threads (default: 1 for the digits, else torch's)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add(
        "--out",
        type=Path,
        default=Path("braze-demo"),
        metavar="DIR",
        help="where best.pt, curves.png and result.json go (default: ./braze-demo)",
    )
    add("--resume", action="store_true", help="continue from best.pt in --out")
    return parser


def _augmentations(names: list[str] | None, data: str) -> tuple[str, ...]:
    if names is None:
        return DEFAULT_AUGMENT[data]
    chosen = [part for name in names for part in name.split(",") if part]
    for name in chosen:
        if name not in (*AUGMENTATIONS, "none"):
            raise DemoError(
                f"argument --augment: unknown augmentation {name!r} "
                f"(choose from {', '.join(AUGMENTATIONS)}, none)"
            )
    if "none" in chosen:
        if len(set(chosen)) > 1:
            raise DemoError("argument --augment: none cannot be combined with others")
        return ()
    if not chosen:
        raise DemoError("argument --augment: expected a name; for no augmentation: --augment none")
    if "flip" in chosen and data != "cifar10":
        raise DemoError(
            f"argument --augment: flip is refused for --data {data}: a mirrored digit is not "
            "a digit; use --augment shift rotate"
        )
    return tuple(name for name in AUGMENTATIONS if name in chosen)


def parse(argv: list[str] | None = None) -> Config:
    """Read and check the arguments of ``python -m braze demo``.

    Args:
        argv: the arguments after ``demo``; None takes them from ``sys.argv[1:]``.

    Returns:
        The settings of the run, per-optimizer and per-data-set defaults filled in.

    Raises:
        DemoError: an argument is unknown, out of range, or does not fit the others.
        SystemExit: with code 0, after ``--help``.
    """
    args = _parser().parse_args(argv)
    if args.data == "digits" and args.root is not None:
        raise DemoError(
            "argument --root: the digits come with scikit-learn and need no files; "
            "drop --root, or choose --data mnist or cifar10"
        )
    if args.data != "digits":
        if args.root is None:
            raise DemoError(f"argument --root: --data {args.data} needs --root DIR, its folder")
        if not args.root.is_dir():
            raise DemoError(f"argument --root: no such folder: {args.root}")
    if args.momentum is not None and args.optimizer not in ("sgd", "cag"):
        raise DemoError(
            f"argument --momentum: {args.optimizer} has none; drop it or use --optimizer sgd"
        )

    name = args.optimizer
    values = vars(args) | {
        "augment": _augmentations(args.augment, args.data),
        "lr": DEFAULT_LR[name] if args.lr is None else args.lr,
        "momentum": DEFAULT_MOMENTUM[name] if args.momentum is None else args.momentum,
    }
    if args.weight_decay is None:
        values["weight_decay"] = DEFAULT_WEIGHT_DECAY[name]
    if args.accumulation_steps is None:
        values["accumulation_steps"] = DEFAULT_ACCUMULATION[name]
    if args.threads is None and args.data == "digits":
        # On 8x8 images threads gain nothing, and on a busy machine they wait for each other.
        values["threads"] = 1
    return Config(**values)


def _complain(message: str) -> None:
    print(f"braze demo: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return the exit code of the process.

    Args:
        argv: the arguments after ``demo``; None takes them from ``sys.argv[1:]``.

    Returns:
        0 after a complete run, 2 for a wrong command or a missing piece, 1 where training
        itself failed, 130 after Ctrl-C. Errors are one line on standard error.
    """
    out: Path | None = None
    try:
        config = parse(argv)
        out = config.out
        # Torch takes seconds to import; a wrong argument is reported without it.
        from .run import run

        run(config)
    except DemoError as error:
        _complain(f"error: {error}")
        return error.code
    except KeyboardInterrupt:
        hint = ""
        if out is not None and (out / "best.pt").is_file():
            hint = f"; to continue from {out / 'best.pt'}: the same command with --resume"
        _complain(f"interrupted{hint}")
        return 130
    except BrokenPipeError:
        # The reader of our output went away; keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        _complain(f"error: {' '.join(str(error).split())}")
        return 2
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return 0
