"""The test suite on the emulated CUDA device, as far as it does not run on the fake one, and part of it under
ASan and UBSan."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import emulated
import emulator_build
import pytest

TESTS = Path(__file__).parents[1]
# What does not run on the fake device (tests/cuda/test_fake_suite.py), which has the same kernels, and two more
# files, whose tensors are the CPU's here.
SUITE = tuple(
    f"optim/test_{name}.py"
    for name in ("numerics", "leaks", "plan_threads", "plan", "layouts_overlap")
)
TIMEOUT = 600

pytestmark = pytest.mark.cpu_only("runs the suite itself")


def run(
    arguments: list[str], environment: dict[str, str], device: str = "emulated", check: bool = True
) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, with the device for all tensors."""
    print("schedule:", {k: v for k, v in environment.items() if k.startswith("BRAZE_EMULATOR")})
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *(["-x"] if check else []),
            "--durations=5",
            *arguments,
        ],
        cwd=TESTS,
        env={**os.environ, "BRAZE_TEST_DEVICE": device, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{done.stdout[-12000:]}\n{done.stderr[-4000:]}", pytrace=False)
    return done


def launches(output: str) -> int:
    found = re.search(r"emulated launches: (\d+)", output)
    assert found is not None, output[-2000:]
    return int(found[1])


def require(variant: str) -> None:
    if (reason := emulated.why_not(variant)) is not None:
        pytest.skip(reason)


def test_the_suite() -> None:
    require("native")
    schedule = {"BRAZE_EMULATOR_ORDER": "pct", "BRAZE_EMULATOR_SEED": "1"}
    done = run(list(SUITE), schedule)
    print(done.stdout[-3000:])
    assert launches(done.stdout) > 3_000
    assert "BRAZE_EMULATOR_ORDER=pct BRAZE_EMULATOR_SEED=1" in done.stdout


# ------------------------------------------------------------------ sanitizers


@functools.cache
def sanitized() -> dict[str, str]:
    """The environment in which this Python, itself not sanitized, runs the sanitized module."""
    compiler = next(
        path
        for name in emulator_build.VARIANTS["asan"].compilers
        if (path := subprocess.run(["which", name], capture_output=True, text=True).stdout.strip())
    )

    def library(name: str) -> str:
        asked = [compiler, f"-print-file-name={name}"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    return {
        # libstdc++ too, or ASan finds no __cxa_throw to intercept.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "PYTHONMALLOC": "malloc",
        emulated.BUILT: str(emulated.build("asan")),
        **dict(emulator_build.VARIANTS["asan"].environment),
    }


SANITIZED = [
    "cuda/test_cuda_step.py::test_every_layout[sgd-momentum=0.9-nesterov=True-weight_decay=0.01-bfloat16]",
    "cuda/test_cuda_step.py::test_every_layout[adam-amsgrad=True-weight_decay=0.01-complex64]",
    "cuda/test_cuda_step.py::test_every_size_and_alignment",
    "cuda/test_cuda_step.py::test_gradient_and_state_of_another_dtype",
    "cuda/test_cuda_step.py::test_accumulation_and_strided_sums",
    *(
        f"cuda/test_cuda_step.py::test_one_launch_a_step[{name}-1000-{groups}-{counts} counts]"
        for name, groups, counts in (
            ("AdamW", 465, "device"),
            ("SGD", 465, "CPU"),
            ("SGD", 1, "CPU"),
        )
    ),
    "cuda/test_cuda_capture.py::test_replays_equal_eager_steps",
    "cuda/test_cuda_capture.py::test_five_thousand_tensors[SGD, momentum]",
    "cuda/test_cuda_capture.py::test_without_a_warm_up",
    "cuda/test_cuda_capture.py::test_a_graph_outlives_its_optimizer",
    "cuda/test_cuda_devices.py",
    "cuda/test_cuda_amp.py::test_same_bits_as_on_the_cpu",
    "optim/test_layouts_overlap.py",
    "optim/test_plan.py",
    "optim/test_plan_errors.py",
]


def test_sanitizers_find_nothing() -> None:
    require("asan")
    schedule = {"BRAZE_EMULATOR_ORDER": "random", "BRAZE_EMULATOR_SEED": "7"}
    done = run(SANITIZED, {**sanitized(), **schedule})
    print(done.stdout[-1500:])
    assert launches(done.stdout) > 500


CONTROL = """
import sys
import devices, torch
from braze import optim
with devices.get().on():
    p = torch.nn.Parameter(torch.ones(64))
    p.grad = torch.ones(64)
    if sys.argv[1] == "short":
        p.grad.untyped_storage().resize_(128)  # its memory ends in the middle
    optim.SGD([p], lr=0.1).step()
print("stepped")
"""


@pytest.mark.parametrize("memory", ["whole", "short"])
def test_sanitizers_see_a_read_past_the_end(memory: str) -> None:
    require("asan")
    done = subprocess.run(
        [sys.executable, "-c", CONTROL, memory],
        cwd=TESTS / "support",
        env={**os.environ, **sanitized()},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if memory == "whole":
        assert done.returncode == 0 and "stepped" in done.stdout, done.stderr[-3000:]
    else:
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
        assert "csrc/cuda" in done.stderr, done.stderr[-3000:]
