"""The build, the guard at import, the command line, and the rules of the source tree."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import braze
import pytest
import torch
from braze import _native
from braze.__main__ import main

pytestmark = pytest.mark.cpu_only("is about the build")

Guard = Callable[..., "tuple[Path | None, str]"]

ROOT = Path(__file__).parents[2]
CXX = [p for p in sorted(ROOT.glob("csrc/**/*")) if p.suffix in {".h", ".cpp", ".cuh", ".cu"}]


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guard:
    """What the guard says to a torch in a package that has bindings for the torches of the given Pythons."""

    def say(running: str, *bindings: str) -> tuple[Path | None, str]:
        for binding in bindings:
            torch_minor, python = binding.split("@")
            (tmp_path / f"_C.torch{torch_minor}.cpython-{python}-x86_64-linux-gnu.so").touch()
        monkeypatch.setattr(_native, "PACKAGE", tmp_path)
        monkeypatch.setattr(_native, "SUFFIX", ".cpython-311-x86_64-linux-gnu.so")
        monkeypatch.setattr(_native, "PYTHON", "3.11")
        monkeypatch.setattr(torch, "__version__", running)
        return _native.packaged("_C")

    return say


def test_guard_accepts_the_same_minor(guard: Guard, tmp_path: Path) -> None:
    file = tmp_path / "_C.torch2.13.cpython-311-x86_64-linux-gnu.so"
    assert guard("2.13.1+cu130", "2.13@311", "2.1@311", "2.13@310") == (file, "")


@pytest.mark.parametrize("running", ["2.12.1", "2.14.0+cu130", "3.13.0", "2.1.0", "2.131.0"])
def test_guard_refuses_another_minor_with_the_command_that_fixes_it(
    running: str, guard: Guard
) -> None:
    file, text = guard(running, "2.13@311")
    assert file is None and text.startswith("braze was built against torch 2.13 (Python 3.11), but")
    assert running in text and "pip install 'torch==2.13.*'" in text
    assert _native.BUILD in text and text.endswith(_native.REBUILD)
    assert "\n" not in text


def test_guard_lists_what_a_wheel_for_several_has(guard: Guard) -> None:
    file, text = guard("2.12.0", "2.11@310", "2.11@311", "2.13@310", "2.13@311", "2.14@313t")
    assert file is None
    assert (
        "torch 2.11 (Python 3.10, 3.11), 2.13 (Python 3.10, 3.11), 2.14 (Python 3.13t), but" in text
    )
    assert "(pip install 'torch==2.13.*')" in text  # the newest for this Python


def test_guard_offers_no_torch_to_a_python_that_is_not_there(guard: Guard) -> None:
    file, text = guard("2.13.0", "2.13@310")
    assert file is None and "torch 2.13 (Python 3.10), but" in text
    assert (
        "pip install 'torch" not in text
        and f"Either compile what is missing ({_native.BUILD})" in text
    )


def test_import_against_another_minor_fails_before_the_extension_loads() -> None:
    code = "import torch; torch.__version__ = '2.1.0'; import braze"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode != 0
    assert "ImportError: braze was built against torch" in run.stderr


def test_source_folder_without_a_build_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "braze").symlink_to(ROOT / "python" / "braze")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import braze"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode != 0
    assert "was never built" in run.stderr and _native.REBUILD in run.stderr


def test_built_for_this_torch() -> None:
    assert _native.minor(_native._C.TORCH_VERSION) == _native.minor(torch.__version__)
    import braze._C

    assert braze._C is _native._C is sys.modules["braze._C"]


def test_stub_names_what_the_extension_has() -> None:
    stub = ast.parse((ROOT / "python/braze/_C.pyi").read_text())
    names = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    names |= {ast.unparse(n.target) for n in stub.body if isinstance(n, ast.AnnAssign)}
    names.remove("__getattr__")  # stands for the operators, whose schemas are torch.ops'
    bound = {n for n in dir(_native._C) if not n.startswith("_")}
    assert names <= bound
    assert {n for n in bound if hasattr(torch.ops.braze, n)} == bound - names
    plan = next(n for n in stub.body if isinstance(n, ast.ClassDef))
    methods = {n.name for n in plan.body if isinstance(n, ast.FunctionDef)} - {"__init__"}
    assert methods == {n for n in dir(_native._C.StepPlan) if not n.startswith("_")}


def test_one_openmp_runtime() -> None:
    """torch's own libgomp, or torch.set_num_threads would not govern our regions."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    code = "import braze; print(open('/proc/self/maps').read())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert len(set(re.findall(r"\S*libgomp\S*", run.stdout))) == 1


