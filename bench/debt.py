"""Which steps of the GPU run have no result for their present sources. Standard library only.

Looked at are the newest results in bench/results/. A step's debt is paid by a result that was measured on the
present sources, complete and without failures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .files import read_json
from .gpu_steps import STEPS, Step
from .rows import Hopeless
from .sources import find_root


def _verdicts(root: Path, step: Step) -> list[dict[str, Any]]:
    """Of any GPU, oldest first."""
    found = [
        verdict
        for path in root.glob("bench/results/*/gpu.json")
        if (data := read_json(path)) is not None
        and data.get("device", {}).get("type") == "cuda"
        and (verdict := data.get("steps", {}).get(step.name)) is not None
    ]
    return sorted(found, key=lambda verdict: str(verdict.get("date", "")))


def _complaint(verdicts: list[dict[str, Any]], present: str) -> str:
    """What is wrong with the newest result for the present sources; "" if nothing is."""
    if not verdicts:
        return "no result of any GPU"
    last = verdicts[-1]
    where = f"(newest: {last.get('device', '?')}, {last.get('date', '?')})"
    current = [verdict for verdict in verdicts if verdict.get("sources") == present]
    # A machine without the tool says nothing against one that had it.
    able = [verdict for verdict in current if verdict.get("available", True)]
    if not current:
        return f"measured on other sources {where}"
    if not able:
        return f"not available {where}"
    if not able[-1].get("complete"):
        return f"incomplete {where}"
    return "" if able[-1].get("ok") else f"failed {where}"


def find_debt(root: Path) -> list[str]:
    """One line for every step whose result is missing, outdated, incomplete or failed."""
    lines = []
    for step in STEPS:
        complaint = _complaint(_verdicts(root, step), step.sources(root))
        if complaint and step.name != "build":
            lines.append(f"{step.name}: {complaint}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="source checkout (default: the current one)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the debt. Returns 1 if there is any, 0 if there is none; Hopeless outside a source checkout."""
    try:
        lines = find_debt(find_root(arguments.root))
    except FileNotFoundError as error:
        raise Hopeless(str(error)) from error
    if not lines:
        print("no debt: every step has a GPU's result for the present sources")
        return 0
    print("\n".join(lines))
    print("\nTo pay: make gpu   (on a machine with a CUDA GPU; then commit bench/results/)")
    return 1
