"""Links braze._cuda against a torch with CUDA and imports it, on a machine without a GPU.

    .venv/bin/python tests/install/cuda_import.py     or: make cuda-import

In an environment of its own (build/cuda-import, 5 GB, kept for the next time) with the CUDA build of
the torch in this one. The CPU extension is taken over from here: builds of one torch version are
interchangeable, which this checks by the way.

First, what knows torch is compiled against the oldest torch with CUDA that is supported, headers and
libraries alone, with the options of a GPU machine's build (bench/gpu_build.py).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build/cuda-import"
PYTHON = HOME / "venv/bin/python"

OLDEST = "2.11.0"

LOADED = """
import sys, torch, braze
from braze import _native
assert torch.version.cuda and not torch.cuda.is_available()
assert _native.cuda_missing() == "", _native.cuda_missing()
assert sys.modules["braze._cuda"].__file__ == str(_native.CUDA_FILE)
assert "cuda" in _native._C.backends(), _native._C.backends()
maps = open("/proc/self/maps").read().split()
assert len({p for p in maps if "libcudart" in p}) == 1, "two CUDA runtimes"
assert braze.build_info()["CUDA kernels"].startswith("loaded from"), braze.build_info()
print(_native.CUDA_FILE)
"""
MISSING = """
from braze import _build, _native
assert "cuda" not in _native._C.backends()
text = _native.cuda_missing()
why = _build.CUDA_MISSING or "braze._cuda is not among braze's installed files"
assert text.startswith(f"{why}; build them for this torch with"), text
assert text.endswith("-m braze build"), text
"""


def run(command: list[str | Path], cwd: str = "/", **environ: str) -> str:
    """Runs ``command`` away from the source tree; prints its output and stops if it fails."""
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BRAZE_JIT")}
    tools = f"{Path(sys.executable).parent}:{keep['PATH']}"
    done = subprocess.run(
        list(map(str, command)),
        env={**keep, "PATH": tools, "BRAZE_CACHE_DIR": str(HOME / "cache"), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(map(str, command))[:400]}")
    return done.stdout


def step(what: str, started: float) -> None:
    """One line of progress."""
    print(f"{time.monotonic() - started:5.0f} s  {what}", flush=True)


def symbols(files: list[Path], *options: str) -> set[str]:
    """Names in torch's namespaces that nm lists."""
    text = run(["nm", "--format=just-symbols", *options, *files])
    # Not what initialises a thread's variables, which may be missing.
    return {n for n in text.split() if re.match(r"_Z(?!TH).*?(2at|3c10|5torch)", n)}


def check_oldest() -> str:
    """Compiles csrc/ops and bindings.cpp for both extensions, and looks for what torch does not have."""
    home = HOME / OLDEST
    libraries = sysconfig.get_paths(vars={"base": str(home / "venv")})["purelib"]
    if not Path(libraries, "torch").exists():
        run([sys.executable, "-m", "venv", "--without-pip", home / "venv"])
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
        run([*install, "--target", libraries, f"torch==={OLDEST}"])
    options = {
        "Python_EXECUTABLE": home / "venv/bin/python",
        "CMAKE_CUDA_ARCHITECTURES": "90-real",
        "BRAZE_CPU_SETS": "baseline",
        "BRAZE_CUDA": "ON",
        "BRAZE_WERROR": "ON",
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    build = home / "build"
    run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines])
    entries = [
        entry
        for entry in json.loads(run(["ninja", "-C", build, "-t", "compdb"]))
        if entry["output"].endswith(".o")
        and re.search(r"csrc/(ops/|bindings)|/Unity/", entry["file"])
    ]

    def compile_one(entry: dict[str, str]) -> Path:
        target = build / entry["output"]
        target.parent.mkdir(parents=True, exist_ok=True)
        # Unoptimised: only what is declared and what is called matters here.
        run([*shlex.split(entry["command"]), "-O0"], cwd=entry["directory"])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, entries))
    has = symbols(sorted(Path(libraries, "torch/lib").glob("*.so")), "-D", "--defined-only")
    has |= symbols(objects, "--defined-only")
    needs = {name for name in symbols(objects, "--undefined-only") if "braze" not in name}
    if needs - has or len(needs) < 100:
        sys.exit(f"torch {OLDEST} lacks {sorted(needs - has)[:10]}, of {len(needs)} names")
    return f"torch {OLDEST} with CUDA: {len(objects)} files compiled; it has the {len(needs)} names they need"


def main() -> int:
    """Runs all steps; stops with an error at the first that fails."""
    import braze
    import torch

    started = time.monotonic()
    version = torch.__version__.split("+")[0]
    if not PYTHON.exists():
        run([sys.executable, "-m", "venv", HOME / "venv"])
    # ===: the CPU build has a local version (2.13.0+cpu), and == would prefer that.
    install = [
        PYTHON,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        f"torch==={version}",
        "numpy",
    ]
    with ThreadPoolExecutor() as pool:  # unpacking keeps one core busy
        installed = pool.submit(run, install)
        step(check_oldest(), started)
        installed.result()
    step(f"torch {version} with CUDA is there", started)

    libraries = sysconfig.get_paths(vars={"base": str(PYTHON.parents[1])})["purelib"]
    package = Path(libraries, "braze")
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(Path(braze.__file__).parent, package)
    for stale in package.glob("_cuda*"):
        stale.unlink()
    shutil.rmtree(HOME / "cache", ignore_errors=True)
    run([PYTHON, "-c", MISSING])
    step("the CPU installation loads, and says that CUDA kernels are missing", started)

    # One architecture, and unoptimised PTX where that can be asked for: the two ways differ in linking,
    # tests/install/test_cuda_build.py compiles for all.
    print(run([PYTHON, "-m", "braze", "build"], TORCH_CUDA_ARCH_LIST="9.0"), end="")
    run([PYTHON, "-c", LOADED])
    step("python -m braze build: compiled, linked, found in the cache, loaded", started)
    run([PYTHON, "-c", LOADED], BRAZE_JIT="1", TORCH_CUDA_ARCH_LIST="9.0")
    shutil.rmtree(HOME / "cache")

    options = {
        "Python_EXECUTABLE": PYTHON,
        "CMAKE_CUDA_ARCHITECTURES": "90-virtual",
        "CMAKE_CUDA_FLAGS": "-Xcicc -O0",
        "CMAKE_INSTALL_PREFIX": package.parent,
        "BRAZE_WERROR": "ON",
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    build = HOME / "build"
    run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines])
    run(["cmake", "--build", build, "--target", "_cuda"])
    run(["cmake", "--install", build, "--component", "cuda"])
    run([PYTHON, "-c", LOADED])
    step("CMake: compiled, linked, installed, loaded", started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
