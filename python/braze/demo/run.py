"""One run of the demo, from the data to the report."""

from __future__ import annotations

from time import perf_counter

import torch

from .config import Config, DemoError
from .data import Data, batches_per_epoch, load
from .report import parts_of, table, write_json, write_picture
from .train import train


def _prepare_device(config: Config) -> None:
    if config.device != "cuda":
        return
    if not torch.cuda.is_available():
        reason = "finds no usable GPU" if torch.version.cuda else "was built without CUDA"
        raise DemoError(
            f"--device cuda: this torch ({torch.__version__}) {reason}; use --device cpu"
        )
    # Otherwise the curves differ by the order of sums within torch itself.
    torch.backends.cudnn.deterministic = True


def _introduce(config: Config, data: Data, count: int) -> None:
    window = config.accumulation_steps
    updates = f", {window} batches per update" if window > 1 else ""
    print(
        f"{config.data}: {len(data.train_labels)} training and {len(data.test_labels)} test "
        f"images of {data.size}x{data.size}x{data.channels}"
    )
    print(
        f"{config.arch}, {config.optimizer}, lr {config.lr:g}, {config.schedule}; "
        f"{count} batches of {config.batch_size} per epoch{updates}; "
        f"augmentation: {', '.join(config.augment) or 'none'}"
    )
    print("; ".join(f"{side}: {parts}" for side, parts in parts_of(config).items()))


def _run(config: Config) -> None:
    start = perf_counter()
    _prepare_device(config)
    data = load(config.data, config.root)
    images = data.train_labels.shape[0]
    count = batches_per_epoch(images, config.batch_size, config.accumulation_steps)
    config.out.mkdir(parents=True, exist_ok=True)
    _introduce(config, data, count)
    theirs, ours = (side.log for side in train(config, data, config.out / "best.pt"))

    seconds = perf_counter() - start
    write_json(config.out / "result.json", config, theirs, ours, seconds)
    print()
    print(table(theirs, ours))
    print(f"\n{seconds:.0f} s; in {config.out}: best.pt, result.json", end="")
    if write_picture(config.out / "curves.png", config, theirs, ours):
        print(", curves.png")
    else:
        print("\nno curves.png: matplotlib is not installed; pip install scikit-learn matplotlib")


def run(config: Config) -> None:
    """Train both sides, print the comparison and write the files of ``config.out``.

    Raises:
        DemoError: something is missing, refused, or training diverged.
        OSError: a file cannot be read or written.
    """
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        _run(config)
    finally:
        torch.set_num_threads(threads)
