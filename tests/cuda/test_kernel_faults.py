"""Faults put into the kernels one at a time: each must be found, by a wrong result or a detector.

BRAZE_HOOK names the places, and tests/emulator/kernels/faults.h makes the faults: "zero" is also false, null,
success and a call left out; "one" is also true. Barriers are deleted by the emulator, in the unchanged kernels.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator_build as build
import pytest
import test_batch_norm_kernels as norm
import test_conv_kernels as conv
import test_dropout_kernels as dropout
import test_emulated_kernels as optimizer
from test_emulated_kernels import run

pytestmark = pytest.mark.cpu_only("is about the emulator")
slow = pytest.mark.slow("hundreds of runs of kernels with a fault")

PROGRAMS = {
    "optimizer": optimizer.kernels_program,
    "batch_norm": norm.norm_program,
    "dropout": dropout.program,
    "conv": conv.conv_program,
}
FAULTS = {
    "optimizer": """
        vector_end: plus_one minus_one; single_begin: plus_one; single_end: minus_one
        vector_count: plus_one; head_end: plus_one; has_phase: one; wanted_chunk: plus_one minus_one
        candidates: minus_one; skipped: zero; found_inf: zero positive_part; not_last: zero
        counted_tensors: minus_one; tensor_stride: twice; other_hyper: zero; other_step: zero
        tensor_end: huge; first_chunk: zero; hypers_begin: zero; wide_hypers_begin: zero
        inverse_scale: one; penalty: zero; reads_momentum: zero
        plain_flags: all_bits; stores_state: zero; grad_and_sum: zero; same_phase: one
        stride_column: minus_one; lower_half: zero one; absent_operand: one; copy_state: zero
        other_stream: zero; small_staging: zero; room_for_staging: one; compare_stride: twice
        last_block: zero; known_begin: huge; all_resident: one; hyper_bytes: zero; dims_begin: zero
        argument_full: zero; same_generation: one; same_algorithm: one; no_maximum: one
        column_is_read: one; counts_nothing: one; capturing: zero; chunks: one
        has_average: zero; first_average: zero one; stored_param: off_by_a_thousandth; norm_scale: one
        num_squares: minus_one; no_clipping: one; skip_overflow: zero;
        absent_gradient: zero; has_chunk: one; all_blocks: minus_one; measured_end: minus_one
        finite: one; all_average: one; no_statistics: one
        forget_uploaded: zero; mark_copied: zero; wait_for_copy: zero; upload: zero
        capture_mode: zero; restore_mode: zero; fill_zeros: zero; taken_words: zero
        other_blocks: plus_one zero; fits_small: one
    """,
    "batch_norm": """
        active_thread: one; has_units: one; own_units: plus_one minus_one; walks_back: zero
        groups_of_channels: zero; row_of_all: one; units_left: one; whole_unit: one
        missing_lanes: minus_one; before_begin: zero; lanes_before: plus_one; aligned: one
        all_lanes: one; unit_phase: zero; row_begins: minus_one; words: plus_one; stored_lane: one
        own_channel: zero; other_blocks: plus_one zero; reset_ticket: zero; rows_and_one: minus_one
        upper_rows: plus_one; writes_row: one; splits_each: minus_one; whole_part: one
        has_channel: one; narrow_grid: one; values_last: one zero; shift_each: one zero
        counted_lane: one; one_shift: zero; partial_items: one; no_values: zero; cumulative: zero
        this_batch: zero; running_mean: zero; running_var: off_by_a_thousandth; counts_batch: one
        no_moments: one; group_finishers: one; block_finishers: one; processes: minus_one
        finished_channels: minus_one; has_residual: zero; mask_lanes: all_bits; has_dy2: zero
        reads_residual: zero; mask_bit: zero; recompute: zero; masked: zero; one_channel: zero
        shared_channel: zero; first_input: one; batch_coefficients: one; batch_gradient: one
        second_sum: zero; wants_residual: zero; without_mask: zero; recomputes: zero; needs_x: zero
        curved_and_masked: zero; mask_row: minus_one; one_phase: one; may_move: one; moves: zero
        phase_zero: one; whole_vectors: one; channel_groups: minus_one; warps: minus_one
        least_splits: one; stride_words: zero; channel_blocks: zero; share: plus_one
        from_running: zero; running_channels: minus_one; channel_begin: zero; part_stride: twice
        in_one_warp: one; writes_part: one
    """,
    "dropout": """
        lane: last_bit_flipped; seed: low_bits_32; offset: zero; random_block: low_bits_28
        first_lane: zero; other_block: zero; lane_of_channel: last_bit_flipped; run_end: plus_one
        length_is_channels: zero; narrow: one; index_within: zero; first_spatial: one
        next_start: zero; loaded: minus_one; stored: minus_one plus_one; stores_used: zero
        misalignment: zero low_bits_2; out_address: zero; vectors: plus_one
        singles: minus_one plus_one; chunk_begin: low_bits_32; needs_mask: zero
        rounding_up: zero; chunks: minus_one; unused: one; by_channels: zero; own_seed: one
        own_offset: zero
    """,
    "conv": """
        own_columns: zero one; own_rows: zero one; own_channels: zero one; uncounted_row: zero one
        has_channel: zero one; values_in_part: zero plus_one; conv_waves: zero
        past_pixels: zero one; linear: one; past_linear: zero one; turned: zero one
        between_strides: one; before_first: one; after_last: one; last_stride: one
        padding_stays: zero; own_gradients: zero one
        stretch_end: plus_one zero; own_weights: zero one; sum_parts: minus_one
    """,
}
# No hooks, for no result can show a fault there: a head of the optimizers' one vector longer or beyond the
# tensor's end; phases without the chunk's begin; `capturing` in the choice of what is resident; a plain tensor
# without a gradient; the order in which a pass of batch norm walks; threads of channels beyond the last that go
# home at once; units that move to a plane's 16-byte boundaries; blocks that merge in one step instead of two;
# where a convolution's tile has the chunks of a row.
# test_kernel_memory.py sees some of these.

# In the order of what finds most: variant, arguments and schedule.
NATIVE = [
    ("native", ("--small", "--stop"), "inorder"),
    ("native", ("--stop",), "inorder"),
    ("native", ("--small", "--stop"), "pct"),
    ("native", ("--small", "--stop"), "random"),
]
ADDRESSES = [*NATIVE[:2], ("asan", ("--small", "--stop"), "inorder")]
KILLERS = {
    "optimizer": NATIVE,
    "batch_norm": NATIVE,
    "dropout": ADDRESSES,
    "conv": ADDRESSES,
}


def faults_of(program: str) -> list[str]:
    """Each as "<hook> <fault>"."""
    rows = [row.split(":") for row in re.split(r"[;\n]", FAULTS[program]) if row.strip()]
    return [f"{hook.strip()} {fault}" for hook, faults in rows for fault in faults.split()]


def test_every_hook_has_a_fault() -> None:
    files = (p for p in (build.ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h"))
    hooks = re.findall(r"BRAZE_HOOK\(\s*([a-z]\w*),", "".join(p.read_text() for p in files))
    known = {fault.split()[0] for program in FAULTS for fault in faults_of(program)}
    assert set(hooks) - {"name"} == known


@slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str) -> None:
    built = {v: PROGRAMS[name](v, faults=True) for v, _, _ in KILLERS[name]}
    for program in built.values():
        status, output = run(program, "--small")
        assert status == 0, f"without a fault it must pass\n{output}"

    def killer(fault: str) -> str | None:
        for variant, args, order in KILLERS[name]:
            env = {"BRAZE_FAULT": fault, "BRAZE_EMULATOR_ORDER": order}
            status, output = run(built[variant], *args, **env)
            assert "there is no fault" not in output, f"{fault}: {output}"
            if status != 0:
                found = re.search(r"FAILED (\w+)", output)
                what = found[1] if found else f"died with status {status}"
                return f"{variant}, {order}{'' if '--small' in args else ', all lengths'}: {what}"
        return None

    faults = faults_of(name)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as workers:
        killers = dict(zip(faults, workers.map(killer, faults), strict=True))
    for fault, how in killers.items():
        print(f"{fault:32}{how or 'SURVIVED'}")
    print(
        f"{len(faults)} faults",
        Counter((how or "SURVIVED").split(":")[0] for how in killers.values()),
    )
    survivors = [fault for fault, how in killers.items() if how is None]
    assert not survivors, f"no test notices {survivors}"


def barriers_unnoticed(
    native: Path, tsan: Path, for_tsan: Sequence[str], for_orders: Sequence[str]
) -> list[str]:
    """The barriers without which TSan reports no race and no result is wrong."""
    status, output = run(native, "--small", "--barriers")
    assert status == 0, output
    sites = [line.split()[1] for line in output.splitlines() if line.startswith("barrier")]
    assert sites, "the kernels have barriers, but none was reached"
    survivors = []
    for site in sites:
        killed_by = []
        for mode in ("A", "B"):
            env = {"BRAZE_EMULATOR_TSAN_MODE": mode, "BRAZE_EMULATOR_DROP_BARRIER": site}
            env["TSAN_OPTIONS"] = "halt_on_error=1:exitcode=66:history_size=4:atexit_sleep_ms=0"
            status, output = run(tsan, "--small", *for_tsan, **env)
            if status != 0 and "data race" in output:
                killed_by.append(f"TSan {mode}")
        for order in ("reverse", "random", "pct"):
            env = {"BRAZE_EMULATOR_ORDER": order, "BRAZE_EMULATOR_DROP_BARRIER": site}
            status, _ = run(native, "--small", "--stop", *for_orders, **env)
            if status != 0:
                killed_by.append(order)
        print(f"{site}: {', '.join(killed_by) or 'SURVIVED'}")
        if not killed_by:
            survivors.append(site)
    return survivors


@slow
@pytest.mark.parametrize(
    ("name", "few_blocks", "for_orders"),
    [
        ("optimizer", optimizer.FEW_BLOCKS, (*optimizer.FEW_BLOCKS, "device_counts")),
        ("batch_norm", norm.FEW_BLOCKS, norm.FEW_BLOCKS),
        ("conv", conv.FEW_BLOCKS, conv.FEW_BLOCKS),
    ],
)
def test_barriers(name: str, few_blocks: Sequence[str], for_orders: Sequence[str]) -> None:
    program = PROGRAMS[name]
    survivors = barriers_unnoticed(program("native"), program("tsan"), few_blocks, for_orders)
    assert not survivors, f"nothing notices that these barriers are gone: {survivors}"
