"""The CUDA emulator itself: language, rules and runtime, under every schedule and compiler."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import emulator_build
import pytest

pytestmark = pytest.mark.cpu_only("is about the emulator")

CONTROLS = emulator_build.EMULATOR / "controls"
ORDERS = ("inorder", "reverse", "random", "pct")


def built(name: str, variant: str, **options: list[str]) -> Path:
    if (reason := emulator_build.have(variant)) is not None:
        pytest.skip(reason)
    return emulator_build.build_program(name, [CONTROLS / f"{name}.cu"], variant, **options)


def check(program: Path, environment: dict[str, str]) -> None:
    done = emulator_build.run(program, env=environment)
    assert done.returncode == 0, f"{environment}: {done.stdout}\n{done.stderr}"
    # Not a program that stopped early.
    assert ", 0 failed" in done.stdout and not done.stdout.startswith("0 checks"), done.stdout


@pytest.mark.parametrize("variant", ["native", "clang", "asan", "aarch64"])
@pytest.mark.parametrize("name", ["language", "rules", "runtime"])
def test_every_order(name: str, variant: str) -> None:
    program = built(name, variant)
    for order in ORDERS:
        for seed in ("1", "2") if order in ("random", "pct") else ("0",):
            check(program, {"BRAZE_EMULATOR_ORDER": order, "BRAZE_EMULATOR_SEED": seed})


def test_preemption_at_atomics() -> None:
    program = built("language", "native")
    for order in ORDERS:
        check(program, {"BRAZE_EMULATOR_ORDER": order, "BRAZE_EMULATOR_YIELD": "0.3"})


@pytest.mark.parametrize("mode", ["A", "B"])
def test_no_false_race(mode: str) -> None:
    program = built("language", "tsan")
    for order in ("inorder", "pct"):
        check(program, {"BRAZE_EMULATOR_ORDER": order, "BRAZE_EMULATOR_TSAN_MODE": mode})


def test_toolkit_headers() -> None:
    """cuda_bf16.h, cuda_fp16.h and cuda_fp8.h compile on top of the emulator."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    toolkit = next(
        (Path(h) for h in homes if h and (Path(h) / "include/cuda_fp8.h").exists()), None
    )
    if toolkit is None:
        pytest.skip("no CUDA toolkit: neither CUDA_HOME nor /usr/local/cuda has include/cuda_fp8.h")
    system = [f"-isystem{toolkit}/include", f"-isystem{toolkit}/include/cccl"]
    check(built("toolkit", "native", flags=system), {})


def test_parameter_limit() -> None:
    with pytest.raises(RuntimeError, match="32,764 bytes"):
        built("large_parameter", "native")


def test_unknown_order_is_refused() -> None:
    done = emulator_build.run(built("language", "native"), env={"BRAZE_EMULATOR_ORDER": "chaos"})
    assert done.returncode == 2
    assert (
        'BRAZE_EMULATOR_ORDER is "chaos"; it may be inorder, reverse, random or pct' in done.stderr
    )


PROBE = """
#include "part.h"
#include "cuda/device.cuh"
__global__ void kernel(int* out) { *out = PART; }
int main() {
  int out = 0;
  BRAZE_LAUNCH(kernel, 1, 1, 0, nullptr, &out);
  return out;
}
"""


def write_probe(folder: Path, value: int) -> Path:
    (folder / "part.h").write_text(f"#define PART {value}\n")
    source = folder / "probe.cu"
    source.write_text(PROBE)
    return source


def test_rebuilt_when_a_header_changes(tmp_path: Path) -> None:
    source = write_probe(tmp_path, 3)
    first = emulator_build.build_program("probe", [source], "native")
    assert emulator_build.run(first).returncode == 3
    changed = first.stat().st_mtime_ns
    assert emulator_build.build_program("probe", [source], "native") == first
    assert first.stat().st_mtime_ns == changed
    write_probe(tmp_path, 4)
    second = emulator_build.build_program("probe", [source], "native")
    assert emulator_build.run(second).returncode == 4


def build_and_run(folder: str, queue: multiprocessing.Queue[int]) -> None:
    program = emulator_build.build_program("together", [Path(folder) / "probe.cu"], "native")
    queue.put(emulator_build.run(program).returncode)


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    write_probe(tmp_path, 5)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[int] = context.Queue()
    processes = [
        context.Process(target=build_and_run, args=(str(tmp_path), queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [queue.get(timeout=120) for _ in processes] == [5, 5]
    for process in processes:
        process.join()


def test_compile_error_is_shown(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text('#include "cuda/device.cuh"\nint main() { return undeclared; }\n')
    with pytest.raises(RuntimeError, match=r"compiling wrong.cu failed(.|\n)*undeclared"):
        emulator_build.build_program("wrong", [source], "native")


def test_library(tmp_path: Path) -> None:
    """A shared library with the emulator inside, called through its C functions."""
    source = tmp_path / "twice.cu"
    source.write_text("""
#include "cuda/device.cuh"
__global__ void twice(int* values) { values[threadIdx.x] *= 2; }
extern "C" int run_twice(int* values, int count) {
  return BRAZE_LAUNCH(twice, 1, count, 0, nullptr, values);
}
""")
    script = (
        "import ctypes, sys; values = (ctypes.c_int * 40)(*range(40));"
        "assert ctypes.CDLL(sys.argv[1]).run_twice(values, 40) == 0;"
        "assert list(values) == [2 * i for i in range(40)]; print('right')"
    )
    library = emulator_build.build_library("twice", [source], "native")
    done = subprocess.run(
        [sys.executable, "-c", script, str(library)], capture_output=True, text=True
    )
    assert done.stdout == "right\n", done.stderr