SETS = _native._C.available_instruction_sets()


def info_where(asked: str) -> subprocess.CompletedProcess[str]:
    """``python -m braze info`` where BRAZE_CPU_CAPABILITY is ``asked``."""
    environment = {**os.environ, "BRAZE_CPU_CAPABILITY": asked, "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-m", "braze", "info"]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)


def test_runs_on_the_best_instruction_set_available() -> None:
    out = info_where("").stdout
    assert SETS[0] == "baseline"
    assert f"instruction set  {SETS[-1]} (available: {', '.join(SETS)}); torch's DEFAULT\n" in out
    before = _native._C.instruction_set()
    assert not _native._C.set_instruction_set("abacus")
    assert _native._C.instruction_set() == before


@pytest.mark.parametrize("name", SETS)
def test_environment_chooses_the_instruction_set(name: str) -> None:
    assert f"instruction set  {name} by BRAZE_CPU_CAPABILITY (" in info_where(name).stdout


def test_instruction_set_that_is_not_there_is_an_import_error_of_one_line() -> None:
    run = info_where("abacus")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ImportError: BRAZE_CPU_CAPABILITY is 'abacus'; this machine and this build of braze have "
        + ", ".join(SETS)
    )


COUNT_SETS = """
#include <cstdio>
#include "instruction_set.h"
#include "sets.h"
#define BRAZE_NAME(set) #set
int main() {
  const char* const compiled[] = BRAZE_FOR_EACH_SET(BRAZE_NAME);
  for (const char* name : compiled) printf("%s ", name);
  for (const auto& name : braze::cpu::available_instruction_sets()) printf("|%s", name.c_str());
}
"""


