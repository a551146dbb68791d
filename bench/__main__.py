"""Chooses a benchmark by name."""

from __future__ import annotations

import importlib
import sys

USAGE = """usage: python -m braze bench NAME [options]

  optim       one optimizer step, against every mode of torch.optim (python -m braze bench optim --help)
  batch_norm  batch norm + activation over ResNet-50's layers, against torch eager
  dropout     dropout, alone and fused, against torch's (python -m braze bench dropout --help)
  train       a training step of whole models: eager, braze.fuse, torch.compile; also peak memory
  infer       inference of whole models: eager, braze.fuse, torch.compile
  fuse        how many batch norms of whole models braze.fuse fuses, and whether the models stay the same
  host        host time of a CUDA step, measured without a GPU on the emulated device (source checkout)
  debt        kernels whose GPU results are missing or older than the sources (source checkout)
"""
NAMES = ("optim", "batch_norm", "dropout", "train", "infer", "fuse", "host", "debt")


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark and returns its exit code; 2 for a name that does not exist."""
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name in NAMES:
        code: int = importlib.import_module(f".{name}", __package__).main(arguments[1:])
        return code
    print(
        f"braze bench: unknown benchmark '{name}'; choose {', '.join(NAMES[:-1])} or {NAMES[-1]}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
