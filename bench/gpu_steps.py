"""What a GPU is asked, in the order of its value. Every step is a program that prints rows (bench/rows.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .sources import BUILT, FAMILIES, digest

_ALL = tuple(sorted({glob for globs in FAMILIES.values() for glob in globs}))
# By program: what its rows are about. Other sources, other rows.
SOURCES: dict[str, tuple[str, ...]] = {
    "gpu_build": BUILT,
    "golden": (*_ALL, "bench/golden*"),
    "gpu_tests": (*BUILT, "python/**/*.py", "tests/**/*.py"),
    "sanitize": (*_ALL, "bench/golden*.py", "bench/sanitize.py", "tests/sanitizer_controls/*"),
    "batch_norm_cuda": (*FAMILIES["batch_norm"], "bench/batch_norm_c*.py", "bench/cuda_clock.py"),
    "optim_cuda": (*FAMILIES["optimizer"], "bench/cells.py", "bench/optim_cuda.py"),
    "dropout": (*FAMILIES["dropout"], "bench/dropout.py", "bench/cuda_clock.py"),
    "infer": (*FAMILIES["batch_norm"], "python/braze/nn/_fold*.py", "bench/infer.py"),
    "micro": ("csrc/cuda/*", "bench/micro*"),
}


@dataclass(frozen=True)
class Step:
    """``rehearsal``: the arguments on the CPU. ``expected_s``: on an H100, predicted until it was measured.

    ``limit_s`` holds in the first round over all steps: what it cuts short goes on when the others had their
    turn. A row that takes longer than ``row_limit_s`` has failed.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    rehearsal: tuple[str, ...]
    expected_s: float
    limit_s: float
    row_limit_s: float = 60.0

    def sources(self, root: Path) -> str:
        """The hash of what the step's result is about."""
        return digest(root, SOURCES[self.program])


def _words(text: str) -> tuple[str, ...]:
    """Arguments; "_" stands for a space inside of one."""
    return tuple(word.replace("_", " ") for word in text.split())


_QUICK_NORM = _words("--device cpu --quick --batch 2 --seconds 0 --only bf16_NHWC_relu_N=256")
_QUICK_OPTIM = _words("--device cpu --seconds 0 --optimizer AdamW --only 1_x_64")
_QUICK_DROPOUT = _words("--device cpu --seconds 0 --only dropout_1M_bf16")
_QUICK_MODEL = _words("--model resnet18 --size 32 --batch 1 --seconds 0 --dtype fp32 --layout NHWC")
_QUICK_TESTS = ("--device", "fake", "--only", "test_dropout_cuda")
STEPS = (
    Step("build", "gpu_build", (), ("--device", "cpu"), 80, 1000, 1000),
    Step(
        "contact",
        "golden",
        ("--device", "cuda", "--short"),
        _words("--device emulated --short"),
        20,
        60,
    ),
    Step(
        "batch norm, headline",
        "batch_norm_cuda",
        _words("--only bf16_NHWC_relu_N=256 --only bf16_NHWC_add+relu"),
        _QUICK_NORM,
        40,
        80,
        40,
    ),
    Step(
        "optimizer, headline",
        "optim_cuda",
        _words("--optimizer AdamW --only 1000_x_1024 --only ResNet-50 --only 100M --only groups"),
        _QUICK_OPTIM,
        30,
        60,
        30,
    ),
    Step(
        "dropout, headline",
        "dropout",
        _words("--device cuda --seconds 0.5 --only dropout_64M --only relu_64M"),
        _QUICK_DROPOUT,
        15,
        40,
        20,
    ),
    Step("micro", "micro", (), ("--device", "cpu"), 45, 90, 40),
    Step(
        "inference",
        "infer",
        _words("--device cuda --seconds 3 --only resnet50_N=256"),
        _QUICK_MODEL,
        35,
        80,
        60,
    ),
    Step("tests", "gpu_tests", (), _QUICK_TESTS, 180, 170, 1e9),
    Step("memcheck", "sanitize", ("--tool", "memcheck"), ("--device", "cpu"), 80, 120, 240),
    # What is left for a second call.
    Step("bits", "golden", ("--device", "cuda"), _words("--device emulated --only l1"), 60, 120),
    Step("batch norm", "batch_norm_cuda", (), _QUICK_NORM, 200, 300, 60),
    Step("optimizer", "optim_cuda", (), _QUICK_OPTIM, 160, 300, 30),
    Step("dropout", "dropout", ("--device", "cuda"), _QUICK_DROPOUT, 60, 120, 20),
    Step("inference, all", "infer", ("--device", "cuda"), _QUICK_MODEL, 60, 120, 60),
    Step("sanitizers", "sanitize", (), ("--device", "cpu"), 240, 400, 240),
)
