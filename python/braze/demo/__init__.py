"""Trains one network with torch.optim and its twin with braze.optim (and braze.nn or braze.fuse).

Both start from the same weights and see the same batches; compared are the curves and the time of a step. The
test split also selects the best epoch, so the best accuracy is optimistic.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from .data import DATASETS, DemoError, load
from .models import ARCHITECTURES
from .monitor import watch
from .report import draw, parts_of, summarize, table_of
from .sides import OPTIMIZERS, SCHEDULES, train


def _number(kind: type, low: float, below: float = math.inf) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        # Written so that NaN, which compares false with everything, is refused.
        if not low <= value < below:
            limit = f" and below {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be at least {low:g}{limit}, got {text}")
        return value

    parse.__name__ = kind.__name__  # which argparse tells for what is no number
    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", choices=DATASETS, default="digits", help="data set (default: digits)")
    add("--root", type=Path, metavar="DIR", help="where the files of mnist or cifar10 are")
    add("--arch", choices=ARCHITECTURES, default="lenet", help="network (default: lenet)")
    add("--nn", choices=("torch", "braze"), default="torch", help="layers of braze's side")
    add("--fuse", action="store_true", help="pass braze's network through braze.fuse")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move images by up to an eighth; mirror those of cifar10 (default: yes)",
    )
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="default: adam")

    def add_setting(name: str, kind: Callable[[str], Any], help: str) -> None:
        flag = name.replace("_", "-")
        values = (f"{o} {s[name]:g}" for o, s in OPTIMIZERS.items() if name in s)
        add(f"--{flag}", type=kind, metavar="X", help=f"{help} (default: {', '.join(values)})")

    add_setting("lr", _number(float, 0.0), "learning rate")
    add_setting("momentum", _number(float, 0.0, 1.0), "of sgd and cag")
    add_setting("weight_decay", _number(float, 0.0), "factor of the weight decay")
    add_setting("accumulation_steps", _number(int, 1), "batches per update")
    add("--l1", type=_number(float, 0.0), default=0.0, help="factor of the L1 penalty (default: 0)")
    add("--schedule", choices=SCHEDULES, default="cosine", help="default: cosine")
    add("--epochs", type=_number(int, 1), default=20, help="default: 20")
    add("--batch-size", type=_number(int, 2), default=32, help="images per batch (default: 32)")
    add(
        "--patience",
        type=_number(int, 0),
        default=0,
        help="stop after this many epochs without a better test accuracy; 0: never (default)",
    )
    add("--seed", type=_number(int, 0, 2**31), default=0, help="default: 0")
    add("--threads", type=_number(int, 1), help="of the CPU (default: 1 for the digits)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add(
        "--out",
        type=Path,
        default=Path("braze-demo"),
        metavar="DIR",
        help="where best.pt, curves.png and result.json go (default: ./braze-demo)",
    )
    add(
        "--monitor",
        action="store_true",
        help="instead, show where gradients vanish in a deep network; writes gradients_*.png",
    )
    add("--resume", action="store_true", help="continue from best.pt in --out")


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in the optimizer's own defaults. Raises DemoError where arguments do not fit each other."""
    if (arguments.data == "digits") != (arguments.root is None):
        raise DemoError(
            "--root: the digits come with scikit-learn and need no files"
            if arguments.root
            else f"--data {arguments.data} needs --root DIR, its folder"
        )
    if arguments.root is not None and not arguments.root.is_dir():
        raise DemoError(f"--root: no such folder: {arguments.root}")
    settings = OPTIMIZERS[arguments.optimizer]
    if arguments.momentum is not None and "momentum" not in settings:
        raise DemoError(f"--momentum: {arguments.optimizer} has none; use --optimizer sgd")
    for name, value in settings.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.threads is None and arguments.data == "digits":
        # On 8x8 images threads gain nothing, and on a busy machine they wait for each other.
        arguments.threads = 1
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            raise DemoError(f"--device cuda: torch {torch.__version__} finds no usable GPU")
        # Otherwise the curves differ by the order of sums within torch itself.
        torch.backends.cudnn.deterministic = True
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    start = perf_counter()
    data = load(arguments.data, arguments.root)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.monitor:
        return watch(arguments, data)
    print(
        f"{len(data.train_labels)} training and {len(data.test_labels)} test images; {arguments.arch}, "
        f"{arguments.optimizer}, lr {arguments.lr:g}, {arguments.schedule}, batches of {arguments.batch_size}"
    )
    print("; ".join(f"{side}: {parts}" for side, parts in parts_of(arguments).items()))
    sides = train(arguments, data, arguments.out / "best.pt")
    result = summarize(arguments, data, sides, perf_counter() - start)
    print(f"\n{table_of(result)}\n\n{result['seconds']:.0f} s; results are in {arguments.out}")
    if not draw(arguments.out / "curves.png", result):
        print("no curves.png: matplotlib is not installed; pip install scikit-learn matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Trains both sides, prints the comparison and writes the files of ``--out``.

    Returns:
        0 after a complete run, 2 where something is missing or arguments do not fit, 1 where training itself
        failed, 130 after Ctrl-C. Errors are one line on standard error.
    """
    threads = torch.get_num_threads()
    try:
        complete(arguments)
        torch.set_num_threads(arguments.threads or threads)
        _run(arguments)
    except (DemoError, OSError) as error:
        print(f"braze demo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "code", 2)
    except KeyboardInterrupt:
        hint = ""
        if (arguments.out / "best.pt").is_file():
            hint = f"; to continue from {arguments.out / 'best.pt'}: the same command with --resume"
        print(f"braze demo: interrupted{hint}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0
