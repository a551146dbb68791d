"""The model of the kernels that multiply: which ways it counts, what it refuses, its limits and layers."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import cuda_gates
import emulator_build
import pytest
import sass_layers
import sass_model
import sass_tensor
from sass_tensor import HMMA_CYCLES, TensorRow
from test_sass_model import body

pytestmark = pytest.mark.cpu_only("is about the build")

NAME = "conv_kernel<Bf16, {}, true>"


def lines(count: int, instruction: str) -> str:
    return f"{instruction}\n" * count


# The forward kernel as nvcc lays it out. Each row of the prologue, each operand that may be absent
# and each end of a tap or tile is branched around.
PROLOGUE = "".join(
    f"@P1 BRA row{row}\n{lines(8, 'FFMA R4, R4, R5, R6')}"
    f"{lines(4, 'F2FP.RELU.BF16.F32.PACK_AB R4, R5, R4')}row{row}:\n"
    for row in range(4)
)
KERNEL = f"""
{lines(2, "CS2R R8, SRZ")}
tile:
{lines(3, "CS2R R8, SRZ")}
step:
@P0 BRA ready
{PROLOGUE}
ready:
BAR.SYNC.DEFER_BLOCKING 0x0
@!P1 BRA same_tap
IADD3 R4, R4, 0x1, RZ
IADD3 R4, R4, 0x1, RZ
@!P2 BRA copy
{lines(4, "ISETP.GE.U32.AND P3, PT, R4, UR4, PT")}
BRA copy
same_tap:
IADD3 R4, R4, 0x8, RZ
copy:
@P3 BRA multiply
{lines(6, "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]")}
multiply:
{lines(32, "HMMA.16816.F32.BF16 R4, R8, R12, R4")}
@P4 BRA step
{lines(16, "F2FP.BF16.F32.PACK_AB R4, R5, R4")}
@P5 BRA first
{lines(32, "FFMA R4, R4, R5, R6")}
first:
{lines(4, "@P6 STG.E.128 desc[UR4][R2.64], R4")}
@P0 BRA tile
EXIT
"""
# In parts, each with its own sums and stores.
PARTS = (
    KERNEL.replace("@P5 BRA first", "part:\n@P5 BRA first")
    .replace("@P0 BRA tile", "@P6 BRA part\n@P0 BRA tile")
    .replace(lines(6, "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]"),
             lines(8, "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]"))
)  # fmt: skip


def row_of(code: str, columns: int = 64, registers: int = 128, static: int = 1152) -> TensorRow:
    row = sass_tensor.row_of(NAME.format(columns), body(code), registers, static)
    assert row
    return row


# ----------------------------------------------------------------- what is counted


def test_shortest_ways_are_counted() -> None:
    row = row_of(KERNEL)
    step = 1 + 2 + 1 + 1 + 6 + 32 + 1
    assert (row.hmma, row.step) == (32, step)
    assert row.prologue == step + 4 * 13  # all of its rows, though each may be left out
    assert row.tap == 3 - 1
    # The end of a tap and the pixels of another tile too.
    assert row.tile == 3 + (3 + 4 + 1 - 1) + 16 + 1 + 32 + 4 + 1


def test_figures_of_residency_are_made_of_registers_and_all_shared_memory() -> None:
    row = row_of(KERNEL)
    assert (row.shared, row.blocks, row.in_flight) == (73728 + 128, 2, 2 * 6 * 16 * 256)
    assert row_of(KERNEL, registers=80).blocks == 3
    assert row_of(KERNEL, registers=80, static=1024 + 4096).blocks == 2  # not one in 228 KB more


def test_each_part_of_a_tile_is_counted() -> None:
    row, one = row_of(PARTS, 128), row_of(KERNEL)
    part = 1 + 32 + 4 + 1
    assert row.step == one.step + 2
    assert row.tile == one.tile + 1 + part


def test_operand_that_is_predicated_off_may_be_there_or_not() -> None:
    copies = lines(4, "@P2 LDGSTS.E.BYPASS.128 [R4+0x4000], desc[UR4][R2.64]")
    code = KERNEL.replace("multiply:", copies + "multiply:").replace("@P5 BRA first", "")
    code = code.replace(PROLOGUE, lines(64, "FFMA R4, R4, R5, R6"))
    code = code.replace("first:", lines(32, "FFMA R4, R4, R5, R6"))
    row = sass_tensor.row_of("conv_kernel<F16, 64, false>", body(code), 128, 1152)
    assert row and row.step == row_of(KERNEL).step + 4  # they are issued all the same
    assert row.prologue == row.step + 64
    assert row.in_flight == 2 * 6 * 16 * 256  # without them


def test_weight_gradient_has_both_prologues_and_no_tiles() -> None:
    code = f"""
    step:
    @P0 BRA ready
    {lines(48, "FFMA R4, R4, R5, R6")}
    {lines(8, "F2FP.RELU.F16.F32.PACK_AB R4, R5, R4")}
    ready:
    BAR.SYNC.DEFER_BLOCKING 0x0
    {lines(4, "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]")}
    {lines(2, "@P1 LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]")}
    {lines(16, "HMMA.16816.F32 R4, R8, R12, R4")}
    @P4 BRA step
    EXIT
    """
    row = sass_tensor.row_of("conv_weight_grad_kernel<F16, 64>", body(code), 112, 1024)
    assert row == TensorRow(16, 25, 81, 0, 0, 112, 49152, 2, 2 * 4 * 16 * 256)


@pytest.mark.parametrize("name", ["conv_sum_kernel<Bf16>", "dropout_kernel<Bf16, 64, true>"])
def test_other_kernels_are_no_rows(name: str) -> None:
    assert sass_tensor.row_of(name, body(KERNEL), 128, 0) is None


def test_shared_memory_is_that_of_the_sources(tmp_path: Path) -> None:
    compiler = shutil.which("g++-12") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    layouts = {
        **{
            f"ConvLayout<{columns}, {forward}>": f"conv_kernel<Bf16, {columns}, {forward}>"
            for columns in (64, 128)
            for forward in ("true", "false")
        },
        **{f"ConvWeightLayout<{n}>": f"conv_weight_grad_kernel<F16, {n}>" for n in (64, 128)},
    }

    def errors(more: int) -> int:
        text = '#include "conv_gemm.cuh"\n#include "conv_weight_grad.cuh"\n'
        for layout, name in layouts.items():
            plan = sass_tensor.plan_of(name)
            assert plan
            text += f"static_assert(braze::cuda::{layout}::kBytes == {plan.shared + more});\n"
        (tmp_path / "layouts.cpp").write_text(text)
        folders = [emulator_build.EMULATOR / "include", emulator_build.ROOT / "csrc/cuda"]
        command = [compiler, *emulator_build.COMMON_FLAGS, "-Wno-unknown-pragmas", "-fsyntax-only"]
        command += [*(f"-I{folder}" for folder in folders), str(tmp_path / "layouts.cpp")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert more or run.returncode == 0, run.stderr
        return run.stderr.count("static assertion failed")

    assert errors(0) == 0
    assert errors(16) == len(layouts)


# ----------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("@P4 BRA step", "", "1 loops have all of its 32 HMMA"),  # that of tiles
        ("HMMA", "IMMA", "2 loops have all of its 0 HMMA"),
        ("EXIT", "HMMA.16816.F32.BF16 R4, R8, R12, R4\nEXIT", "0 loops have all of its 33 HMMA"),
        (lines(6, "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]"), "", "no way around a loop has"),
        ("F2FP.RELU", "F2FP", "no way around a loop has"),
        ("ISETP.GE.U32", "ISETP.GE", "no way on to another tile"),
        ("STG.E.128", "STG.E.64", "no way around a loop has"),
    ],
)
def test_kernel_that_is_not_as_planned_is_an_error(old: str, new: str, error: str) -> None:
    assert old in KERNEL
    code = KERNEL.replace(old, new)
    with pytest.raises(ValueError, match=f"conv_kernel<Bf16, 64, true>: {error}"):
        row_of(code)


# ----------------------------------------------------------------- limits and layers

LIMITS = {"issue": 1.0, "issue_prologue": 1.4, "in_flight": 26 * 1024}
GOOD = TensorRow(32, 130, 280, 25, 350, 128, 73856, 2, 49152)


def test_issue_is_a_share_of_the_cycles_of_the_tensor_cores() -> None:
    assert pytest.approx(6.45, abs=0.01) == HMMA_CYCLES
    assert GOOD.issue(206) == pytest.approx(206 / (32 * 6.4516), rel=1e-4)


@pytest.mark.parametrize(
    ("figure", "change"),
    [
        ("issue 1.02 > 1.00", {"step": 210}),
        ("issue_prologue 1.45 > 1.40", {"prologue": 300}),
        ("in_flight 24576 < 26624", {"in_flight": 24 * 1024}),
    ],
)
def test_each_limit_is_noticed_and_can_be_excused(figure: str, change: dict[str, int]) -> None:
    assert sass_model.broken_limits({"k": GOOD}, LIMITS, {}) == []
    bad = {"k": dataclasses.replace(GOOD, **change)}
    assert sass_model.broken_limits(bad, LIMITS, {}) == [f"k: {figure}"]
    assert sass_model.broken_limits(bad, LIMITS, {"k": "it is rare"}) == []


ROWS = {NAME.format(64): GOOD, NAME.format(128): dataclasses.replace(GOOD, hmma=64, tile=600)}


def test_needs_of_a_layer() -> None:
    layer = sass_layers.Layer(56, 64, 256, normalised=True)
    need = sass_layers.need_of(layer, ROWS)
    tiles = 64 * 56 * 56 / 128
    assert need.memory == pytest.approx(
        2 * (128 * (64 + 256) + 64 * 256 / tiles) / (4.3e12 / (132 * 1.98e9))
    )
    assert need.issue == 2 * (280 + 600) * 8 / 4  # two slabs of 128 channels
    assert need.tensor == pytest.approx(2 * 64 * HMMA_CYCLES * 8 / 4)
    assert need.bound() == 1  # memory's
    kernel = sass_layers.need_of(sass_layers.Layer(56, 64, 64, kernel=3), ROWS)
    assert kernel.issue == (9 * 130 + 8 * 25 + 350) * 8 / 4
    assert kernel.bound() == pytest.approx(kernel.tensor / kernel.memory)


def test_difference_of_a_row_and_of_the_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_gates, "PAGE", tmp_path / "page.md")
    limits = {**LIMITS, "need_issue": 0.6, "need_alu": 0.6}
    ratchet = cuda_gates.Ratchet(limits=limits, tensor=cuda_gates.pinned(ROWS))
    cuda_gates.PAGE.write_text(cuda_gates.page(ratchet, {}, ROWS))
    assert cuda_gates.problems_and_changes(ratchet, {}, {}, ROWS) == ([], [])
    better = {**ROWS, NAME.format(64): dataclasses.replace(GOOD, step=129)}
    assert cuda_gates.problems_and_changes(ratchet, {}, {}, better)[1] == [
        "conv_kernel<Bf16, 64, true> on sm_90: step 130 -> 129",
        "page.md is not made of these figures",
    ]


def test_page_has_both_tables_and_the_excuses() -> None:
    page = sass_layers.document(ROWS, LIMITS, {NAME.format(64): "it is rare", "step_kernel": "no"})
    assert "| `conv_kernel<Bf16, 64, true>` | 32 | 130 | 0.63 | 280 | 1.36 | 25 | 350 |" in page
    assert "- `conv_kernel<Bf16, 64, true>`: it is rare" in page and "step_kernel" not in page
    assert page.count("| relu |") == 4 and "| 1x1 512 → 128, 28x28 | none |" in page
