"""How many instructions the CPU kernels take for an element, as callgrind counts them."""

from __future__ import annotations

import cpu_gates
import pytest

pytestmark = [
    pytest.mark.cpu_only("is about the CPU's kernels"),
    pytest.mark.slow("compiles the CPU kernels again, and counts under valgrind"),
]


@pytest.fixture(scope="module")
def figures() -> cpu_gates.Figures:
    if reason := cpu_gates.why_not():
        pytest.skip(reason)
    return cpu_gates.measure_all(cpu_gates.compile_driver())


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
