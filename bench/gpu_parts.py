"""The parts of the GPU run: build, test, golden, sanitize, and a benchmark of each kernel family."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .files import replace_folder, write_text
from .gpu_run import (
    Context,
    Cut,
    Finished,
    PartFailed,
    Record,
    Row,
    run_child,
    run_rows,
    stop_children,
)

BUILT = (
    "csrc/**/*",
    "cmake/**/*",
    "CMakeLists.txt",
    "pyproject.toml",
    "python/**/*.py",
)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Device-independent and slow: last, so that a run cut short has what only a GPU can tell.
LAST = ("test_emulat", "test_build", "test_cuda_build", "test_demo", "test_bench", "test_fork")
FILE_LIMIT_S = 300.0


@dataclass(frozen=True)
class Part:
    """``globs``: the sources that its rows depend on; other sources, other rows. ``family``: of the kernels
    that it is about."""

    kind: str
    run: Callable[[Context, Record], None]
    globs: tuple[str, ...]
    family: str = "optimizer"


# ------------------------------------------------------------------- build


def build(context: Context, record: Record) -> None:
    """Compiles for this GPU alone into ``site``, with pip if it is there, else with CMake."""
    if record.passed() and (context.site / "braze").is_dir():
        return
    new = context.out / "site.new"
    shutil.rmtree(new, ignore_errors=True)
    defines = {"BRAZE_CUDA": "ON" if context.device == "cuda" else "OFF"}
    capability = str(context.facts.get("device", {}).get("capability", ""))
    environment = context.environment(CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count() or 1))
    if capability:
        defines["CMAKE_CUDA_ARCHITECTURES"] = f"{capability.replace('.', '')}-real"
        environment["TORCH_CUDA_ARCH_LIST"] = capability
    began = time.monotonic()
    has_pip = context.pip and not _python(context, "import pip, scikit_build_core").code
    end = None
    if has_pip:
        end = _with_pip(context, new, defines, environment)
    if end is None or (end.code and time.monotonic() - began < 20):
        end = _with_cmake(context, new, defines, environment)
    row: Row = {"name": "build", "ok": False, "seconds": round(time.monotonic() - began, 1)}
    if end.timed_out:
        raise Cut
    if end.code:
        record.put({**row, "note": f"code {end.code}; see logs/build.log"})
        raise PartFailed(f"the build failed:\n{end.tail(25)}")
    replace_folder(new, context.site)
    seen = _python(context, "import braze\nfor k, v in braze.build_info().items(): print(k, v)")
    if seen.code:
        record.put({**row, "note": "built, but import braze fails"})
        raise PartFailed(f"built, but import braze fails:\n{seen.tail()}")
    record.put({**row, "ok": True, "architectures": capability, "info": seen.text.splitlines()})


def _python(context: Context, code: str) -> Finished:
    return run_child([sys.executable, "-c", code], context, "build.log", 120)


def _with_pip(
    context: Context, new: Path, defines: dict[str, str], environment: dict[str, str]
) -> Finished:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index"]
    command += ["--no-build-isolation", "--no-deps", "--no-cache-dir", "--target", str(new)]
    command += ["-C", f"build-dir={context.out / 'cmake'}"]
    for key, value in defines.items():
        command += ["-C", f"cmake.define.{key}={value}"]
    limit = context.need(30)
    return run_child([*command, "."], context, "build.log", limit, environment=environment)


def _with_cmake(
    context: Context, new: Path, defines: dict[str, str], environment: dict[str, str]
) -> Finished:
    """Returns the first step that failed, or the last."""
    folder = context.out / "cmake-plain"
    configure = ["cmake", "-S", ".", "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-D{key}={value}" for key, value in defines.items()]
    if shutil.which("ninja", path=environment["PATH"]):
        configure += ["-G", "Ninja"]
    steps = [
        configure,
        ["cmake", "--build", str(folder)],
        ["cmake", "--install", str(folder), "--prefix", str(new)],
    ]
    for command in steps:
        limit = context.need(30)
        if not shutil.which(command[0], path=environment["PATH"]):
            raise PartFailed(
                "neither pip with scikit-build-core nor cmake is to be had; install one: "
                "pip install scikit-build-core cmake ninja"
            )
        end = run_child(command, context, "build.log", limit, environment=environment)
        if end.code:
            return end
    source = context.root / "python" / "braze"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, new / "braze", dirs_exist_ok=True, ignore=ignored)
    return end


# -------------------------------------------------------------------- test


def test(context: Context, record: Record) -> None:
    """The suite, one pytest process a file; several at a time."""
    _provide_expecttest(context)
    files = sorted(p.name for p in (context.root / "tests").glob("test_*.py"))
    files = [name for name in files if context.only in name]
    files.sort(key=lambda name: name.startswith(LAST))
    missing = [name for name in files if name not in record.passed()]
    if not files:
        raise PartFailed(f"no test file's name contains '{context.only}'")
    cuts = []
    with ThreadPoolExecutor(context.jobs) as pool:
        futures = [pool.submit(_test_file, context, record, name) for name in missing]
        try:
            cuts = [future for future in futures if isinstance(future.exception(), Cut)]
        except BaseException:  # stopped: leaving the pool would wait for all of them
            pool.shutdown(wait=False, cancel_futures=True)
            stop_children()
            raise
    for future in futures:
        if future not in cuts:
            future.result()
    if cuts:
        raise Cut


def _provide_expecttest(context: Context) -> None:
    """torch.testing imports it for a base class alone; machines without a network often lack it."""
    if _python(context, "import expecttest").code:
        text = "import unittest\n\n\nclass TestCase(unittest.TestCase):\n    pass\n"
        write_text(context.out / "shim" / "expecttest.py", text)


def _test_file(context: Context, record: Record, name: str) -> None:
    left = context.need(30)
    report = context.out / "junit" / f"{name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"tests/{name}", "-p", "no:cacheprovider", "-v"]
    environment = context.environment(BRAZE_TEST_DEVICE=context.device)
    environment["OMP_NUM_THREADS"] = str(max(2, (os.cpu_count() or 1) // context.jobs))
    began = time.monotonic()
    limit = min(left, FILE_LIMIT_S)
    arguments = [*command, f"--junitxml={report}"]
    end = run_child(arguments, context, f"{name}.log", limit, environment=environment)
    row: Row = {"name": name, "seconds": round(time.monotonic() - began, 1), **_counts(report)}
    if end.timed_out and limit < FILE_LIMIT_S:
        raise Cut
    # 5: nothing was collected, as when the whole file skips.
    row["ok"] = end.code in (0, 5) and not end.timed_out
    if not row["ok"]:
        row["note"] = "timed out" if end.timed_out else end.tail(3)
        row.setdefault("failures", re.findall(r"^(\S+::\S+.*?) (?:FAILED|ERROR)", end.text, re.M))
    record.put(row)


def _counts(report: Path) -> Row:
    """Tests, failures and skips from pytest's report; nothing if the process died before it."""
    try:
        cases = ElementTree.parse(report).getroot().findall(".//testcase")
    except (OSError, ElementTree.ParseError):
        return {}
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    row: Row = {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
    }
    if bad:
        row["failures"] = [c.get("name", "?") for c in bad][:30]
    if skipped:
        nodes = [c.find("skipped") for c in skipped]
        row["why_skipped"] = sorted({n.get("message", "")[:120] for n in nodes if n is not None})
    return row


