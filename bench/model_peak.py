"""Peak memory of one call of a model, in a process of its own. Linux only.

Measured is resident memory: the kernel's high-water mark (``VmHWM``), reset just before the call, minus what
was resident before the process's first call. It sees everything, scratch memory inside of kernels and memory
kept for the next call too, which counting tensors would not.
So that it follows live tensors, blocks of 64 KB or more are mapped singly (``MALLOC_MMAP_THRESHOLD_``): freeing
one gives it back at once, and nothing lingers in malloc's free lists. Measured are the first call of the
process, in which oneDNN makes its primitives, and the third, which stands for the run. A training step starts
without gradients, so that its peak has them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_LIMIT_S = 600.0
# Pages here and there: repeated runs of one contender differ by up to 0.2 %.
SLACK = 1.003


def why_not() -> str | None:
    """Why this machine cannot tell; None if it can."""
    if os.access(_RESET, os.W_OK) and "VmHWM" in _STATUS.read_text():
        return None
    return "peak memory needs Linux's /proc/self/clear_refs"


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def resident() -> int:
    """Bytes of this process in memory now."""
    return 1024 * _kilobytes("VmRSS")


def peak_of(call: Callable[[], object], before: int) -> int:
    """Bytes that were resident at most while ``call`` ran, beyond ``before``."""
    _RESET.write_text("5")
    call()
    return max(0, 1024 * _kilobytes("VmHWM") - before)


def measure(task: str, cell: Any, contender: str, threads: int) -> dict[str, float]:
    """``first_mb`` and ``peak_mb`` of a call in a new process, in 10^6 bytes.

    Raises:
        RuntimeError: the process failed; the message has its last lines.
    """
    order = {
        "task": task,
        "cell": dataclasses.asdict(cell),
        "contender": contender,
        "threads": threads,
    }
    command = [sys.executable, "-m", f"{__package__}.model_peak", json.dumps(order)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    end = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    if end.returncode:
        last = " ".join(end.stderr.split()[-40:])
        raise RuntimeError(f"peak memory of {contender}: code {end.returncode}: {last}")
    found: dict[str, float] = json.loads(end.stdout.splitlines()[-1])
    return found


def main(argv: list[str]) -> int:
    from . import infer, models, train
    from .model_cases import Cell, build, layout_of

    order: dict[str, Any] = json.loads(argv[0])
    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    cell, contender = Cell(**order["cell"]), order["contender"]
    task = {"train": train.TASK, "infer": infer.TASK}[order["task"]]
    model = build(cell, contender, models.load(cell.model), task.training)
    call = task.call(cell, layout_of(contender), model)
    before = resident()
    first = peak_of(call, before)
    call()
    # Gradients of the call before are no part of this one.
    model.zero_grad(set_to_none=True)
    print(json.dumps({"first_mb": first / 1e6, "peak_mb": peak_of(call, before) / 1e6}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
