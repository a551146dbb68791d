"""Host time of a CUDA step where there is no GPU: the emulated device, with kernels not run.

Microseconds of opt.step(), by number of tensors; nothing is compared. Needs a source checkout
(tests/support/emulated.py).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import partial
from typing import Any

import braze.optim
import torch
from torch.nn import Parameter

from . import session
from .clock import Call
from .harness import OURS, Built, Case, Part, Setting, Suite
from .optim import OPTIONS
from .rows import Hopeless, Row, goal
from .sources import find_root

COUNTS = (1, 10, 100, 1000)
GOAL_FIXED_US, GOAL_TENSOR_US = 10.0, 0.03
SIZE = 64


def load_emulated() -> Any:
    """The emulated device of the tests. Raises what went wrong where there is none."""
    sys.path.insert(0, str(find_root() / "tests" / "support"))
    return importlib.import_module("emulated").load()


def _step(name: str, tensors: int) -> Call:
    params = [Parameter(torch.randn(SIZE)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(SIZE)
    step: Call = getattr(braze.optim, name)(params, **OPTIONS[name]).step
    return step


def _goals(tensors: int, row: Row) -> list[dict[str, Any]]:
    # The least: what another process does to the host's time says nothing about the step.
    least = row["contenders"][OURS]["warm"]["min_us"]
    most = GOAL_FIXED_US + GOAL_TENSOR_US * tensors
    return [goal(f"{row['name']}: at most {most:g} us", least, least <= most)]


def cases(arguments: argparse.Namespace) -> list[Case]:
    def build(name: str, tensors: int, setting: Setting) -> Built:
        return Built({OURS: partial(_step, name, tensors)})

    return [
        Case(
            f"{name} / {n} tensors",
            {"optimizer": name, "dtype": "fp32", "tensors": n, "elements": n * SIZE},
            (Part(partial(build, name, n)),),
            True,
            partial(_goals, n),
        )
        for name in OPTIONS
        for n in COUNTS
    ]


SUITE = Suite("host", cases, 0.5, {"cpu": "warm"}, ("warm",))
add_arguments = session.commands(SUITE)[0]


def run(arguments: argparse.Namespace) -> int:
    """Returns :func:`session.run`'s code. Raises Hopeless where the emulated device is missing."""
    try:
        emulated = load_emulated()
        emulated.set_null_launch(True)
    except (ImportError, FileNotFoundError, AttributeError, RuntimeError) as error:
        raise Hopeless(
            f"the emulated device is not to be had ({error}). It is tests/support/emulated.py of a source "
            "checkout; run this command inside one"
        ) from error
    arguments.threads = arguments.threads or [1]
    threads = torch.get_num_threads()
    emulated.enable(True)
    try:
        return session.run((SUITE,), arguments)
    finally:
        emulated.enable(False)
        torch.set_num_threads(threads)
        emulated.set_null_launch(False)