# ------------------------------------------------------- golden and bench


def golden(context: Context, record: Record) -> None:
    """The same bits on the GPU, on this machine's CPU and in bench/goldens.json."""
    command = [sys.executable, "-m", "bench.golden", "--device", context.device]
    run_rows([*command, "--only", context.only], context, record, "golden.log")


def bench(context: Context, record: Record) -> None:
    """The optimizer benchmark."""
    command = [sys.executable, "-m", "bench.optim_cuda", "--device", context.device]
    command += ["--seconds", str(context.seconds), "--only", context.only]
    run_rows(command, context, record, "optim.log")


def batch_norm(context: Context, record: Record) -> None:
    """The batch-norm benchmark. Its time is per layer, of which a row has up to twelve."""
    command = [sys.executable, "-m", "bench.batch_norm_cuda", "--device", context.device]
    command += ["--seconds", str(0.3 * context.seconds), "--only", context.only]
    command += ["--quick", "--batch", "2"] if context.device == "cpu" else []
    run_rows(command, context, record, "batch_norm.log")


def dropout(context: Context, record: Record) -> None:
    """The dropout benchmark."""
    command = [sys.executable, "-m", "bench.dropout", "--device", context.device]
    command += ["--seconds", str(context.seconds), "--only", context.only]
    run_rows(command, context, record, "dropout.log")


