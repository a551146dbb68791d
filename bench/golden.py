"""The same work on two devices: optimizer steps, dropout and convolutions with exact sums bit for bit, also
against hashes of other machines; batch norm, whose sums have another order, within its tolerance.

python -m bench golden --device cpu --write bench/goldens.json
python -m bench golden --device cuda        compares with the CPU here and with bench/goldens.json
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import clock, rows
from .files import read_json, write_json
from .golden_cases import CASES, Case, Golden, Results
from .golden_conv import CONVS
from .golden_passes import PASSES
from .host import load_emulated
from .rows import Hopeless, Row, Work

GOLDENS = Path(__file__).with_name("goldens.json")
EVERY: tuple[Case | Golden, ...] = (*CASES, *PASSES, *CONVS)


def run_on(case: Case | Golden, device: str) -> Results:
    """Runs the case; "emulated" runs the CUDA sources on the CPU, by the emulator of the tests."""
    if device != "emulated":
        return case.run(device)
    emulated = load_emulated()
    before = emulated.launch_count(0)
    emulated.enable(True)
    try:
        results = case.run("cpu")
    finally:
        emulated.enable(False)
    if emulated.launch_count(0) == before:
        raise RuntimeError("the emulated device ran nothing: this compares the CPU with itself")
    return results


def bits(x: Tensor) -> Tensor:
    """The tensor's bytes, in the order of its elements; a 16-bit NaN is as good as any other."""
    if x.dtype in (torch.bfloat16, torch.float16):
        x = torch.where(x.isnan(), torch.nan, x)
    return x.contiguous().reshape(-1).view(torch.uint8)


def digest(results: Results) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name, x in results.items():
        total.update(f"{name} {x.dtype} {tuple(x.shape)}\0".encode())
        total.update(bits(x).numpy().tobytes())
    return total.hexdigest()


def difference(ours: Results, theirs: Results) -> str:
    """Where two results first differ, for a person; "" if every bit is the same."""
    if list(ours) != list(theirs):
        return f"other tensors: {sorted(set(ours) ^ set(theirs)) or 'other order'}"
    wrong = []
    for name, a in ours.items():
        b = theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            wrong.append(f"{name}: {a.dtype}{tuple(a.shape)} against {b.dtype}{tuple(b.shape)}")
        elif not torch.equal(bits(a), bits(b)):
            pairs = (bits(a) != bits(b)).view(max(a.numel(), 1), -1).any(1)
            at = int(pairs.nonzero()[0])
            x, y = a.reshape(-1)[at].item(), b.reshape(-1)[at].item()
            wrong.append(f"{name}: {int(pairs.sum())} of {a.numel()}, first [{at}] {x!r} != {y!r}")
    return f"{len(wrong)} of {len(ours)} tensors differ; {wrong[0]}" if wrong else ""


def self_check() -> str:
    """Flips one bit and asks the comparison to see it. Returns what it failed to see, or ""."""
    case = next(c for c in CASES if c.short)
    results = case.run("cpu")
    if difference(results, case.run("cpu")):
        return "two equal runs compare as different"
    name, x = next((n, x) for n, x in results.items() if x.numel() > 3)
    flipped = x.clone()
    bits(flipped)[-1] ^= 1
    other = {**results, name: flipped}
    if not difference(results, other) or digest(results) == digest(other):
        return "a flipped bit was not seen"
    return ""


def distance(ours: Results, theirs: Results, tolerance: float) -> str:
    """As :func:`difference`, but for what is further apart than ``tolerance`` of the largest element."""
    if list(ours) != list(theirs):
        return difference(ours, theirs)
    wrong = []
    for name, a in ours.items():
        b = theirs[name].double()
        allowed = tolerance * float(b.abs().max()) if b.numel() else 0.0
        worst = float((a.double() - b).abs().max()) if b.numel() else 0.0
        if not worst <= allowed:  # nan too
            wrong.append(f"{name}: off by {worst:.2e}, {allowed:.2e} allowed")
    return f"{len(wrong)} of {len(ours)} tensors differ; {wrong[0]}" if wrong else ""


def measure(
    case: Case | Golden, device: str, goldens: dict[str, str], compare: bool, row: Row
) -> None:
    """One row."""
    results = run_on(case, device)
    notes = []
    if case.tolerance is None:
        row["sha256"] = digest(results)
    if compare:
        reference = results if device == "cpu" else case.run("cpu")
        if case.tolerance is None:
            found = difference(results, reference)
        else:
            found = distance(results, reference, case.tolerance)
        notes += [f"{device} against the CPU: {found}"] if found else []
        known = goldens.get(case.name)
        if known is not None and known != digest(reference):
            notes.append("the CPU here computes other bits than goldens.json")
        if known is not None and known != row["sha256"]:
            notes.append(f"{device} computes other bits than goldens.json")
        row["known"] = known is not None
    row["ok"] = not notes
    row["note"] = "; ".join(notes)[:500]


def line(row: Row) -> str:
    return f"{'ok  ' if row['ok'] else 'FAIL'} {row['name']} {row.get('note', '')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--short", action="store_true", help="a few of every kernel family")
    parser.add_argument("--no-compare", action="store_true", help="only run and hash")
    parser.add_argument("--goldens", type=Path, default=GOLDENS, help="hashes to compare with")
    parser.add_argument("--write", type=Path, help="write the hashes to this file")
    rows.add_options(parser, ("cpu", "cuda", "emulated"))


def run(arguments: argparse.Namespace) -> int:
    """Returns :func:`rows.run`'s code."""
    if arguments.device == "cuda":
        clock.open_clock("cuda")
    names = rows.choose([case.name for case in EVERY], arguments.filter)
    cases = [c for c in EVERY if c.name in names and (c.short or not arguments.short)]
    compare = not arguments.no_compare
    if compare and arguments.write is None and not arguments.goldens.is_file():
        raise Hopeless(
            f"{arguments.goldens} is missing; name it with --goldens, or make it: --write"
        )
    broken = self_check()
    if broken:
        print(f"golden: the comparison itself is broken: {broken}", file=sys.stderr)
        return 1
    goldens = {} if arguments.write else (read_json(arguments.goldens) or {}).get("cases", {})

    def work(case: Case | Golden) -> Work:
        return Work(case.name, lambda row: measure(case, arguments.device, goldens, compare, row))

    result: dict[str, Any] = {}
    code = rows.run(map(work, cases), arguments, result, line)
    if arguments.write is not None and code == 0:
        hashes = {row["name"]: row["sha256"] for row in result["rows"] if "sha256" in row}
        write_json({"cases": hashes}, arguments.write)
    failed = sum(row["ok"] is False for row in result["rows"])
    print(f"{len(result['rows'])} cases, {failed} failed", file=sys.stderr)
    return code
