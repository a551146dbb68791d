"""The model of the hot loops: what it reads in a listing, which way around a loop it counts, its limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cuda_gates
import pytest
import sass_model
from sass_model import Family, Row

pytestmark = pytest.mark.cpu_only("is about the build")

STREAM = Family("", "", 1, 1)


def listing(code: str, arch: str = "sm_90", name: str = "k") -> str:
    """``code`` as cuobjdump prints it, with addresses for its labels."""
    lines = [line.split("#")[0].strip() for line in code.strip().splitlines()]
    labels: dict[str, str] = {}
    count = 0
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"0x{16 * count:x}"
        else:
            count += 1
    text = [f"arch = {arch}", f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for k, line in enumerate(line for line in lines if not line.endswith(":")):
        words = " ".join(labels.get(word, word) for word in line.split())
        text += [f"        /*{16 * k:04x}*/   {words} ;   /* 0x0000000407407981 */"]
        text += [" " * 60 + "/* 0x000fe2000c1e1d00 */"]
    return "\n".join(text)


def body(code: str) -> list[sass_model.Instruction]:
    return sass_model.functions(listing(code))["k"]


def first_path(code: str, family: Family = STREAM) -> tuple[int, list[str]]:
    """Units and opcodes of the hot path of the first hot loop."""
    blocks, own, back = next(sass_model.hot_loops(body(code)))
    units, path = sass_model.hot_path(blocks, own, back, family)
    return units, [i.opcode for i in path]


# ----------------------------------------------------------------- the listing


def test_instruction_is_read_with_its_predicate_and_operands() -> None:
    first, second, third = body("@!P0 LDG.E.128 R4, desc[UR4][R2.64]\nNOP\n@UP1 BRA 0x10")
    assert first == sass_model.Instruction(0, "!P0", "LDG.E.128", "R4, desc[UR4][R2.64]")
    assert second == sass_model.Instruction(16, "", "NOP", "")
    assert third.target() == 16 and third.conditional() and first.target() is None


def test_other_architectures_are_not_read() -> None:
    both = listing("EXIT", "sm_80") + "\n" + listing("NOP\nEXIT", "sm_90")
    assert {name: len(code) for name, code in sass_model.functions(both).items()} == {"k": 2}
    assert sass_model.functions(listing("EXIT", "sm_100")) == {}


# ----------------------------------------------------------------- the way around

RESIDUAL = """
loop:
LDG.E.128 R4, desc[UR4][R2.64]
@P0 BRA absent
LDG.E.128 R8, desc[UR4][R12.64]
FADD R4, R4, R8
absent:
FMUL R4, R4, R5
STG.E.128 desc[UR4][R2.64], R4
NOP
@P1 BRA loop
EXIT
"""


def test_operand_that_may_be_absent_is_branched_around() -> None:
    path = ["LDG.E.128", "BRA", "FMUL", "STG.E.128", "BRA"]
    assert first_path(RESIDUAL) == (1, path)


def test_family_with_that_operand_does_not_branch_around_it() -> None:
    units, path = first_path(RESIDUAL, Family("", "", 2, 1))
    assert units == 1 and path.count("LDG.E.128") == 2 and "FADD" in path


def test_operand_that_may_be_absent_is_predicated_off() -> None:
    code = RESIDUAL.replace("@P0 BRA absent", "").replace("LDG.E.128 R8", "@!P0 LDG.E.128 R8")
    for loads in (1, 2):
        units, path = first_path(code, Family("", "", loads, 1))
        assert units == 1 and path.count("LDG.E.128") == 2  # it is issued all the same


def test_loop_without_the_accesses_of_the_family_has_no_path() -> None:
    assert first_path(RESIDUAL, Family("", "", 3, 1)) == (0, [])


def test_accesses_of_an_edge_are_not_the_hot_path_though_they_are_shorter() -> None:
    code = """
    loop:
    @P0 BRA whole
    LDG.E.U16 R4, desc[UR4][R2.64]
    BRA stored
    whole:
    LDG.E.128 R4, desc[UR4][R2.64]
    FMUL R4, R4, R5
    STG.E.128 desc[UR4][R2.64], R4
    stored:
    BRA P1, skip
    LDG.E.128 R8, desc[UR4][R2.64]
    STG.E.128 desc[UR4][R2.64], R8
    skip:
    @P1 BRA loop
    EXIT
    """
    units, path = first_path(code)
    assert units == 2 and path.count("LDG.E.128") == 2 and "LDG.E.U16" not in path


def test_innermost_loop_is_the_hot_one_though_the_outer_one_has_more_accesses() -> None:
    code = """
    outer:
    LDG.E.128 R4, desc[UR4][R2.64]
    LDG.E.128 R8, desc[UR4][R2.64]
    STG.E.128 desc[UR4][R2.64], R4
    STG.E.128 desc[UR4][R2.64], R8
    inner:
    LDG.E.128 R4, desc[UR4][R2.64]
    FMUL R4, R4, R5
    STG.E.128 desc[UR4][R2.64], R4
    @P0 BRA inner
    @P1 BRA outer
    EXIT
    """
    assert first_path(code) == (1, ["LDG.E.128", "FMUL", "STG.E.128", "BRA"])


def test_operand_that_may_be_absent_is_no_unit_of_a_family_of_fewest() -> None:
    code = """
    loop:
    LDG.E.128 R4, desc[UR4][R2.64]
    @P0 BRA absent
    LDG.E.128 R8, desc[UR4][R12.64]
    absent:
    FADD R6, R6, R4
    @P1 BRA loop
    EXIT
    """
    reads = Family("", "", 1, 0)
    assert first_path(code, dataclasses.replace(reads, fewest=True))[0] == 1
    assert first_path(code, reads)[0] == 2


def test_slow_path_of_a_division_is_not_taken_though_it_is_shorter() -> None:
    code = """
    loop:
    LDG.E.128 R4, desc[UR4][R2.64]
    @P0 BRA fast
    CALL.REL.NOINC slow
    BRA done
    fast:
    FFMA R4, R4, R5, R6
    FFMA R4, R4, R5, R6
    FFMA R4, R4, R5, R6
    done:
    STG.E.128 desc[UR4][R2.64], R4
    @P1 BRA loop
    EXIT
    slow:
    RET.REL.NODEC R12 0x0
    """
    units, path = first_path(code)
    assert units == 1 and path.count("FFMA") == 3 and "CALL.REL.NOINC" not in path


def test_divergent_shuffle_is_not_taken() -> None:
    code = """
    loop:
    LDG.E.128 R4, desc[UR4][R2.64]
    BRA.DIV UR4, apart
    SHFL.IDX R4, R4, R5, 0x1f
    FMUL R4, R4, R5
    joined:
    STG.E.128 desc[UR4][R2.64], R4
    @P1 BRA loop
    EXIT
    apart:
    BRA joined
    """
    assert "SHFL.IDX" in first_path(code)[1]


ACTIVATIONS = """
loop:
LDG.E.128 R4, desc[UR4][R2.64]
LDC R16, c[0x2][R18]
BRX R16 -0x30
FMUL R4, R4, R5
@P3 BRA special
BRA store
special:
BRA store
FMNMX R4, RZ, R4, !PT
BRA store
MUFU.EX2 R4, R4
FADD R4, R4, R5
MUFU.RCP R4, R4
store:
STG.E.128 desc[UR4][R2.64], R4
@P1 BRA loop
EXIT
"""


def test_other_loop_within_the_loop_is_passed_once() -> None:
    code = """
    loop:
    LDG.E.128 R4, desc[UR4][R2.64]
    search:
    IADD3 R5, R5, 0x1, RZ
    @P2 BRA search
    STG.E.128 desc[UR4][R2.64], R4
    @P1 BRA loop
    EXIT
    """
    assert first_path(code) == (1, ["LDG.E.128", "IADD3", "BRA", "STG.E.128", "BRA"])


def test_loop_that_can_be_entered_past_its_header_is_not_hot() -> None:
    code = """
    @P0 BRA middle
    loop:
    LDG.E.128 R4, desc[UR4][R2.64]
    middle:
    STG.E.128 desc[UR4][R2.64], R4
    @P1 BRA loop
    EXIT
    """
    assert list(sass_model.hot_loops(body(code))) == []


def test_cheapest_case_of_a_switch_is_taken() -> None:
    path = ["LDG.E.128", "LDC", "BRX", "FMNMX", "BRA", "STG.E.128", "BRA"]
    assert first_path(ACTIVATIONS) == (1, path)


def test_work_that_others_may_leave_out_is_passed() -> None:
    assert "MUFU.EX2" in first_path(ACTIVATIONS, dataclasses.replace(STREAM, passes="^MUFU"))[1]
    assert first_path(ACTIVATIONS, dataclasses.replace(STREAM, passes="^POPC")) == (0, [])


def test_loop_within_the_loop_is_hot_itself() -> None:
    code = """
    chunk:
    LDG.E.128 R4, desc[UR4][R2.64]
    STG.E.128 desc[UR4][R2.64], R4
    inner:
    LD.E.128 R4, desc[UR4][R2.64]
    LD.E.128 R8, desc[UR4][R2.64]
    ST.E.128 desc[UR4][R2.64], R4
    ST.E.128 desc[UR4][R2.64], R4
    @P1 BRA inner
    @P2 BRA chunk
    EXIT
    """
    loops = list(sass_model.hot_loops(body(code)))
    assert [[blocks[k].body[0].opcode for k in own] for blocks, own, _ in loops] == [
        ["LD.E.128"],
        ["LDG.E.128", "BRA"],
    ]
    assert first_path(code) == (2, ["LD.E.128"] * 2 + ["ST.E.128"] * 2 + ["BRA"])


# ----------------------------------------------------------------- the rows

STEP = """
chunk:
@P0 EXIT
""" + "".join(
    f"""
{dtype}:
LDG.E.128 R4, desc[UR4][R2.64]
LDG.E.128 R8, desc[UR4][R2.64]
LDG.E.128 R12, desc[UR4][R2.64]
{convert}
STG.E.128 desc[UR4][R2.64], R4
STG.E.128 desc[UR4][R2.64], R8
@P1 BRA {dtype}
"""
    for dtype, convert in {
        "bf16": "F2FP.BF16.F32.PACK_AB R4, R4, R5\nIMAD.U32 R4, R4, 0x10000, RZ",
        "fp16": "HADD2.F32 R4, -RZ, R4.H0_H0\nHADD2.F32 R5, -RZ, R4.H1_H1\nFMUL R4, R4, R5",
        "fp32": "LOP3.LUT R4, R4, R5, RZ, 0xc0, !PT",
    }.items()
)


def test_loop_of_each_dtype_is_a_row() -> None:
    rows = sass_model.rows_of("step_kernel<Sgd, true, false>", body(STEP + "BRA chunk"), 62, 0)
    assert rows == {
        "step_kernel<Sgd, true, false> bf16": Row(
            "Sgd", "bf16", 8, 640, 8, 1, 62, 4, 3 * 16 * 256 * 4
        ),
        "step_kernel<Sgd, true, false> fp16": Row(
            "Sgd", "fp16", 8, 640, 9, 0, 62, 4, 3 * 16 * 256 * 4
        ),
        "step_kernel<Sgd, true, false> fp32": Row(
            "Sgd", "fp32", 4, 640, 7, 1, 62, 4, 3 * 16 * 256 * 4
        ),
    }


def test_loop_of_the_remainder_is_no_row() -> None:
    load = "LDG.E.128 R4, desc[UR4][R2.64]\n"
    code = f"last:\n{load}@P1 BRA last\nmain:\n{load * 2}@P1 BRA main\nEXIT"
    name = "batch_norm_statistics_kernel<Bf16, Plain>"
    (row,) = sass_model.rows_of(name, body(code), 40, 0).values()
    assert row.elements == 16 and row.instructions == 3


def test_mask_counts_a_bit_of_each_element() -> None:
    name = "batch_norm_apply_kernel<Bf16, 1, Plain{}>"
    bits_of = {
        mode: row.bits
        for mode in ("Relu", "Mask")
        for row in sass_model.rows_of(name.format(mode), body(RESIDUAL), 40, 0).values()
    }
    assert bits_of == {"Relu": 256, "Mask": 264}


@pytest.mark.parametrize(
    ("name", "accesses"),
    [
        ("batch_norm_statistics_kernel<Bf16, Plain>", (1, 0)),
        ("batch_norm_reduce_kernel<float, 2, PlainMask>", (3, 0)),
        ("batch_norm_apply_grad_kernel<F16, 2, PlainRelu>", (3, 2)),
        ("step_kernel<Adam, true, false>", (4, 3)),
        ("step_kernel<Adam, true, true>", (5, 4)),
        ("measure_kernel<false>", (1, 0)),
        ("dropout_kernel<Bf16, (DropoutStep)1, false>", (2, 1)),
        ("batch_norm_apply_kernel<double, 1, PlainRelu>", None),
        ("batch_norm_apply_kernel<Bf16, 1, Curved>", None),
        ("device_step_kernel<Adam, true, false>", None),
        ("step_kernel<Adam, false, true>", None),
        ("dropout_kernel<Bf16, (DropoutStep)0, true>", None),
    ],
)
def test_hot_kernels_are_told_by_their_names(name: str, accesses: tuple[int, int] | None) -> None:
    known = sass_model.family_of(name)
    assert (known and (known[0].loads, known[0].stores)) == accesses


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [(32, 0, 8), (33, 0, 6), (65, 0, 3), (128, 0, 2), (16, 0, 8), (32, 28 * 1024, 7)],
)
def test_resident_blocks(registers: int, shared: int, blocks: int) -> None:
    assert sass_model.resident_blocks(registers, shared) == blocks


def test_figures_against_the_copy() -> None:
    row = Row("", "bf16", 8, 256, 160, 80, 64, 4, 65536)
    # 20 instructions for 4 bytes, at 4.3e12 bytes a second and 132 x 4 x 32 of them a cycle.
    assert row.need_issue == pytest.approx(20 * 4.3e12 / 4 / (132 * 4 * 32 * 1.98e9))
    assert row.need_alu == pytest.approx(row.need_issue)  # half of them, at half the rate


# ----------------------------------------------------------------- the limits

LIMITS = {
    "need_issue": 0.6,
    "need_alu": 0.6,
    "in_flight": 26 * 1024,
    "issue": 1,
    "issue_prologue": 1,
}
GOOD = Row("", "bf16", 8, 256, 100, 50, 64, 4, 65536)


def broken(row: Row, **excused: str) -> list[str]:
    return sass_model.broken_limits({"k": row}, LIMITS, excused)


def test_row_within_the_limits_passes() -> None:
    assert broken(GOOD) == []


@pytest.mark.parametrize(
    ("figure", "change"),
    [
        ("need_issue 0.64 > 0.60", {"instructions": 160}),
        ("need_alu 0.64 > 0.60", {"alu": 80}),
        ("in_flight 24576 < 26624", {"in_flight": 24 * 1024}),
    ],
)
def test_each_limit_is_noticed_and_can_be_excused(figure: str, change: dict[str, int]) -> None:
    bad = dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]
    assert broken(bad) == [f"k: {figure}"]
    assert broken(bad, k="it is rare") == []


def test_excuse_needs_a_reason() -> None:
    bad = dataclasses.replace(GOOD, alu=80)
    assert broken(bad, k=" ") == ["k is excused without a reason"]


def test_excuse_that_is_not_needed_is_refused() -> None:
    assert broken(GOOD, k="it is rare") == ["k is excused, and needs no excuse"]
    assert broken(GOOD, gone="it is rare") == ["gone is excused, and needs no excuse"]


def test_difference_of_a_row_and_of_the_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_gates, "PAGE", tmp_path / "page.md")
    rows = {"k": GOOD}
    ratchet = cuda_gates.Ratchet(limits=LIMITS, model=cuda_gates.pinned(rows))
    cuda_gates.PAGE.write_text(cuda_gates.page(ratchet, rows, {}))
    assert cuda_gates.problems_and_changes(ratchet, {}, rows, {}) == ([], [])
    rows = {"k": dataclasses.replace(GOOD, instructions=99)}
    assert cuda_gates.problems_and_changes(ratchet, {}, rows, {})[1] == [
        "k on sm_90: instructions 100 -> 99",
        "page.md is not made of these figures",
    ]
    cuda_gates.PAGE.unlink()
    assert "page.md" in cuda_gates.problems_and_changes(ratchet, {}, rows, {})[1][-1]


def test_page_has_the_rows_and_the_excuses() -> None:
    bad = dataclasses.replace(GOOD, alu=80, mode="scale")
    page = sass_model.document({"k": bad}, LIMITS, {"k": "it is rare"}, "make it")
    assert "| `k` | scale | bf16 | 4.00 | 12.50 | 10.00 | 0.40 | 0.64 | 64 | 4 | 64 |" in page
    assert "- `k`: it is rare" in page and "`make it`" in page
