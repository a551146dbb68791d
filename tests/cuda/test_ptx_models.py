"""The PTX wrappers of csrc/cuda/ptx.cuh: their models on the CPU, in a GEMM that uses them all.

The layouts follow the PTX ISA; test_on_gpu confirms them where there is a GPU and nvcc.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import emulator_build as build
import pytest

KERNELS = build.EMULATOR / "kernels"
SOURCE = KERNELS / "gemm.cu"
SCHEDULES = [
    {"BRAZE_EMULATOR_ORDER": order, "BRAZE_EMULATOR_SEED": str(seed)}
    for order, seeds in (("inorder", 1), ("reverse", 1), ("random", 3), ("pct", 5))
    for seed in range(seeds)
]
PCT = [schedule for schedule in SCHEDULES if schedule["BRAZE_EMULATOR_ORDER"] == "pct"]

of_the_emulator = pytest.mark.cpu_only("is about the emulator")


def program(variant: str) -> Path:
    if (reason := build.have(variant)) is not None:
        pytest.skip(reason)
    return build.build_program("gemm", [SOURCE], variant, include=[KERNELS])


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    return found


@of_the_emulator
@pytest.mark.parametrize("variant", ["native", "asan"])
def test_gemm(variant: str) -> None:
    for schedule in SCHEDULES if variant == "native" else PCT[:1]:
        done = build.run(program(variant), env=schedule)
        assert done.returncode == 0, f"{schedule}: {done.stdout}{done.stderr}"


@of_the_emulator
def test_gemm_has_no_races() -> None:
    done = build.run(program("tsan"))
    assert done.returncode == 0 and "data race" not in done.stderr, done.stderr


@of_the_emulator
@pytest.mark.parametrize("fault", ["no_wait", "no_zeros"])
def test_fault_is_found(fault: str) -> None:
    for schedule in SCHEDULES:
        done = build.run(program("native"), [fault], schedule)
        assert done.returncode != 0 and done.stdout.count("WRONG") == 2, schedule


def barrier_lines() -> list[int]:
    """The kernel's barriers: after the wait, and trailing."""
    lines = (KERNELS / "gemm.cuh").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "gemm_kernel(" in line)
    found = [i + 1 for i, line in enumerate(lines) if "__syncthreads();" in line and i > start]
    return found[:2]


def found_by_pct(site: str) -> list[bool]:
    runs = [
        build.run(program("native"), env={**schedule, "BRAZE_EMULATOR_DROP_BARRIER": site})
        for schedule in PCT
    ]
    return [done.returncode != 0 and "WRONG" in done.stdout for done in runs]


@of_the_emulator
@pytest.mark.parametrize("which", ["after the wait", "trailing"])
def test_missing_barrier_is_a_race(which: str) -> None:
    site = f"gemm.cuh:{barrier_lines()[which == 'trailing']}"
    done = build.run(program("tsan"), env={"BRAZE_EMULATOR_DROP_BARRIER": site})
    assert "data race" in done.stderr, f"TSan is silent about {site}"


@of_the_emulator
@pytest.mark.parametrize("which", ["after the wait", "trailing"])
def test_missing_barrier_is_found(which: str) -> None:
    assert all(found_by_pct(f"gemm.cuh:{barrier_lines()[which == 'trailing']}"))


def inputs() -> list[float]:
    """What gemm.cu's patterns are made of."""
    seed, values = 3, []
    for _ in range(512):
        seed = (seed * 1664525 + 1013904223) % 2**32
        values.append(((seed >> 24) - 128.0) / 8)
    return values


def bits_of(value: float, dtype: str) -> int:
    """Rounded to nearest, ties to even."""
    if dtype == "f16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def expected_patterns(dtype: str) -> list[str]:
    """What the PTX ISA says each lane receives, from whole matrices and not from the models."""
    values = inputs()
    # Lane 8 i + r names row r of matrix i.
    stored = [[values[64 * i + 8 * r : 64 * i + 8 * r + 8] for r in range(8)] for i in range(8)]
    for i in range(0, 8, 2):
        stored[i][5] = [0.0] * 8
    plain = stored[:4]
    turned = [[list(row) for row in zip(*matrix, strict=True)] for matrix in stored[4:]]

    # a: registers 0..3 are the quarters at (0, 0), (8, 0), (0, 8), (8, 8); b: at (0, 0), (8, 0),
    # each lane holding two consecutive rows of one column.
    a = [[0.0] * 16 for _ in range(16)]
    b = [[0.0] * 8 for _ in range(16)]
    for row in range(8):
        for column in range(8):
            for i in range(4):
                a[row + 8 * (i % 2)][column + 8 * (i // 2)] = plain[i][row][column]
            for i in range(2):
                b[column + 8 * i][row] = turned[i][row][column]
    out = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        for matrices in (plain, turned):
            for m in matrices:
                low, high = (bits_of(m[g][2 * t + half], dtype) for half in range(2))
                out.append(low | high << 16)
        totals = []
        for i in range(4):
            row, column = g + 8 * (i // 2), 2 * t + i % 2
            totals.append(1.0 + i + sum(a[row][k] * b[k][column] for k in range(16)))
            out.append(struct.unpack("<I", struct.pack("<f", totals[i]))[0])
        positive = [bits_of(max(total, 0.0), dtype) for total in totals]
        out += [positive[0] | positive[1] << 16, positive[2] | positive[3] << 16]
    return [f"{word:08x}" for word in out]


@of_the_emulator
def test_patterns() -> None:
    done = build.run(program("native"), ["patterns"])
    assert done.stdout.split() == expected_patterns("bf16") + expected_patterns("f16")


@of_the_emulator
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc(architecture: str, tmp_path: Path) -> None:
    """nvcc makes of each wrapper the instruction it is named after."""
    ptx = tmp_path / "gemm.ptx"
    command = [nvcc(), "-std=c++20", f"-arch={architecture}", "-Werror", "all-warnings"]
    command += ["-I", str(build.ROOT / "csrc"), "-I", str(KERNELS)]
    for output in (["-ptx", "-o", str(ptx)], ["-cubin", "-o", str(tmp_path / "gemm.cubin")]):
        done = subprocess.run([*command, *output, str(SOURCE)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    text = ptx.read_text()
    for instruction in (
        r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16;",
        r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;",
        r"cp\.async\.commit_group",
        r"cp\.async\.wait_group 1",
        r"st\.shared\.v4\.b32",
        r"cvt\.rn\.relu\.bf16x2\.f32",
        r"cvt\.rn\.relu\.f16x2\.f32",
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16",
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
    ):
        assert re.search(instruction, text), f"no {instruction} in nvcc's PTX"


@of_the_emulator
def test_no_asm_elsewhere() -> None:
    files = [
        p for p in (build.ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")
    ]
    found = [p.name for p in files if re.search(r"\basm\s+(volatile\s*)?\(|\basm\(", p.read_text())]
    assert found == ["ptx.cuh"]


@pytest.mark.fake_lacks("is no GPU")
def test_on_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU to confirm the layouts on")
    target = tmp_path / "gemm"
    command = [nvcc(), "-std=c++20", "-arch=native", "-I", str(build.ROOT / "csrc")]
    command += ["-I", str(KERNELS), "-o", str(target), str(SOURCE)]
    subprocess.run(command, check=True)
    assert subprocess.run([str(target)]).returncode == 0
    patterns = subprocess.run([str(target), "patterns"], capture_output=True, text=True, check=True)
    assert patterns.stdout.split() == expected_patterns("bf16") + expected_patterns("f16")
