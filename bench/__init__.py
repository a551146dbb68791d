"""Benchmarks: ``python -m braze bench NAME``. Ratios, ours and torch interleaved in one run."""

from __future__ import annotations

from typing import Any

COMMANDS = {
    "optim": "one optimizer step, or all that follows backward(), against torch.optim's fastest mode",
    "norm": "batch norm + activation over ResNet-50's layers, against torch eager",
    "dropout": "dropout, alone and fused, against torch's",
    "conv": "convolution + batch norm + ReLU, training and folded for inference",
    "train": "a training step of whole models: eager, braze.fuse, torch.compile; also peak memory",
    "infer": "inference of whole models: eager, braze.fuse, torch.compile",
    "all": "all of these in one run",
    "compare": "two results: SAME, FASTER, SLOWER or UNCLEAR, row by row",
    "report": "tables and pictures from results",
    "fuse": "how many batch norms of whole models braze.fuse fuses, and whether the models stay the same",
    "host": "host time of a CUDA step, measured without a GPU on the emulated device (source checkout)",
    "debt": "kernels whose GPU results are missing or older than the sources (source checkout)",
    # The other programs that bench/gpu.py runs.
    **dict.fromkeys(("golden", "gpu_build", "gpu_tests", "micro", "sanitize"), ""),
}


def add_arguments(parser: Any) -> None:
    parser.add_commands(__name__, COMMANDS)
