"""Bit comparison: the same optimizer steps and dropout masks on two devices, and against hashes of other
machines.

python -m bench.golden --device cpu --write bench/goldens.json
python -m bench.golden --device cuda        compares with the CPU here and with bench/goldens.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import braze.optim
import torch
from torch import Tensor
from torch.nn import Parameter

from .files import announce, emit, is_fatal, read_json, write_json
from .golden_cases import CASES, LAYOUTS, Case
from .golden_masks import MASKS, Mask
from .host import load_emulated

GOLDENS = Path(__file__).with_name("goldens.json")
UPDATES = 3
WEIGHTS = (1.0, 2.5, 0.25)
Results = dict[str, Tensor]


def values(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Finite numbers between 2^-9 and 2 and zeros of both signs, from a hash: the same with any torch."""
    real = torch.view_as_real(torch.empty(0, dtype=dtype)).dtype if dtype.is_complex else dtype
    count = torch.Size(shape).numel() * (2 if dtype.is_complex else 1)
    raw = hashlib.shake_128(key.encode()).digest(8 * count)
    words = torch.frombuffer(bytearray(raw or bytes(8)), dtype=torch.int32)[: 2 * count].view(-1, 2)
    # 24 bits and a power of two: exact in fp32. One in 64 is zero.
    x = (words[:, 0] >> 8).to(torch.float32) * 2.0**-22
    x = x * torch.pow(2.0, -(words[:, 1] & 7).to(torch.float32))
    x = torch.where((words[:, 1] >> 8) & 63 == 0, x * 0.0, x).to(real)
    return torch.view_as_complex(x.view(*shape, 2)) if dtype.is_complex else x.view(shape)


def run_case(case: Case | Mask, device: str) -> Results:
    """Runs the case. Returns every parameter and every state tensor after it, or the mask, on the CPU."""
    if isinstance(case, Mask):
        return case.run(device)
    place, place_grad = LAYOUTS[case.layout]
    params = []
    for i, shape in enumerate(case.shapes):
        x = values(f"{case.name}/p{i}", shape, case.dtype).to(device)
        params.append(Parameter(place(x)))
    groups: Any = [{"params": [p]} for p in params] if case.group_each else params
    opt: Any = getattr(braze.optim, case.optimizer)(groups, lr=0.05, **case.options)
    grad_dtype = case.grad_dtype or case.dtype
    micro = case.micro or len(WEIGHTS)
    for step in range(UPDATES * micro):
        for i, p in enumerate(params):
            g = values(f"{case.name}/g{i}/{step}", tuple(p.shape), grad_dtype).to(device)
            if grad_dtype != case.dtype:
                p.grad_dtype = grad_dtype
            p.grad = place_grad(g)
        if case.scale != 1.0:
            opt.grad_scale = torch.full((), case.scale, device=device)
            opt.found_inf = torch.full((), float(step == 1), device=device)
        if case.micro == 0:
            opt.accumulate(WEIGHTS[step % micro])
        if case.micro != 0 or (step + 1) % micro == 0:
            opt.step()
    results = {}
    for i, p in enumerate(params):
        results[f"p{i}"] = p.detach().cpu()
        if case.layout != "dense":  # what lies between and around the elements must stay
            memory = torch.empty(0, dtype=torch.uint8, device=device).set_(p.untyped_storage())
            results[f"p{i}.memory"] = memory.cpu()
        for key, value in sorted(opt.state[p].items()):
            if isinstance(value, Tensor):
                results[f"p{i}.{key}"] = value.detach().cpu()
    return results


def run_on(case: Case | Mask, device: str) -> Results:
    """As run_case; "emulated" runs the CUDA sources on the CPU, by the emulator of the tests."""
    if device != "emulated":
        return run_case(case, device)
    emulated = load_emulated()
    before = emulated.launch_count(0)
    emulated.enable(True)
    try:
        results = run_case(case, "cpu")
    finally:
        emulated.enable(False)
    if emulated.launch_count(0) == before:
        raise RuntimeError("the emulated device ran nothing: this compares the CPU with itself")
    return results


