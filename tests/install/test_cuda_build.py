"""The CUDA side compiles for every architecture, and what nvcc made of it is pinned. No GPU needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cuda_gates
import pytest
import sass_model

pytestmark = [
    pytest.mark.cpu_only("is about the build"),
    pytest.mark.slow("compiles for four architectures"),
]

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}
Commands = list[dict[str, str]]

# Clean as it stands; each seeded bug below is one replacement in it.
KERNEL = """
#include "device.cuh"
__global__ void __launch_bounds__(256) seeded_kernel(float* data, long long count, int shift) {
  const long long i = (blockIdx.x * 256ll + threadIdx.x) * 4;
  if (i + 4 > count) return;
  uint4 raw = braze::cuda::load16(data + i);
  raw.x += shift;
  __stwb(reinterpret_cast<uint4*>(data + i), raw);
}
"""
# 200 values that live across a barrier, in the 32 registers that 2048 threads leave each.
SPILL = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* data) {
  float value[200];
#pragma unroll
  for (int j = 0; j < 200; ++j) value[j] = data[j * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 200; ++j) data[j * 1024 + threadIdx.x] = value[j] * value[199 - j];
}
"""


@pytest.fixture(scope="module")
def commands() -> Commands:
    if reason := cuda_gates.no_nvcc():
        pytest.skip(reason)
    return cuda_gates.compile_objects()


@pytest.fixture(scope="module")
def kernels(commands: Commands) -> cuda_gates.Kernels:
    return cuda_gates.measure(cuda_gates.cuda_objects(commands))


def compile_seeded(commands: Commands, folder: Path, text: str) -> tuple[int, str]:
    (folder / "seeded.cu").write_text(text)
    return cuda_gates.compile_one(commands, folder / "seeded.cu", folder / "seeded.o")


def measure_seeded(commands: Commands, folder: Path, text: str) -> cuda_gates.Kernels:
    status, output = compile_seeded(commands, folder, text)
    assert status == 0, output
    return cuda_gates.measure([folder / "seeded.o"])


