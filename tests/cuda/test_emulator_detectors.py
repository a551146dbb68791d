"""Every detector reports its seeded bug, and is silent about the correct twin."""

from __future__ import annotations

import re
from pathlib import Path

import emulator_build
import pytest

pytestmark = pytest.mark.cpu_only("is about the emulator")

SEEDED = emulator_build.EMULATOR / "controls" / "seeded.cu"
WRONG_RESULT = 3
EMULATOR_ERROR = 4
TSAN_REPORT = 66
SEEDS = 30


def seeded(variant: str) -> Path:
    if (reason := emulator_build.have(variant)) is not None:
        pytest.skip(reason)
    return emulator_build.build_program("seeded", [SEEDED], variant)


def schedule(order: str, seed: int = 0) -> dict[str, str]:
    return {"BRAZE_EMULATOR_ORDER": order, "BRAZE_EMULATOR_SEED": str(seed)}


# --- schedules: a race gives a wrong result ---

RACES = ("write_read", "loop_carried", "within_warp")


@pytest.mark.parametrize("case", RACES)
def test_pct_shows_races(case: str) -> None:
    program = seeded("native")
    for seed in range(SEEDS):
        bug = emulator_build.run(program, [case, "bug", "128"], schedule("pct", seed))
        assert bug.returncode == WRONG_RESULT, f"{case} not shown by pct seed {seed}"
    for seed in range(5):
        fine = emulator_build.run(program, [case, "ok", "128"], schedule("pct", seed))
        assert fine.returncode == 0, fine.stderr


def test_float_atomics_depend_on_the_order() -> None:
    program = seeded("native")

    def sums(kind: str) -> set[str]:
        return {
            emulator_build.run(program, ["float_sum", kind], schedule("random", s)).stdout
            for s in range(5)
        }

    assert len(sums("bug")) > 1
    # The same threads in the same orders, but sums that are exact.
    assert len(sums("ok")) == 1


@pytest.mark.parametrize("case", ["staging", "event_wait"])
def test_deferred_streams_show_misuse(case: str) -> None:
    """Pinned memory overwritten before its copy ran; a stream that does not wait for an event."""
    program = seeded("native")
    orders = [schedule("inorder"), schedule("reverse")]
    orders += [schedule("random", seed) for seed in range(10)]
    results = [emulator_build.run(program, [case, "bug"], env).returncode for env in orders]
    assert set(results) <= {0, WRONG_RESULT}
    assert results[:2] == [WRONG_RESULT, WRONG_RESULT]
    for env in orders:
        assert emulator_build.run(program, [case, "ok"], env).returncode == 0


# --- AddressSanitizer and UndefinedBehaviorSanitizer ---

ADDRESS = {
    "static_index": "heap-buffer-overflow",
    "dynamic_index": "heap-buffer-overflow",
    "global_index": "heap-buffer-overflow",
    "misaligned": "load of misaligned address",
    "overflow": "signed integer overflow",
    "stack": "stack-overflow",
}


@pytest.mark.parametrize("case", ADDRESS)
def test_asan_and_ubsan(case: str) -> None:
    program = seeded("asan")
    bug = emulator_build.run(program, [case, "bug"])
    assert bug.returncode not in (0, WRONG_RESULT, EMULATOR_ERROR)
    assert ADDRESS[case] in bug.stderr
    # Where it happened.
    assert re.search(r"(seeded\.cu|memory\.h):\d+", bug.stderr), bug.stderr
    fine = emulator_build.run(program, [case, "ok"])
    assert fine.returncode == 0, fine.stderr


def test_stack_overflow_has_a_message() -> None:
    bug = emulator_build.run(seeded("native"), ["stack", "bug"])
    assert bug.returncode < 0
    assert "a CUDA thread overflowed its stack" in bug.stderr
    assert "BRAZE_EMULATOR_STACK_KB" in bug.stderr


# --- MemorySanitizer ---


@pytest.mark.parametrize("case", ["unwritten_shared", "unwritten_global"])
def test_msan(case: str) -> None:
    program = seeded("msan")
    bug = emulator_build.run(program, [case, "bug"])
    assert bug.returncode not in (0, WRONG_RESULT)
    assert "use-of-uninitialized-value" in bug.stderr
    if emulator_build.symbolizer() is not None:
        assert re.search(r"seeded\.cu:\d+", bug.stderr), bug.stderr
    fine = emulator_build.run(program, [case, "ok"])
    assert fine.returncode == 0, fine.stderr


# --- ThreadSanitizer ---


@pytest.mark.parametrize("threads", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("case", RACES)
def test_tsan_at_every_block_size(case: str, threads: int) -> None:
    program = seeded("tsan")
    bug = emulator_build.run(program, [case, "bug", str(threads)])
    assert bug.returncode == TSAN_REPORT and "data race" in bug.stderr, bug.stderr[-2000:]
    assert re.search(r"seeded\.cu:\d+", bug.stderr)
    fine = emulator_build.run(program, [case, "ok", str(threads)])
    assert fine.returncode == 0, fine.stderr[-2000:]


@pytest.mark.parametrize("threads", [64, 256])
def test_tsan_tells_blocks_apart(threads: int) -> None:
    """Mode B: two blocks write one cell. The blocks ran one after another all the same."""
    program = seeded("tsan")
    arguments = ["blocks_share", "bug", str(threads)]
    bug = emulator_build.run(program, arguments, {"BRAZE_EMULATOR_TSAN_MODE": "B"})
    assert bug.returncode == TSAN_REPORT and "data race" in bug.stderr
    # Mode A does not look across blocks.
    assert emulator_build.run(program, arguments, {"BRAZE_EMULATOR_TSAN_MODE": "A"}).returncode == 0
    for case in ("blocks_share", "last_block_done"):
        fine = emulator_build.run(
            program, [case, "ok", str(threads)], {"BRAZE_EMULATOR_TSAN_MODE": "B"}
        )
        assert fine.returncode == 0, fine.stderr[-2000:]


# --- barriers deleted at run time ---


@pytest.mark.parametrize("case", RACES)
def test_a_deleted_barrier_is_reported(case: str) -> None:
    """What mutation tests rely on: the correct kernel without a barrier is the seeded bug."""
    dropped = {"write_read": "0", "loop_carried": "1", "within_warp": "0"}[case]
    program = seeded("tsan")
    done = emulator_build.run(
        program, [case, "ok", "128"], {"BRAZE_EMULATOR_DROP_BARRIER": dropped}
    )
    assert done.returncode == TSAN_REPORT and "data race" in done.stderr
