"""Everything that only a GPU can tell, in one resumable run: make gpu, or python3 bench/gpu.py.

Builds braze for this GPU into build/gpu/site; then, in the order of their value: bits against the CPU's,
headline figures, inference, tests and checkers. Rows are written as they come, to
bench/results/<GPU>/gpu.json and, if OUT names a folder, there too; what is done for the present sources is not
repeated. To go on on another machine, carry that file and build/gpu/site.tar.gz (the built module). Exit code:
0 all well, 1 something failed, 2 bad arguments, 3 the time ran out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the folder above is where the package lies
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "bench"

from .files import collect_folder, slug, write_json
from .gpu_run import Log, Results, run_child
from .gpu_steps import STEPS, Step
from .rows import Hopeless, Row
from .sources import find_root

# A GPU is often to be had for ten minutes; some of them are for what comes before and after.
BUDGET_S = 560.0
# Nothing begins with less time than this.
LEAST_S = 8.0
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


def gather_facts(root: Path, device: str) -> dict[str, Any]:
    """Device and versions, as every result file carries them. Raises Hopeless without the device."""
    text = _output([sys.executable, "-c", FACTS])
    seen = json.loads(text.rpartition("FACTS ")[2]) if "FACTS " in text else {}
    if not seen:
        raise Hopeless(f"{sys.executable} cannot import torch; choose the Python that has it")
    project = (root / "pyproject.toml").read_text()
    versions = {
        "braze": project.partition("\nversion = ")[2].split('"')[1],
        "torch": seen["torch"],
        "cuda": seen["cuda"],
        "python": platform.python_version(),
    }
    if device == "cpu":
        return {"device": {"type": "cpu", "name": "rehearsal"}, "versions": versions}
    if not seen["available"]:
        raise Hopeless(
            f"torch {seen['torch']} finds no CUDA device here. Rehearse the run without one: "
            "python3 bench/gpu.py --device cpu"
        )
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    versions["driver"] = _output(query).partition("\n")[0] or "?"
    described = {"type": "cuda", "name": seen["name"], "capability": seen["capability"]}
    return {"device": described, "versions": versions}


@dataclass
class Run:
    """One run of the driver."""

    root: Path
    out: Path
    device: str
    results: Results
    log: Log
    deadline: float = float("inf")

    def environment(self) -> dict[str, str]:
        """The children's: the braze that was built here comes first."""
        path = [self.out / "site", self.root, self.out / "shim", os.environ.get("PYTHONPATH", "")]
        # pip's cmake and ninja lie beside the interpreter.
        tools = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(p) for p in path if str(p)),
            "PATH": os.pathsep.join(tools),
            "PYTHONUNBUFFERED": "1",
            "BRAZE_GPU_OUT": str(self.out),
        }

    def command(self, step: Step, tried: set[str]) -> list[str]:
        """The step's program, without rows that passed before and those that were ``tried`` now."""
        arguments = step.arguments if self.device == "cuda" else step.rehearsal
        rows = self.results.of(step, step.sources(self.root))
        skip = self.out / "skip.json"
        write_json(sorted({row["name"] for row in rows if row["ok"] is True} | tried), skip)
        program = [sys.executable, "-m", "bench", step.program]
        return [*program, *arguments, "--rows", "--skip-file", str(skip)]

    def measure(self, step: Step, seconds: float) -> tuple[bool, str]:
        """Runs the program until all its rows are there; a row that kills it has failed.

        Returns:
            Whether it came to its end, and what is wrong with it otherwise.
        """
        deadline = time.monotonic() + seconds
        sources = step.sources(self.root)

        tried: set[str] = set()

        def put(row: Row) -> None:
            self.results.put(step, sources, row)
            if row["ok"] is not None:
                tried.add(row["name"])

        for _ in range(20):
            left = deadline - time.monotonic()
            if left < LEAST_S:
                return False, ""
            before = len(tried)
            end = run_child(
                self.command(step, tried),
                self.root,
                self.environment(),
                self.log,
                left,
                step.row_limit_s,
                put,
            )
            if end.code is None and time.monotonic() >= deadline:
                return False, ""
            how = "took too long" if end.code is None else f"ended the process ({end.code})"
            if end.row and end.code not in (0, 1):
                put({"name": end.row, "ok": False, "note": f"{how}: {end.tail}"[-500:]})
            if end.code in (0, 1):
                rows = self.results.of(step, sources)
                return bool(rows), "" if rows else f"no row came out of it:\n{end.tail}"
            if len(tried) == before:
                return False, f"it {how}:\n{end.tail}"
        return False, "20 rows ended the process; the rest was not tried"

    def done(self, step: Step) -> bool:
        verdict = self.results.steps.get(step.name, {})
        same = verdict.get("sources") == step.sources(self.root)
        return bool(same and verdict.get("complete") and verdict.get("ok"))


