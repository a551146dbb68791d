"""The optimizer kernels, run on the CPU under every schedule and sanitizer, against the CPU optimizers.

The programs are in tests/emulator/kernels; BRAZE_EMULATOR_SEED chooses their data and schedules.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import emulator_build as build
import pytest

pytestmark = pytest.mark.cpu_only("is about the emulator")
compiled_again = pytest.mark.slow("compiles all kernels once more")

KERNELS = build.EMULATOR / "kernels"
CUDA = build.ROOT / "csrc" / "cuda"
FLAGS = ("-include", str(KERNELS / "intercept.h"))
FAULTS = ("-include", str(KERNELS / "faults.h"))
SEED = os.environ.get("BRAZE_EMULATOR_SEED", "1")

# Few blocks, so that TSan can tell all threads of a launch apart.
FEW_BLOCKS = (
    "device_counts_general",
    "equal_device_counts",
    "device_hypers",
    "device_sgd",
    "loss_scale",
    "overflow",
    "counts_without_elements",
    "measured_few_chunks",
)


def together(name: str, files: Sequence[Path]) -> Path:
    """The tests of a program as one source: half the time of compiling them one by one."""
    text = "".join(f'#include "{file}"\n' for file in files)
    source = build.CACHE / f"{name}.cpp"
    if not source.exists() or source.read_text() != text:
        build.CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=build.CACHE, delete=False) as new:
            new.write(text)
        os.replace(new.name, source)
    return source


def build_kernels(name: str, sources: Sequence[Path], variant: str, faults: bool) -> Path:
    """A program of tests; with `faults`, of kernels that can have one (test_kernel_faults.py)."""
    if (reason := build.have(variant)) is not None:
        pytest.skip(reason)
    name, flags = (f"{name}_faults", FAULTS) if faults else (name, ())
    include = (KERNELS, KERNELS / "include")
    return build.build_program(name, sources, variant, include=include, flags=(*flags, *FLAGS))


def kernels_program(variant: str, faults: bool = False) -> Path:
    tests = [KERNELS / "harness.cpp", KERNELS / "problem.cpp", *sorted(KERNELS.glob("test_*.cpp"))]
    sources = [together("kernels", tests), KERNELS / "intercept.cpp", KERNELS / "reference.cpp"]
    # Not every operation: each has a program of its own.
    sources += [CUDA / f"{name}.cu" for name in ("device_table", "zeros")]
    sources += sorted(CUDA.glob("optimizer_*.cu"))
    return build_kernels("kernels", sources, variant, faults)


# In the order of the tests.
NEEDED = {
    "test_every_schedule": "native",
    "test_other_compiler": "clang",
    "test_other_machine": "aarch64",
    "test_asan": "asan",
    "test_msan": "msan",
    "test_tsan": "tsan",
}


@pytest.fixture(scope="module", autouse=True)
def builds_ahead(request: pytest.FixtureRequest) -> None:
    """Compiles for later tests while earlier ones run: running keeps one core busy only."""
    chosen = {getattr(item, "originalname", "") for item in request.session.items}
    variants = [variant for test, variant in NEEDED.items() if test in chosen]

    def build_all() -> None:
        for variant in variants:
            # A failure is the test's to report.
            with contextlib.suppress(RuntimeError, pytest.skip.Exception):
                kernels_program(variant)

    threading.Thread(target=build_all, daemon=True).start()


def run(program: Path, *args: str, **env: str) -> tuple[int, str]:
    """Status and all output."""
    done = build.run(program, args, {"BRAZE_EMULATOR_SEED": SEED, **env})
    return done.returncode, done.stdout + done.stderr


def expect_silence(program: Path, *args: str, **env: str) -> str:
    status, output = run(program, *args, **env)
    assert status == 0, output
    assert "WARNING: " not in output, output
    print(output)
    return output


def check_asan(program: Path, *files: str) -> None:
    """Silent, and not about a buffer too short, which a kernel in one of ``files`` leaves."""
    expect_silence(program, "--small", BRAZE_EMULATOR_ORDER="random")
    status, output = run(program, "seeded_short_buffer")
    assert status != 0 and "AddressSanitizer: heap-buffer-overflow" in output, output
    assert any(file in output for file in files), output


def check_msan(program: Path) -> None:
    """Silent, and not about a buffer that nobody has written."""
    expect_silence(program, "--small", BRAZE_EMULATOR_ORDER="reverse")
    status, output = run(program, "seeded_fresh_buffer")
    assert status != 0 and "MemorySanitizer: use-of-uninitialized-value" in output, output


def check_tsan(program: Path, mode: str, tests: Sequence[str], control: Sequence[str]) -> None:
    """Silent about ``tests``, and not about ``control`` without the first barrier."""
    env = {"BRAZE_EMULATOR_TSAN_MODE": mode}
    output = expect_silence(program, "--small", "--barriers", *tests, **env)
    site = next(line.split()[1] for line in output.splitlines() if line.startswith("barrier"))
    status, output = run(program, "--small", *control, BRAZE_EMULATOR_DROP_BARRIER=site, **env)
    assert status != 0 and "WARNING: ThreadSanitizer: data race" in output, output


def test_every_schedule() -> None:
    output = expect_silence(kernels_program("native"), "--all-schedules")
    assert "10 schedules" in output


@compiled_again
def test_other_compiler() -> None:
    expect_silence(kernels_program("clang"), "--small", BRAZE_EMULATOR_ORDER="pct")


@compiled_again
def test_other_machine() -> None:
    tests = (
        "general_steps",
        "strided_steps",
        "device_counts",
        "captured_counts",
        "change_of_stream",
    )
    expect_silence(kernels_program("aarch64"), "--small", *tests)


@compiled_again
def test_asan() -> None:
    check_asan(kernels_program("asan"), "elements.cuh", "optimizer_kernels.cuh")


@compiled_again
def test_msan() -> None:
    check_msan(kernels_program("msan"))


@compiled_again
@pytest.mark.parametrize("mode", ["A", "B"])
def test_tsan(mode: str) -> None:
    tests = FEW_BLOCKS if mode == "B" else (*FEW_BLOCKS, "device_counts", "plain_steps")
    check_tsan(kernels_program("tsan"), mode, tests, ["device_counts_general"])


def test_no_asm_elsewhere() -> None:
    files = (
        p for p in (build.ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")
    )
    found = [p.name for p in files if re.search(r"\basm\s+(volatile\s*)?\(|\basm\(", p.read_text())]
    assert found == ["ptx.cuh"]
