"""Everything that only a GPU can tell, in one resumable run: make gpu, or python3 bench/gpu.py.

Builds braze for this GPU into build/gpu/site, then tests it there, compares bits with the CPU, runs
compute-sanitizer and the benchmark. Rows are written as they come; what is done for the present sources
is not repeated. Exit code: 0 all well, 1 something failed, 2 bad arguments, 3 the time ran out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the folder above is where the package lies
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "bench"

from .files import collect_folder, read_json
from .gpu_parts import PARTS, Part
from .gpu_run import Context, Cut, PartFailed, Record, stop_children
from .sources import find_root

FACTS = """
import json, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
if facts["available"]:
    p = torch.cuda.get_device_properties(0)
    facts.update(name=p.name, capability=f"{p.major}.{p.minor}")
print("FACTS " + json.dumps(facts))
"""


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip()


def _version(root: Path) -> str:
    for text in (root / "pyproject.toml").read_text().splitlines():
        if text.startswith("version ="):
            return text.split('"')[1]
    return "?"


def gather_facts(root: Path, device: str) -> dict[str, Any]:
    """Device and versions, as every result file carries them. Raises PartFailed without the device."""
    text = _output([sys.executable, "-c", FACTS])
    seen = json.loads(text.rpartition("FACTS ")[2]) if "FACTS " in text else {}
    if not seen:
        raise PartFailed(f"{sys.executable} cannot import torch; choose the Python that has it")
    versions = {"braze": _version(root), "torch": seen["torch"], "cuda": seen["cuda"]}
    versions["python"] = platform.python_version()
    if device == "cpu":
        return {"device": {"type": "cpu", "name": "rehearsal cpu"}, "versions": versions}
    if not seen["available"]:
        raise PartFailed(
            f"torch {seen['torch']} finds no CUDA device here. Rehearse the run without one: "
            "python3 bench/gpu.py --device cpu"
        )
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    versions["driver"] = _output(query).partition("\n")[0] or "?"
    described = {"type": "cuda", "name": seen["name"], "capability": seen["capability"]}
    return {"device": described, "versions": versions}


def run(parts: Mapping[str, Part], context: Context, wanted: list[str]) -> int:
    """Runs the wanted parts in order, prints the table. Returns the exit code."""
    table, failed, cut = [], False, False
    for name in wanted:
        part = parts[name]
        record = Record(context, part.kind, part.globs, part.family)
        began = context.part_start = time.monotonic()
        state, note = "done before", ""
        # The build's product may be gone although its record is there: it looks for itself.
        if not record.done() or part.kind == "build":
            state, note = _run_part(part, context, record, began)
        rows = record.rows
        good, unable = (sum(row["ok"] is value for row in rows) for value in (True, None))
        figures = f"{good}/{len(rows)} rows" + (f", {unable} not available" if unable else "")
        seconds = time.monotonic() - began
        table.append(f"{name:9} {state:12} {figures:28} {seconds:6.0f} s")
        table += [f"    {text}" for text in note.splitlines()[-12:]]
        table += _failures(record)
        failed, cut = failed or state == "FAILED", cut or state == "cut short"
        if name == "build" and state in ("FAILED", "cut short"):
            table.append("    nothing else can run without the build")
            break
    for name in wanted:
        table += _goals(context, parts[name].kind)
    table += [f"results: {context.results}", f"logs:    {context.out / 'logs'}"]
    _collect_logs(context)
    print("\n".join(["", *(text[:160] for text in table[:60])]), flush=True)
    if failed:
        return 1
    if cut:
        print("The time ran out; run the same command again for the rest.")
    return 3 if cut else 0


def _run_part(part: Part, context: Context, record: Record, began: float) -> tuple[str, str]:
    """Returns the part's state and what there is to say about it."""
    print(f"--- {part.kind}", flush=True)
    complete, note = False, ""
    record.open()
    try:
        context.need(0)
        part.run(context, record)
        complete = True
    except Cut:
        pass
    except PartFailed as error:
        note = str(error)
    except Exception as error:  # a defect of one part must not cost the others
        note = f"{type(error).__name__}: {error}"
    finally:
        # A selection answers the question that was asked, but it is not the part.
        record.close(complete and not context.only, time.monotonic() - began, note)
    if note or (complete and not record.data["ok"]):
        return "FAILED", note
    if not complete:
        failed = any(row["ok"] is False for row in record.rows)
        return ("FAILED" if failed else "cut short"), "cut short" if failed else ""
    return "ok", ""


