"""What a GPU is asked, in the order of its value. Every step is a program that prints rows (bench/rows.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .sources import BUILT, FAMILIES, digest

_ALL = tuple(sorted({glob for globs in FAMILIES.values() for glob in globs}))
_TIMED = ("bench/clock.py", "bench/harness.py")
# By program: what its rows are about. Other sources, other rows.
SOURCES: dict[str, tuple[str, ...]] = {
    "gpu_build": BUILT,
    "golden": (*_ALL, "bench/golden*"),
    "gpu_tests": (*BUILT, "python/**/*.py", "tests/**/*.py"),
    "sanitize": (*_ALL, "bench/golden*.py", "bench/sanitize.py", "tests/sanitizer_controls/*"),
    "norm": (*FAMILIES["batch_norm"], *_TIMED, "bench/norm.py"),
    "optim": (*FAMILIES["optimizer"], *_TIMED, "python/braze/amp.py", "bench/optim.py"),
    "dropout": (*FAMILIES["dropout"], *_TIMED, "bench/dropout.py"),
    "conv": (*FAMILIES["conv"], *FAMILIES["batch_norm"], *_TIMED, "bench/conv*.py"),
    "infer": (*FAMILIES["batch_norm"], *_TIMED, "python/braze/nn/_fold*.py", "bench/infer.py"),
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


def _step(name: str, program: str, arguments: str, rehearsal: str, *seconds: float) -> Step:
    """Arguments as one text; "~" stands for a space inside of one."""

    def words(text: str) -> tuple[str, ...]:
        return tuple(word.replace("~", " ") for word in text.split())

    return Step(name, program, words(arguments), words(rehearsal), *seconds)


_QUICK = "--device cpu --seconds 0 "
_CUDA = "--device cuda "
_NORM = _QUICK + "--quick --batch 2 --filter bf16~NHWC~relu"
_OPTIM = _QUICK + "--filter AdamW~/~1~x~64"
_RECIPE = _QUICK + "--filter AdamW~clip+amp~/~1000"
_DROPOUT = _QUICK + "--filter dropout~1M~bf16"
_CONV = _QUICK + "--quick --filter fp32~NHWC~inference"
_KERNEL = _QUICK + "--batch 1 --filter 512-128~1x1~28~/~backward~bf16"
_MODEL = _QUICK + "--model resnet18 --size 32 --batch 1 --dtype fp32"
_NORMS = _CUDA + "--filter bf16~NHWC~relu~N=256 --filter bf16~NHWC~add+relu"
_ADAMW = "".join(
    f"--filter AdamW~/~{cell} " for cell in ("1000~x~1024", "ResNet", "fp32~100M", "465")
)
_KERNELS = _CUDA + "--filter kernels "
_CONVS = _CUDA + "--filter conv+bn"
_DROPOUTS = _CUDA + "--seconds 0.5 --filter dropout~64M --filter relu~64M"
_INFERENCE = _CUDA + "--seconds 3 --filter resnet50~N=256"
_TESTS = "--device fake --filter test_dropout_cuda"
STEPS = (
    _step("build", "gpu_build", "", "--device cpu", 80, 1000, 1000),
    _step("contact", "golden", "--device cuda --short", "--device emulated --short", 20, 60),
    _step("batch norm, headline", "norm", _NORMS, _NORM, 40, 80, 40),
    _step("conv kernels", "conv", _KERNELS + "--quick --seconds 0.3", _KERNEL, 30, 60, 40),
    _step("optimizer, headline", "optim", _CUDA + "--seconds 1 " + _ADAMW, _OPTIM, 30, 60, 30),
    _step("recipe", "optim", _CUDA + "--seconds 1 --filter clip", _RECIPE, 25, 60, 30),
    _step("dropout, headline", "dropout", _DROPOUTS, _DROPOUT, 15, 40, 20),
    _step("inference", "infer", _INFERENCE, _MODEL, 35, 80, 60),
    _step("tests", "gpu_tests", "", _TESTS, 180, 170, 1e9),
    _step("memcheck", "sanitize", "--tool memcheck", "--device cpu", 80, 120, 240),
    # What is left for a second call.
    _step("conv kernels, all", "conv", _KERNELS, _KERNEL, 200, 300, 40),
    _step("micro", "micro", "", "--device cpu", 45, 90, 40),
    _step("bits", "golden", "--device cuda", "--device emulated --filter l1", 60, 120),
    _step("batch norm", "norm", _CUDA, _NORM, 200, 300, 60),
    _step("optimizer", "optim", _CUDA + "--seconds 1", _OPTIM, 160, 300, 30),
    _step("dropout", "dropout", _CUDA, _DROPOUT, 60, 120, 20),
    _step("convolution", "conv", _CONVS, _CONV, 40, 80, 40),
    _step("inference, all", "infer", _CUDA, _MODEL, 60, 120, 60),
    _step("sanitizers", "sanitize", "", "--device cpu", 240, 400, 240),
)