@pytest.mark.parametrize("only_baseline", [False, True])
def test_instruction_sets_offered_are_those_compiled(tmp_path: Path, only_baseline: bool) -> None:
    """Or a kernel would be looked up past the end of its table."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "main.cpp").write_text(COUNT_SETS)
    sources = [tmp_path / "main.cpp", ROOT / "csrc/cpu/instruction_set.cpp"]
    flags = ["-std=c++20", f"-I{ROOT}/csrc/cpu"]
    flags += ["-DBRAZE_BASELINE_ONLY"] if only_baseline else []
    subprocess.run([compiler, *flags, *sources, "-o", tmp_path / "a.out"], check=True)
    run = subprocess.run([tmp_path / "a.out"], capture_output=True, text=True, check=True)
    compiled, *offered = (part.strip() for part in run.stdout.split("|"))
    assert offered == compiled.split()[: len(offered)]
    if only_baseline:
        assert offered == compiled.split() == ["baseline"]
    else:
        assert offered == SETS


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "instruction set" in out and braze.__version__ in out
    assert f"{_native._C.__file__}; installed are those for torch 2." in out
    assert re.search(r"^CUDA kernels +(none: |loaded from )", out, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["nonsense"], ["bench", "nonsense"]])
def test_unknown_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nonsense" in err
    assert ("optim" if "bench" in arguments else "demo") in err  # the choices


@pytest.mark.parametrize("command", [[], ["bench"], ["bench", "optim"], ["demo"], ["build"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert "usage: " + " ".join(["python -m braze", *command]) in out
    assert ("--against" in out) == (command[-1:] == ["optim"])
    if command in ([], ["bench"]):  # no name: the same
        assert main(command) == 0
        assert capsys.readouterr().out == out


def test_a_command_imports_no_other() -> None:
    code = "import sys; from braze.__main__ import main; main(['info']); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(run.stdout.split())
    assert "braze.info" in names and not {"braze.demo", "braze.bench.optim", "braze.build"} & names


# ------------------------------------------------------- the house's rules


def includes_torch(text: str) -> bool:
    return re.search(r'#include\s*[<"](torch|ATen|c10|pybind11)/', text) is not None


def test_only_ops_and_bindings_know_torch() -> None:
    assert includes_torch("#include <ATen/core/Tensor.h>") and not includes_torch(
        "#include <cmath>"
    )
    allowed = {ROOT / "csrc/bindings.cpp", *(ROOT / "csrc/ops").rglob("*")}
    offenders = [p for p in CXX if p not in allowed and includes_torch(p.read_text())]
    assert not offenders
    pybind = [
        p.name for p in CXX if "pybind" in p.read_text().split("namespace", 1)[0].split("//")[0]
    ]
    assert [name for name in pybind if name != "bindings.cpp"] == []


# What only one file may contain: the emulator replaces that file, and runs everything else.
ONE_PLACE = {
    "a launch": (r"<<<", "device.cuh"),
    "shared memory": (r"\b__shared__\b", "device.cuh"),
    "PTX": (r"\basm\b", "ptx.cuh"),
    "a grid constant": (r"\b__grid_constant__\b", "device.cuh"),
}


def out_of_place(name: str, text: str) -> list[str]:
    """What a CUDA source has that belongs elsewhere."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    found = [
        what
        for what, (pattern, home) in ONE_PLACE.items()
        if name != home and re.search(pattern, code)
    ]
    # blockIdx.x * n wraps at 2^32 before any widening; int64_t{blockIdx.x} * n does not.
    if re.search(r"\b(blockIdx|gridDim)\.[xyz]\s*\*|\*\s*(blockIdx|gridDim)\.[xyz]\b", code):
        found.append("a 32-bit offset")
    return found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("kernel<<<grid, block>>>(x);", "a launch"),
        ("__shared__ float tile[32];", "shared memory"),
        ("extern __shared__ float tile[];", "shared memory"),
        ('asm volatile("bar.sync 0;");', "PTX"),
        ("f(const __grid_constant__ Table t)", "a grid constant"),
        ("int64_t i = blockIdx.x * 256 + threadIdx.x;", "a 32-bit offset"),
        ("int64_t i = 256 * blockIdx.x;", "a 32-bit offset"),
        ("step = blockDim.x * gridDim.x;", "a 32-bit offset"),
    ],
)
def test_misplaced_cuda_is_found(text: str, what: str) -> None:
    assert out_of_place("step_kernels.cuh", text) == [what]
    assert out_of_place("step_kernels.cuh", f"// {text}\n") == []


def test_cuda_sources_go_through_the_device_header() -> None:
    assert out_of_place("step.cuh", "int64_t i = int64_t{blockIdx.x} * 256;") == []
    sources = [p for p in CXX if p.parent.name == "cuda"]
    assert sources
    assert {p.name: f for p in sources if (f := out_of_place(p.name, p.read_text()))} == {}


def test_no_cuda_conditionals() -> None:
    """The backend is there by being linked. math/ alone is compiled by both compilers."""
    conditional = re.compile(
        r"#\s*(if|ifdef|elif)\b.*(WITH_CUDA|USE_CUDA|__CUDACC__|__CUDA_ARCH__)"
    )
    assert conditional.search("#ifdef WITH_CUDA")
    assert [
        p.name for p in CXX if p.parent.name != "math" and conditional.search(p.read_text())
    ] == []


def test_basenames_are_unique() -> None:
    stems = [p.stem for p in CXX if p.suffix in {".cpp", ".cu"}]
    assert len(stems) == len(set(stems))


def test_no_build_for_this_machine_only_and_no_fast_math() -> None:
    for name in ("CMakeLists.txt", "cmake/Cuda.cmake", "pyproject.toml", "Makefile"):
        text = (ROOT / name).read_text()
        assert "march=native" not in text and "fast-math" not in text
    assert "-ffp-contract=off" in (ROOT / "CMakeLists.txt").read_text()
    assert "-fmad=false" in (ROOT / "cmake/Cuda.cmake").read_text()