def test_every_source_is_compiled(commands: Commands) -> None:
    sources = {*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/ops/*_cuda.cpp")}
    assert sources and {Path(c["file"]) for c in commands} == sources
    assert all(Path(c["directory"], c["output"]).exists() for c in commands)


def test_every_architecture_is_in_the_objects(
    commands: Commands, kernels: cuda_gates.Kernels
) -> None:
    assert kernels and all(by_arch.keys() == ARCHITECTURES for by_arch in kernels.values())
    cuobjdump = str(cuda_gates.tool("cuobjdump"))
    for file in cuda_gates.cuda_objects(commands):
        dump = subprocess.run([cuobjdump, "-lptx", str(file)], capture_output=True, text=True)
        assert re.findall(r"sm_\d+", dump.stdout) == ["sm_80"]  # what unlisted GPUs compile from


def test_same_bits_as_the_cpu_is_asked_for(commands: Commands) -> None:
    for command in commands:
        flag = "-fmad=false" if command["file"].endswith(".cu") else "-ffp-contract=off"
        assert flag in command["command"].split() and "fast" not in command["command"]
        assert "-std=c++20" in command["command"] and "-Werror" in command["command"]


def test_figures_are_pinned(commands: Commands, kernels: cuda_gates.Kernels) -> None:
    ratchet = cuda_gates.read_ratchet()
    if cuda_gates.nvcc_version() != ratchet.nvcc:
        pytest.skip(f"pinned with nvcc {ratchet.nvcc}, this is {cuda_gates.nvcc_version()}")
    rows = cuda_gates.hot_rows(cuda_gates.cuda_objects(commands), kernels)
    problems, changes = cuda_gates.problems_and_changes(ratchet, kernels, *rows)
    assert not problems + changes, "\n".join(
        [*problems, *changes, f"if this is meant: {cuda_gates.PIN}"]
    )


def test_every_family_of_hot_kernels_is_there(kernels: cuda_gates.Kernels) -> None:
    matched = {known[0] for name in kernels if (known := sass_model.family_of(name))}
    assert matched == set(sass_model.FAMILIES)


# ------------------------------------------- positive controls: seeded bugs


def test_clean_kernel_passes(commands: Commands, tmp_path: Path) -> None:
    kernels = measure_seeded(commands, tmp_path, KERNEL)
    assert kernels.keys() == {"seeded_kernel"}
    assert kernels["seeded_kernel"].keys() == ARCHITECTURES
    assert cuda_gates.broken_rules(kernels, []) == []


def test_spill_fails_the_build(commands: Commands, tmp_path: Path) -> None:
    status, output = compile_seeded(commands, tmp_path, KERNEL + SPILL)
    assert status != 0 and re.search("spill", output, re.IGNORECASE), output
    assert "spilling_kernel" in output


def test_warning_fails_the_build(commands: Commands, tmp_path: Path) -> None:
    for unused in ("void host() { int unused; }", "__global__ void k() { int unused; }"):
        status, output = compile_seeded(commands, tmp_path, KERNEL + unused)
        assert status != 0 and "unused" in output


def test_scalar_kernel_is_reported(commands: Commands, tmp_path: Path) -> None:
    scalar = KERNEL.replace(
        "uint4 raw = braze::cuda::load16(data + i);", "struct { float x; } raw = {data[i]};"
    ).replace("__stwb(reinterpret_cast<uint4*>(data + i), raw)", "data[i] = raw.x")
    kernels = measure_seeded(commands, tmp_path, scalar)
    problems = cuda_gates.broken_rules(kernels, [])
    assert len(problems) == len(ARCHITECTURES)
    assert "seeded_kernel on sm_80: 0 128-bit loads and 0 stores" in "".join(problems)
    assert cuda_gates.broken_rules(kernels, ["seeded_kernel"]) == []


def test_array_in_local_memory_is_reported(commands: Commands, tmp_path: Path) -> None:
    local = KERNEL.replace(
        "raw.x += shift;",
        "unsigned t[16]; for (int j = 0; j < 16; ++j) t[(j * shift) & 15] = raw.x + j;"
        " raw.x = t[shift & 15];",
    )
    problems = cuda_gates.broken_rules(measure_seeded(commands, tmp_path, local), [])
    assert len(problems) == len(ARCHITECTURES) and "bytes of stack" in problems[0]


def test_ratchet_fails_in_both_directions() -> None:
    def one(registers: int) -> cuda_gates.Kernels:
        values = (registers, 0, 1024, 0, 4, 3)
        return {"k": {"sm_90": dict(zip(cuda_gates.FIGURES, values, strict=True))}}

    assert cuda_gates.differences(one(38), one(38)) == []
    assert cuda_gates.differences(one(38), one(40)) == ["k on sm_90: registers 38 -> 40"]
    assert cuda_gates.differences(one(38), one(32)) == ["k on sm_90: registers 38 -> 32"]
    assert cuda_gates.differences({}, one(38)) == ["k: new, not pinned"]
    assert cuda_gates.differences(one(38), {}) == ["k: gone"]


def test_split_accesses_are_reported() -> None:
    def on(arch: str, stores: int) -> dict[str, dict[str, int]]:
        return {arch: dict(zip(cuda_gates.FIGURES, (38, 0, 0, 0, 10, stores), strict=True))}

    assert cuda_gates.broken_rules({"k": {**on("sm_80", 9), **on("sm_90", 10)}}, []) == []
    (problem,) = cuda_gates.broken_rules({"k": {**on("sm_80", 3), **on("sm_90", 10)}}, [])
    assert "k: stores128 {'sm_80': 3, 'sm_90': 10}" in problem


def test_ratchet_survives_a_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratchet = cuda_gates.read_ratchet()
    text = cuda_gates.RATCHET.read_text()
    monkeypatch.setattr(cuda_gates, "RATCHET", tmp_path / "ratchet.json")
    cuda_gates.write_ratchet(ratchet)
    assert cuda_gates.RATCHET.read_text() == text


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void braze::cuda::step<float>(braze::cuda::Args)", "step<float>"),
        ("void braze::cuda::step<braze::Adam, (bool)1>(Args, int)", "step<Adam, (bool)1>"),
        ("(anonymous namespace)::finish(float*)", "finish"),
    ],
)
def test_short_names(demangled: str, name: str) -> None:
    assert cuda_gates.short(demangled) == name


# ------------------------------------------------------- CMake's own errors


def configure(folder: Path, torch_cuda: str, *options: str, home: str = "") -> str:
    """The errors of configuring against a torch that has only a version."""
    torch = folder / "packages" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {torch_cuda or None!r}\n")
    run = subprocess.run(
        [
            "cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", *options,
        ],
        capture_output=True,
        text=True,
        env={**cuda_gates.tools_first(), "PYTHONPATH": str(torch.parent), "CUDA_HOME": home},
    )  # fmt: skip
    assert run.returncode != 0
    return " ".join(run.stderr.split())


def test_cuda_torch_without_nvcc_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    text = configure(tmp_path, "13.0", home="/nowhere")
    assert "CUDA_HOME=/nowhere does not lead to a working CUDA compiler" in text
    assert "pip install --no-build-isolation -C cmake.define.BRAZE_CUDA=OFF ." in text


def test_other_cuda_major_is_an_error_with_both_versions(tmp_path: Path) -> None:
    if reason := cuda_gates.no_nvcc():
        pytest.skip(reason)
    text = configure(tmp_path, "99.1")
    release = cuda_gates.nvcc_version().rpartition(".")[0]
    assert "torch was built for CUDA 99.1" in text and f"found is {release}" in text


def test_option_must_be_known(tmp_path: Path) -> None:
    text = configure(tmp_path, "", "-DBRAZE_CUDA=maybe")
    assert "BRAZE_CUDA is 'maybe'; it must be AUTO, ON or OFF" in text