def _failures(record: Record) -> list[str]:
    bad = [row for row in record.rows if row["ok"] is not True]
    lines = []
    for row in bad[:5]:
        words = "; ".join(row.get("failures", []))[:300] or row.get("note", "")
        lines.append(f"    {row['name']}: {' '.join(str(words).split())}")
    return lines + ([f"    ... and {len(bad) - 5} more"] if len(bad) > 5 else [])


def _goals(context: Context, kind: str) -> list[str]:
    """A benchmark's goals, met or missed."""
    rows = (read_json(context.out / f"{kind}.json") or {}).get("rows", [])
    goals = [goal for row in rows for goal in row.get("goals", [])]
    return [
        f"goal {'met   ' if goal['met'] else 'MISSED'} {goal['goal']}; here {goal['value']:.2f}"
        for goal in goals[:10]
    ]


def _collect_logs(context: Context) -> None:
    """One archive beside the results."""
    folder, logs = collect_folder(), context.out / "logs"
    if folder is not None and logs.is_dir():
        with tarfile.open(folder / "logs.tar.gz", "w:gz") as archive:
            archive.add(logs, arcname="logs")


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--redo", action="append", default=[], metavar="PART", help="or: all")
    parser.add_argument("--out", type=Path, help="state, logs and build (default: build/gpu)")
    parser.add_argument(
        "--budget-s", type=float, help="stop in time to end within this many seconds"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse")
    parser.add_argument("--no-pip", action="store_true", help="build with cmake alone")
    parser.add_argument("--jobs", type=int, help="test files at a time (default: by processors)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row of the benchmark")
    parser.add_argument("--only", default="", help="tests, cases and cells with this in their name")
    arguments = parser.parse_args(argv)
    arguments.parts = [name for name in arguments.parts.split(",") if name]
    for name in [*arguments.parts, *arguments.redo]:
        if name not in PARTS and name != "all":
            parser.error(f"there is no part '{name}'; there are: {', '.join(PARTS)}")
    if "all" in arguments.parts:
        arguments.parts = list(PARTS)
    if arguments.budget_s is not None and arguments.budget_s <= 0:
        parser.error(f"--budget-s must be positive, got {arguments.budget_s}")
    return arguments


def main(argv: list[str]) -> int:
    """The command line."""
    began = time.monotonic()
    arguments = _arguments(argv)
    try:
        root = find_root(Path(__file__).parent)
        facts = gather_facts(root, arguments.device)
    except (FileNotFoundError, PartFailed) as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 2
    redo = set(PARTS) if "all" in arguments.redo else set(arguments.redo)
    context = Context(
        root=root,
        out=(arguments.out or root / "build" / "gpu").resolve(),
        device=arguments.device,
        facts=facts,
        redo=frozenset(PARTS[name].kind for name in redo),
        pip=not arguments.no_pip,
        jobs=arguments.jobs or max(1, min(4, (os.cpu_count() or 1) // 4)),
        seconds=arguments.seconds,
        only=arguments.only,
    )
    if arguments.budget_s is not None:
        # Some seconds are for stopping children and packing the logs.
        context.deadline = began + arguments.budget_s - min(10.0, 0.1 * arguments.budget_s)
    stop_children(False)
    signal.signal(signal.SIGTERM, _interrupt)
    print(f"{facts['device']['name']}, {facts['versions']}", flush=True)
    try:
        return run(PARTS, context, arguments.parts)
    except KeyboardInterrupt:
        _collect_logs(context)
        print("\nstopped; what was measured is kept", file=sys.stderr)
        return 130
    finally:
        stop_children()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
