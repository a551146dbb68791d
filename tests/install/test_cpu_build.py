"""The CPU kernels without torch: their bits in every instruction set and on aarch64, what their objects
share, and how many instructions they take for an element, as callgrind counts them."""

from __future__ import annotations

from pathlib import Path

import cpu_gates
import pytest

pytestmark = [
    pytest.mark.cpu_only("is about the CPU's kernels"),
    pytest.mark.slow("compiles the CPU kernels again, runs them under valgrind and qemu"),
]


Commands = list[dict[str, str]]
QEMU = "qemu-aarch64-static"


@pytest.fixture(scope="module")
def commands() -> Commands:
    if reason := cpu_gates.why_not():
        pytest.skip(reason)
    return cpu_gates.compile_objects()


@pytest.fixture(scope="module")
def driver(commands: Commands) -> Path:
    return cpu_gates.compile_driver(commands)


@pytest.fixture(scope="module")
def figures(driver: Path) -> cpu_gates.Figures:
    if reason := cpu_gates.why_not("valgrind"):
        pytest.skip(reason)
    return cpu_gates.measure_all(driver)


@pytest.fixture(scope="module")
def baseline(driver: Path) -> dict[str, str]:
    return cpu_gates.bits([str(driver), "baseline"])


def test_every_instruction_set_gives_the_same_bits(driver: Path, baseline: dict[str, str]) -> None:
    for name in cpu_gates.sets_of(driver):
        other = cpu_gates.bits([str(driver), name])
        assert [key for key in baseline if other[key] != baseline[key]] == [], name


def test_aarch64_gives_the_same_bits(
    commands: Commands, baseline: dict[str, str], tmp_path: Path
) -> None:
    if reason := cpu_gates.why_not(cpu_gates.CROSS, QEMU):
        pytest.skip(reason)
    program = cpu_gates.compile_driver_for_arm(commands, tmp_path)
    other = cpu_gates.bits([QEMU, str(program), "baseline"])
    assert [key for key in baseline if other[key] != baseline[key]] == []


def test_one_changed_bit_is_noticed(driver: Path, baseline: dict[str, str]) -> None:
    other = cpu_gates.bits([str(driver), "baseline"], flipped=1)
    assert len(baseline) > 1000 and baseline.keys() == other.keys()
    assert [key for key in baseline if other[key] == baseline[key]] == []


def test_objects_of_a_set_share_no_functions(commands: Commands) -> None:
    checked = 0
    for command in commands:
        folder = next((p for p in command["output"].split("/") if p.startswith("kernels_")), "")
        name = folder.removeprefix("kernels_").removesuffix(".dir")
        if name in ("", "baseline"):
            continue
        checked += 1
        assert cpu_gates.shared_symbols(command["output"], name) == [], command["output"]
    assert checked > 3


def test_a_shared_function_is_noticed(commands: Commands, tmp_path: Path) -> None:
    source, output = tmp_path / "shared.cpp", str(tmp_path / "shared.o")
    source.write_text("""
#include "cpu/set_begin.h"
[[gnu::noinline]] inline float shared(float a) { return a + 1; }
namespace braze::cpu::BRAZE_SET {
[[gnu::noinline]] inline float own(float a) { return a + 2; }
float used(std::vector<float>& a) { return a.emplace_back(shared(own(a.at(0)))); }
}
#include "cpu/set_end.h"
""")
    like = next(c for c in commands if "/kernels_avx2.dir/" in c["output"])
    flags = [*cpu_gates.flags_of(like), f"-I{cpu_gates.ROOT / 'csrc'}"]
    cpu_gates._run([*flags, "-c", str(source), "-o", output])
    assert cpu_gates.shared_symbols(output, "avx2") == ["_Z6sharedf"]


def test_figures_are_pinned(figures: cpu_gates.Figures) -> None:
    compiler, pinned = cpu_gates.read_ratchet()
    if cpu_gates.compiler() != compiler:
        pytest.skip(f"pinned with {compiler}, this is {cpu_gates.compiler()}")
    kernels = {name: row for name, row in figures.items() if name != cpu_gates.CONTROL}
    problems = cpu_gates.differences(pinned, kernels)
    assert not problems, "\n".join([*problems, f"if this is meant: {cpu_gates.PIN}"])


def test_a_scalar_loop_is_noticed(figures: cpu_gates.Figures) -> None:
    vector, scalar = {"sgd fp32": figures["sgd fp32"]}, {"sgd fp32": figures[cpu_gates.CONTROL]}
    assert cpu_gates.differences(vector, vector) == []
    (problem,) = cpu_gates.differences(vector, scalar)  # baseline's fma is a call
    assert problem.startswith("sgd fp32, avx2: ")


def test_more_instructions_and_other_kernels_are_told() -> None:
    pinned = {"a": {"avx2": 2.0}, "b": {"avx2": 1.0}}
    present = {"a": {"avx2": 2.19}, "b": {"avx2": 1.11}}
    assert cpu_gates.differences(pinned, present) == [
        "b, avx2: 1.0 instructions an element -> 1.11"
    ]
    del present["a"], pinned["b"]
    assert cpu_gates.differences(pinned, present) == ["a: gone", "b: new, not pinned"]
