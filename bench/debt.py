"""Which kernel families have no GPU result for their present sources. Standard library only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .files import read_json
from .sources import FAMILIES, family_digest, find_root

# One result file each; together they are what a GPU has to say about a family. Tests, bits and sanitizers are
# of all families, in the results of the first.
KINDS: dict[str, tuple[str, ...]] = {
    "optimizer": ("test", "golden", "sanitize", "optim"),
    "batch_norm": ("batch_norm",),
    "dropout": ("dropout",),
}


def _results(root: Path, family: str, kind: str) -> list[dict[str, Any]]:
    """Of any GPU, oldest first."""
    results = [
        data
        for path in root.glob(f"bench/results/*/{kind}.json")
        if (data := read_json(path)) is not None
        and data.get("family") == family
        and data.get("device", {}).get("type") == "cuda"
    ]
    return sorted(results, key=lambda data: str(data.get("date", "")))


def _complaint(results: list[dict[str, Any]], present: str) -> str:
    """What is wrong with the newest result for the present sources; "" if nothing is."""
    current = [data for data in results if data.get("sources") == present]
    # A machine without the tool says nothing against one that had it.
    able = [data for data in current if data.get("available", True)]
    if not current:
        return "was measured on other sources"
    if not able:
        return "was not available"
    if not able[-1].get("complete"):
        return "is incomplete"
    return "" if able[-1].get("ok") else "failed"


def find_debt(root: Path) -> list[str]:
    """One line for every family and kind of result that is missing, outdated, incomplete or failed."""
    lines = []
    for family in FAMILIES:
        present = family_digest(root, family)
        for kind in KINDS[family]:
            results = _results(root, family, kind)
            if not results:
                lines.append(f"{family}: no {kind} result of any GPU")
                continue
            complaint = _complaint(results, present)
            if complaint:
                last = results[-1]
                where = f"{last['device'].get('name', '?')}, {last.get('date', '?')}"
                lines.append(f"{family}: {kind} {complaint} (newest: {where})")
    return lines


def main(argv: list[str]) -> int:
    """Prints the debt. Returns 1 if there is any, 0 if there is none, 2 outside a source checkout."""
    parser = argparse.ArgumentParser(
        prog="python -m braze bench debt",
        description="Lists kernel families whose newest GPU results (bench/results/) were measured on "
        "other sources than the present ones, failed, or do not exist.",
    )
    parser.add_argument("--root", type=Path, help="source checkout (default: the current one)")
    try:
        root = find_root(parser.parse_args(argv).root)
    except FileNotFoundError as error:
        print(f"braze bench debt: {error}", file=sys.stderr)
        return 2
    lines = find_debt(root)
    if not lines:
        print("no debt: every kernel family has GPU results for its present sources")
        return 0
    print("\n".join(lines))
    print("\nTo pay: make gpu   (on a machine with a CUDA GPU; then commit bench/results/)")
    return 1
