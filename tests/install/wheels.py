"""Builds one wheel for two torches, tries it with both, and then what `python -m braze build` adds. No GPU.

    .venv/bin/python tests/install/wheels.py     or: make wheel-check

The torches are the installed one and the oldest that is supported, with CUDA (5 GB in build/wheel, kept for
the next time). With that one, braze is then left without its bindings, and after that without its CUDA
kernels too: both are compiled anew by torch.utils.cpp_extension, loaded and used.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import cuda_gates

OLDEST = "2.11.0"
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
HOME = cuda_gates.ROOT / f"build/wheel/try/torch2.11-python{HERE}"
PYTHON = HOME / "bin/python"
# Less to compile: one instruction set, one architecture and unoptimised PTX. The wheel differs in nothing else.
DEFINES = (
    "BRAZE_CPU_SETS=baseline",
    "CMAKE_CUDA_ARCHITECTURES=90-virtual",
    "CMAKE_CUDA_FLAGS=-Xcicc -O0",
    "BRAZE_WERROR=ON",
)

LOADED = """
import sys, torch, braze
from braze import _native
assert torch.version.cuda and not torch.cuda.is_available()
assert _native.cuda_missing() == "", _native.cuda_missing()
assert "cuda" in _native._C.backends(), _native._C.backends()
files = [sys.modules[f"braze.{name}"].__file__ for name in ("_C", "_cuda")]
assert files[1] == str(_native.CUDA_FILE)
maps = open("/proc/self/maps").read().split()
for runtime, most in {"libgomp": 1, "libcudart": 1, "libbraze_cuda": int(sys.argv[1])}.items():
    found = {p for p in maps if f"/{runtime}" in p}
    assert len(found) <= most, found
parameter = torch.nn.Parameter(torch.ones(9))
parameter.grad = torch.ones(9)
braze.optim.SGD([parameter], lr=0.25).step()
assert parameter.eq(0.75).all()
print(*files)
"""


def run(*command: str | Path, fails: bool = False, **environ: str) -> str:
    """Runs ``command`` away from the source tree and returns its output; stops if it fails, or does not."""
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BRAZE_JIT")}
    tools = f"{Path(sys.executable).parent}:{keep['PATH']}"
    done = subprocess.run(
        list(map(str, command)),
        env={**keep, "PATH": tools, "BRAZE_CACHE_DIR": str(HOME / "jit"), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )
    if bool(done.returncode) != fails:
        sys.exit(
            f"{done.stdout}\nreturned {done.returncode}: {shlex.join(map(str, command))[:400]}"
        )
    return done.stdout


def step(what: str, started: float) -> None:
    """One line of progress."""
    print(f"{time.monotonic() - started:5.0f} s  {what}", flush=True)


def build_wheel(started: float) -> bool:
    """Both rows, from one file. Returns whether it has CUDA kernels."""
    import torch

    present = ".".join(torch.__version__.split(".")[:2])
    torches = [OLDEST, present] if present != "2.11" else [OLDEST]
    command = [sys.executable, "-m", "tools.wheel", "--keep", "--torch", ",".join(torches)]
    command += ["--out", str(cuda_gates.ROOT / "build/wheel/dist")]
    if reason := cuda_gates.no_nvcc():
        print(f"SKIPPED: CUDA kernels: {reason}", file=sys.stderr)
        command += ["--cuda", "off"]
    command += [word for define in DEFINES for word in ("--define", define)]
    subprocess.run(command, cwd=cuda_gates.ROOT, check=True)
    step("built, and tried with each torch", started)
    sums = cuda_gates.ROOT / "build/wheel/dist/SHA256SUMS"
    before = sums.read_text()
    subprocess.run(
        [*command, "--no-smoke"], cwd=cuda_gates.ROOT, check=True, stdout=subprocess.DEVNULL
    )
    assert sums.read_text() == before, "packed again, the bytes are others"
    return not reason


def remove(package: Path, pattern: str) -> None:
    """Files that must be there."""
    files = list(package.glob(pattern))
    assert files, pattern
    for file in files:
        file.unlink()


def main() -> int:
    """Runs all steps; stops with an error at the first that fails."""
    started = time.monotonic()
    has_cuda = build_wheel(started)
    run("rm", "-rf", HOME / "jit")
    package = Path(sysconfig.get_paths(vars={"base": str(HOME)})["purelib"], "braze")
    remove(package, "_C.torch2.11*.so")
    text = run(PYTHON, "-c", "import braze", fails=True)
    assert "but torch 2.11.0" in text and "-m braze build" in text, text
    if not has_cuda:
        return 0
    remove(package, "_cuda.torch2.11*.so")
    print(run(PYTHON, "-m", "braze", "build"), end="")
    files = [Path(file) for file in run(PYTHON, "-c", LOADED, "1").split()[-2:]]
    assert all(file.is_relative_to(HOME / "jit") for file in files), files
    again = run(PYTHON, "-m", "braze", "build")
    assert "compiling" not in again and again.split()[-2:] == [str(file) for file in files], again
    flags = (
        run(PYTHON, "-c", "from braze import _build; print(*_build.CXX_FLAGS)")
        .splitlines()[-1]
        .split()
    )
    for file in files:  # the same bits as those of the wheel
        assert {entry.name for entry in file.parent.iterdir()} == {file.name, "build.log"}
        compiled = re.findall(
            r"^.* -c .*/csrc/.*$", (file.parent / "build.log").read_text(), re.MULTILINE
        )
        assert compiled and all(f" {flag} " in line for flag in flags for line in compiled)
    step("python -m braze build: both bindings compiled, and loaded", started)

    remove(package, "libbraze_cuda.so")
    text = run(PYTHON, "-c", "from braze import _native; print(_native.cuda_missing())")
    assert "-m braze build" in text, text
    print(run(PYTHON, "-m", "braze", "build", TORCH_CUDA_ARCH_LIST="9.0"), end="")
    run(PYTHON, "-c", LOADED, "0")
    run(PYTHON, "-c", LOADED, "0", BRAZE_JIT="1", TORCH_CUDA_ARCH_LIST="9.0")
    step("without libbraze_cuda: the kernels compiled, loaded, and found again", started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