def run(steps: Sequence[Step], context: Run) -> int:
    """Runs the steps, in two rounds; prints the table. Returns the exit code."""
    spent = dict.fromkeys(steps, 0.0)
    # The build's product may be gone although its record is there: it looks for itself.
    states = {s: "done before" if context.done(s) and s.name != "build" else "" for s in steps}
    notes = dict.fromkeys(steps, "")
    for round_ in range(2):
        for step in steps:
            if states[step] not in ("", "cut short"):
                continue
            left = context.deadline - time.monotonic()
            if left < LEAST_S:
                states[step] = states[step] or "no time"
                continue
            print(f"--- {step.name} (about {step.expected_s:.0f} s)", flush=True)
            began = time.monotonic()
            limit = min(left, step.limit_s) if round_ == 0 else left
            try:
                complete, notes[step] = context.measure(step, limit)
            except Exception as error:  # a defect of one step must not cost the others
                complete, notes[step] = False, f"{type(error).__name__}: {error}"
            spent[step] += time.monotonic() - began
            sources = step.sources(context.root)
            rows = context.results.of(step, sources)
            ok = not notes[step] and all(row["ok"] is not False for row in rows)
            context.results.close(
                step,
                sources=sources,
                complete=complete,
                ok=ok,
                available=all(row["ok"] is not None for row in rows),
                seconds=round(spent[step], 1),
                note=notes[step],
            )
            states[step] = "ok" if complete else "cut short"
            if notes[step] or (complete and not ok):
                states[step] = "FAILED"
            print(f"    {states[step]}, {spent[step]:.0f} s", flush=True)
            if step.name == "build" and states[step] != "ok":
                notes[step] += "\nnothing else can run without the build"
                states |= {other: "not run" for other in steps if not states[other]}
    print("\n".join(["", *_table(steps, context, states, spent, notes)]), flush=True)
    if "FAILED" in states.values():
        return 1
    if not all(state in ("ok", "done before") for state in states.values()):
        print("The time ran out; run the same command again for the rest.")
        return 3
    return 0


def _table(
    steps: Sequence[Step],
    context: Run,
    states: dict[Step, str],
    spent: dict[Step, float],
    notes: dict[Step, str],
) -> list[str]:
    lines = [f"{'step':<22}{'state':<13}{'rows':>12}{'seconds':>9}{'expected':>10}"]
    goals: dict[str, dict[str, Any]] = {}
    shown: set[tuple[str, str]] = set()
    for step in steps:
        rows = context.results.of(step, step.sources(context.root))
        passed = f"{sum(row['ok'] is True for row in rows)}/{len(rows)}"
        times = f"{spent[step]:9.0f}{step.expected_s:10.0f}"
        lines.append(f"{step.name:<22}{states[step]:<13}{passed:>12}{times}")
        lines += [f"    {text}" for text in notes[step].splitlines()[-12:]]
        bad = [row for row in rows if row["ok"] is False]
        new = [row for row in bad if (step.program, row["name"]) not in shown]
        shown |= {(step.program, row["name"]) for row in bad}
        lines += [f"    {row['name']}: {' '.join(str(row.get('note')).split())}" for row in new[:6]]
        lines += [f"    ... and {len(new) - 6} more"] if len(new) > 6 else []
        goals |= {goal["goal"]: goal for row in rows for goal in row.get("goals", [])}
    lines += [
        f"goal {'met   ' if goal['met'] else 'MISSED'} {goal['goal']}; here {goal['value']:.2f}"
        for goal in goals.values()
    ]
    lines.append(f"results: {context.results.paths[0]}; log: {context.log.paths[0]}")
    return [text[:180] for text in lines]


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [step.name for step in STEPS]
    add = parser.add_argument
    add("--steps", default="", help=f"names, by semicolons, of: {'; '.join(names)}")
    add("--redo", action="append", default=[], metavar="STEP", help="once more; or: all")
    add("--out", type=Path, help="log and build (default: build/gpu)")
    add("--budget-s", type=float, default=BUDGET_S, help=f"to end in (default {BUDGET_S:.0f})")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse")
    add("--installed", action="store_true", help="use the braze of this Python, build nothing")
    arguments = parser.parse_args(argv)
    wanted = [name.strip() for name in arguments.steps.split(";") if name.strip()]
    for name in [*wanted, *arguments.redo]:
        if name not in names and name != "all":
            parser.error(f"there is no step '{name}'; there are: {'; '.join(names)}")
    if arguments.budget_s <= 0:
        parser.error(f"--budget-s must be positive, got {arguments.budget_s}")
    arguments.chosen = [
        step
        for step in STEPS
        if (not wanted or step.name in wanted)
        and not (arguments.installed and step.name == "build")
    ]
    return arguments


def main(argv: list[str]) -> int:
    """The command line."""
    began = time.monotonic()
    arguments = _arguments(argv)
    try:
        root = find_root(Path(__file__).parent)
        facts = gather_facts(root, arguments.device)
    except (FileNotFoundError, Hopeless) as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 2
    out = (arguments.out or root / "build" / "gpu").resolve()
    # Results of a GPU belong to the repository; those of a rehearsal do not.
    base = root / "bench" if arguments.device == "cuda" else out
    results = Results.open(base / "results" / slug(facts["device"]["name"]) / "gpu.json", facts)
    redo = {step.name for step in STEPS} if "all" in arguments.redo else set(arguments.redo)
    again = {step.program for step in STEPS if step.name in redo}
    results.rows = [row for row in results.rows if row["program"] not in again]
    results.steps = {name: v for name, v in results.steps.items() if name not in redo}
    collect = collect_folder()
    log = Log([out / "gpu.log", *([collect / "gpu.log"] if collect else [])])
    context = Run(root, out, arguments.device, results, log)
    # Some seconds are for stopping children and the table.
    context.deadline = began + arguments.budget_s - min(5.0, 0.1 * arguments.budget_s)
    signal.signal(signal.SIGTERM, _interrupt)
    print(f"{facts['device']['name']}, {facts['versions']}", flush=True)
    try:
        return run(arguments.chosen, context)
    except KeyboardInterrupt:
        print("\nstopped; what was measured is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
