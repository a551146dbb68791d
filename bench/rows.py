"""A program's rows: each is announced, measured, printed and written on its own, so that a kill costs one."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import write_json

Row = dict[str, Any]


class Hopeless(argparse.ArgumentError):
    """No row of the program can be measured; the text is for a person."""

    def __init__(self, why: str) -> None:
        super().__init__(None, why)


@dataclass(frozen=True)
class Work:
    """``measure`` fills the row that it is given; what it raises becomes the row's note."""

    name: str
    measure: Callable[[Row], None]


def count(text: str) -> int:
    """The type of an option that is a number of something."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_options(
    parser: argparse.ArgumentParser,
    devices: Sequence[str] = (),
    seconds: float | None = None,
    per: str = "row",
) -> None:
    """The options that benchmarks share: of :func:`run` and :func:`choose`, and those that have a default."""
    add = parser.add_argument
    if devices:
        add("--device", choices=devices, default=devices[0], help=f"default: {devices[0]}")
    if seconds is not None:
        add("--seconds", type=float, default=seconds, help=f"per {per} (default {seconds:g})")
        add("--threads", type=count, help="of the CPU (default: torch's)")
        importlib.import_module(".isa", __package__).add_option(parser)  # which imports braze
    add("--only", action="append", default=[], help="rows with this in their name; may be repeated")
    add("--json", type=Path, help="also write all figures to this file, row by row")
    add("--skip-file", type=Path, help="a JSON list of row names to leave out")
    add("--rows", action="store_true", help="print each row as ROW {json}")


def choose(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """The names that contain one of ``only``, or all. Raises Hopeless if that leaves none."""
    chosen = [name for name in names if not only or any(part in name for part in only)]
    if not chosen:
        some = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
        raise Hopeless(f"no row's name contains '{' or '.join(only)}'; there are: {some}")
    return chosen


def is_fatal(note: str) -> bool:
    """Whether that error leaves the CUDA context unusable: every later row would fail with it."""
    return "CUDA error" in note and "captur" not in note and "out of memory" not in note


def goal(text: str, value: float, met: bool) -> dict[str, Any]:
    """An entry of a row's ``goals``."""
    return {"goal": text, "value": value, "met": met}


def fill(work: Work) -> Row:
    """The measured row. Raises nothing but Hopeless: ``ok`` is False and ``note`` tells why, what was measured
    stays."""
    row: Row = {"name": work.name, "ok": True}
    try:
        work.measure(row)
    except Hopeless:
        raise
    except Exception as error:
        row["ok"] = False
        row["note"] = f"{type(error).__name__}: {error}"[:500]
    return row


def run(
    work: Iterable[Work],
    arguments: argparse.Namespace,
    result: dict[str, Any],
    lines: Callable[[Row], str],
) -> int:
    """Measures what is not to be skipped.

    Returns:
        0; 1 if a row failed; 3 after an error that leaves the device unusable.
    """
    skip = set(json.loads(arguments.skip_file.read_text()) if arguments.skip_file else [])
    rows: list[Row] = result.setdefault("rows", [])
    for one in work:
        if one.name in skip:
            continue
        if arguments.rows:
            print(f"\nBEGIN {one.name}", flush=True)
        row = fill(one)
        rows.append(row)
        print(lines(row), flush=True)
        for entry in row.get("goals", []):
            met = "met" if entry["met"] else "MISSED"
            print(f"    goal {met}: {entry['goal']}; here {entry['value']:.2f}", flush=True)
        if arguments.rows:
            emit(row)
        if arguments.json is not None:
            write_json(result, arguments.json)
        if is_fatal(row.get("note", "")):
            return 3
    return 0 if all(row["ok"] is not False for row in rows) else 1


def emit(row: Row) -> None:
    """Hands a finished row to the driver."""
    print(f"\nROW {json.dumps(row)}", flush=True)