def bits(x: Tensor) -> Tensor:
    """The tensor's bytes, in the order of its elements."""
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
    results = run_case(case, "cpu")
    if difference(results, run_case(case, "cpu")):
        return "two equal runs compare as different"
    name, x = next((n, x) for n, x in results.items() if x.numel() > 3)
    flipped = x.clone()
    bits(flipped)[-1] ^= 1
    other = {**results, name: flipped}
    if not difference(results, other) or digest(results) == digest(other):
        return "a flipped bit was not seen"
    return ""


def _row(case: Case | Mask, device: str, goldens: dict[str, str], compare: bool) -> dict[str, Any]:
    """Never raises: what went wrong is the row's."""
    row: dict[str, Any] = {"name": case.name, "ok": False}
    try:
        results = run_on(case, device)
        row["sha256"] = digest(results)
        notes = []
        if compare:
            reference = results if device == "cpu" else run_case(case, "cpu")
            found = difference(results, reference)
            notes += [f"{device} against the CPU: {found}"] if found else []
            known = goldens.get(case.name)
            if known is not None and known != digest(reference):
                notes.append("the CPU here computes other bits than goldens.json")
            if known is not None and known != row["sha256"]:
                notes.append(f"{device} computes other bits than goldens.json")
            row["known"] = known is not None
        row["ok"] = not notes
        row["note"] = "; ".join(notes)[:500]
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {error}"[:500]
    return row


def select(only: str, short: bool, skip: Iterable[str]) -> list[Case | Mask]:
    """Cases whose name contains ``only``, without those to skip."""
    left_out = set(skip)
    every: tuple[Case | Mask, ...] = (*CASES, *MASKS)
    return [
        c for c in every if only in c.name and c.name not in left_out and (c.short or not short)
    ]


def main(argv: list[str]) -> int:
    """Returns 0 if every bit is as it should be, 1 otherwise, 2 for bad arguments, 3 after a fatal error."""
    parser = argparse.ArgumentParser(prog="python -m bench.golden", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "emulated"), default="cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--short", action="store_true", help="the sanitizers' small selection")
    parser.add_argument("--no-compare", action="store_true", help="only run and hash")
    parser.add_argument("--goldens", type=Path, default=GOLDENS, help="hashes to compare with")
    parser.add_argument("--write", type=Path, help="write the hashes to this file")
    parser.add_argument("--skip-file", type=Path, help="a JSON list of case names to leave out")
    parser.add_argument("--rows", action="store_true", help="print each row as ROW {json}")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device; use --device cpu")
    skip = json.loads(arguments.skip_file.read_text()) if arguments.skip_file else []
    cases = select(arguments.only, arguments.short, skip)
    if not cases and not skip:
        parser.error(f"no case's name contains '{arguments.only}'")
    compare = not arguments.no_compare
    if compare and arguments.write is None and not arguments.goldens.is_file():
        parser.error(f"{arguments.goldens} is missing; name it with --goldens, or make it: --write")
    broken = self_check()
    if broken:
        print(f"golden: the comparison itself is broken: {broken}", file=sys.stderr)
        return 1
    goldens = {} if arguments.write else (read_json(arguments.goldens) or {}).get("cases", {})
    rows = []
    for case in cases:
        if arguments.rows:
            announce(case.name)
        row = _row(case, arguments.device, goldens, compare)
        rows.append(row)
        if arguments.rows:
            emit(row)
        elif arguments.write is None or not row["ok"]:
            print(f"{'ok  ' if row['ok'] else 'FAIL'} {row['name']} {row['note']}", flush=True)
        if is_fatal(row["note"]):
            return 3
    failed = sum(not row["ok"] for row in rows)
    if arguments.write is not None and not failed:
        write_json({"cases": {row["name"]: row["sha256"] for row in rows}}, arguments.write)
    print(f"{len(rows)} cases, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
