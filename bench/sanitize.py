"""compute-sanitizer over the kernels. A tool counts only if it finds its seeded bug, and nothing without it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from braze import _nvcc

from . import clock, rows
from .rows import Row, Work
from .sources import find_root

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A seeded bug is undefined behaviour: it may hang, and that is found too.
CONTROL_S, BRAZE_S = 30, 240


def find_tool(name: str) -> str | None:
    """In the folder of the toolkit that braze is compiled with, else on PATH."""
    try:
        folder = str(_nvcc.find(torch.version.cuda or "").nvcc.parent)
    except _nvcc.ToolkitError:
        folder = ""
    return shutil.which(name, path=folder) or shutil.which(name)


def errors_reported(text: str) -> int | None:
    """Errors that compute-sanitizer counted; None if it never came to count."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    found += re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)
    return max(map(int, found)) if found else None


def compile_control(tool: str, nvcc: str, architecture: str) -> Path:
    """The program with the bug that the tool must find; without it if called with "clean"."""
    root = find_root(Path(__file__).parent)
    program = root / "build" / "gpu" / "controls" / tool
    program.parent.mkdir(parents=True, exist_ok=True)
    source = root / "tests" / "sanitizer_controls" / f"{tool}.cu"
    command = [nvcc, "-std=c++20", f"-arch={architecture}", "-lineinfo", "-o", str(program)]
    subprocess.run([*command, str(source)], check=True)
    return program


def check(
    checker: str, tool: str, command: list[str], seconds: float, buggy: bool, row: Row
) -> None:
    """One run under the tool."""
    options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    # Every tensor its own allocation: inside a cached block nothing is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    began = time.monotonic()
    try:
        run = subprocess.run(
            [checker, *options, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        row["ok"] = buggy
        row["note"] = f"hung for {seconds} s"
        return
    finally:
        row["seconds"] = round(time.monotonic() - began, 1)
    print(run.stdout, flush=True)
    count = row["errors"] = errors_reported(run.stdout)
    tail = " ".join(run.stdout.split())[-300:]
    if "ot supported" in run.stdout and not count:
        row["ok"] = None
        row["note"] = f"not available: compute-sanitizer refuses this device; {tail}"
        return
    if buggy:
        row["ok"] = bool(count) or run.returncode == 99
    else:
        row["ok"] = count == 0 and run.returncode == 0
    row["note"] = "" if row["ok"] else f"code {run.returncode}: {tail}"


def work_of(tool: str, checker: str, nvcc: str, architecture: str) -> list[Work]:
    """The tool's bug, the same program without it, and the kernels, which count only after these."""
    trusted: list[bool | None] = []

    def control(row: Row, *clean: str) -> None:
        program = str(compile_control(tool, nvcc, architecture))
        check(checker, tool, [program, *clean], CONTROL_S, not clean, row)
        trusted.append(row["ok"])

    def kernels(row: Row) -> None:
        # Controls that passed in an earlier run are not repeated.
        if not all(trusted):
            row["ok"] = None if None in trusted else False
            row["note"] = f"not run: {tool} did not pass its controls"
            return
        command = [sys.executable, "-m", "bench", "golden", "--device", "cuda", "--short"]
        check(checker, tool, [*command, "--no-compare"], BRAZE_S, False, row)

    return [
        Work(f"{tool} finds its bug", control),
        Work(f"{tool} silent without", lambda row: control(row, "clean")),
        Work(f"{tool} braze", kernels),
    ]


def _unavailable(why: str) -> Work:
    def tell(row: Row) -> None:
        row["ok"] = None
        row["note"] = f"not available: no {why}"

    return Work("tools", tell)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all, one by one")
    rows.add_options(parser, ("cuda", "cpu"))


def run(arguments: argparse.Namespace) -> int:
    """Returns :func:`rows.run`'s code."""
    clock.open_clock(arguments.device)
    checker, nvcc = find_tool("compute-sanitizer"), find_tool("nvcc")
    if arguments.device == "cpu":
        work = [_unavailable("CUDA device")]
    elif checker is None or nvcc is None:
        work = [_unavailable("compute-sanitizer or nvcc")]
    else:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
        tools = arguments.tool or TOOLS
        work = [one for t in tools for one in work_of(t, checker, nvcc, architecture)]
    return rows.run(work, arguments, {}, lambda row: f"{row['name']}: {row.get('note') or 'ok'}")
