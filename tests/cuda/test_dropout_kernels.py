"""Dropout's kernels, run on the CPU under every schedule and sanitizer; each detector has a control."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import emulator_build as build
import pytest
from test_emulated_kernels import CUDA, FLAGS, KERNELS, expect_silence, run

pytestmark = pytest.mark.cpu_only("is about the emulator")

SOURCE = KERNELS / "dropout_tests.cpp"
TESTS = tuple(re.findall(r"^TEST\((dropout_\w+)\)", SOURCE.read_text(), re.MULTILINE))


def program(
    variant: str, cuda: Path = CUDA, name: str = "dropout", include: Sequence[Path] = ()
) -> Path:
    """Dropout's tests alone: an edit of another kernel does not rebuild them under six compilers."""
    if (reason := build.have(variant)) is not None:
        pytest.skip(reason)
    sources = [KERNELS / "harness.cpp", KERNELS / "intercept.cpp", SOURCE]
    return build.build_program(
        name,
        [*sources, cuda / "dropout_launch.cu"],
        variant,
        include=(*include, KERNELS, KERNELS / "include"),
        flags=FLAGS,
    )


def test_every_schedule() -> None:
    output = expect_silence(program("native"), "--all-schedules")
    assert "10 schedules" in output and f"{len(TESTS)} tests" in output


def test_other_compiler() -> None:
    expect_silence(program("clang"), "--small", BRAZE_EMULATOR_ORDER="pct")


def test_other_machine() -> None:
    tests = [name for name in TESTS if name != "dropout_large"]  # qemu has less address space
    expect_silence(program("aarch64"), "--small", *tests)


def test_asan() -> None:
    asan = program("asan")
    expect_silence(asan, "--small", BRAZE_EMULATOR_ORDER="random")
    status, output = run(asan, "seeded_dropout_short_output")
    assert status != 0 and "AddressSanitizer: heap-buffer-overflow" in output, output


def test_msan() -> None:
    msan = program("msan")
    expect_silence(msan, "--small", BRAZE_EMULATOR_ORDER="reverse")
    status, output = run(msan, "seeded_dropout_fresh_input")
    assert status != 0 and "MemorySanitizer: use-of-uninitialized-value" in output, output


@pytest.mark.parametrize("mode", ["A", "B"])
def test_tsan(mode: str) -> None:
    tsan = program("tsan")
    env = {"BRAZE_EMULATOR_TSAN_MODE": mode}
    expect_silence(tsan, "--small", "dropout_steps", "dropout_channels", **env)
    if mode == "B":  # within a block nobody reads what another thread wrote
        status, output = run(tsan, "seeded_dropout_overlap", **env)
        assert status != 0 and "WARNING: ThreadSanitizer: data race" in output, output