# ---------------------------------------------------------------- sanitize


def find_tool(name: str) -> str | None:
    """In the toolkit's own folder, else on PATH (where a wrapper may lie)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in homes:
        path = Path(home or "/nonexistent") / "bin" / name
        if os.access(path, os.X_OK):
            return str(path)
    return shutil.which(name)


def errors_reported(text: str) -> int | None:
    """Errors that compute-sanitizer counted; None if it never came to count."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    found += re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)
    return max(map(int, found)) if found else None


def sanitize(context: Context, record: Record) -> None:
    """Each tool first has to find its seeded bug and be silent about the program without it."""
    checker, nvcc = find_tool("compute-sanitizer"), find_tool("nvcc")
    if context.device != "cuda" or checker is None or nvcc is None:
        lacks = "CUDA device" if context.device != "cuda" else "compute-sanitizer or nvcc"
        record.put({"name": "tools", "ok": None, "note": f"not available: no {lacks}"})
        return
    for tool in TOOLS:
        names = [f"{tool} {what}" for what in ("finds its bug", "silent without", "braze")]
        if all(name in record.passed() for name in names):
            continue
        program = _compile_control(context, nvcc, tool)
        golden_short = [sys.executable, "-m", "bench.golden", "--device", "cuda", "--short"]
        commands: tuple[list[str], ...] = (
            [str(program)],
            [str(program), "clean"],
            [*golden_short, "--no-compare"],
        )
        for name, command in zip(names, commands, strict=True):
            row = _sanitized(context, checker, tool, name, command)
            record.put(row)
            if not row["ok"]:
                break


def _compile_control(context: Context, nvcc: str, tool: str) -> Path:
    program = context.out / "controls" / tool
    program.parent.mkdir(parents=True, exist_ok=True)
    source = context.root / "tests" / "sanitizer_controls" / f"{tool}.cu"
    command = [nvcc, "-std=c++20", "-arch=native", "-lineinfo", "-o", str(program), str(source)]
    capability = str(context.facts.get("device", {}).get("capability", ""))
    if capability:
        command[2] = f"-arch=sm_{capability.replace('.', '')}"
    end = run_child(command, context, "sanitize.log", context.need(30))
    if end.code:
        raise PartFailed(f"{source.name} does not compile:\n{end.tail()}")
    return program


def _sanitized(context: Context, checker: str, tool: str, name: str, command: list[str]) -> Row:
    options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    # Every tensor its own allocation: inside a cached block nothing is out of bounds.
    environment = context.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    began = time.monotonic()
    end = run_child(
        [checker, *options, *command],
        context,
        "sanitize.log",
        context.need(30),
        environment=environment,
    )
    if end.timed_out:
        raise Cut
    count = errors_reported(end.text)
    row: Row = {"name": name, "errors": count, "seconds": round(time.monotonic() - began, 1)}
    if "ot supported" in end.text and not count:
        note = "not available: compute-sanitizer refuses this device"
        return {**row, "ok": None, "note": f"{note}; {end.tail(2)}"[:300]}
    if name.endswith("bug"):
        ok = bool(count) or end.code == 99
    else:
        ok = count == 0 and end.code == 0
    return {**row, "ok": ok, "note": "" if ok else f"code {end.code}: {end.tail(3)}"[:500]}


GOLDEN = (*BUILT, "bench/golden*.py")
PARTS: dict[str, Part] = {
    "build": Part("build", build, BUILT),
    "test": Part("test", test, (*BUILT, "tests/**/*.py")),
    "golden": Part("golden", golden, (*GOLDEN, "bench/goldens.json")),
    "sanitize": Part("sanitize", sanitize, (*GOLDEN, "tests/sanitizer_controls/*")),
    "bench": Part("optim", bench, (*BUILT, "bench/cells.py", "bench/optim_*.py")),
    "batch_norm": Part(
        "batch_norm",
        batch_norm,
        (*BUILT, "bench/batch_norm*.py", "bench/optim_device.py"),
        "batch_norm",
    ),
    "dropout": Part("dropout", dropout, (*BUILT, "bench/dropout.py")),
}
