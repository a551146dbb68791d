"""A program's rows: each is announced, measured, printed and written on its own, so that a kill costs one."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def writable(text: str) -> Path:
    """The type of an option that names a file, or a folder, to be written."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: no permission")
    return path


def add_options(parser: argparse.ArgumentParser, devices: Sequence[str] = ()) -> None:
    """The options that all programs share: of :func:`run` and :func:`choose`."""
    add = parser.add_argument
    if devices:
        add("--device", choices=devices, default=devices[0], help=f"default: {devices[0]}")
    add(
        "--filter",
        action="append",
        default=[],
        metavar="TEXT",
        help="rows with this in their name; may be repeated",
    )
    add("--json", type=writable, help="write all figures to this file, row by row")
    # For bench/gpu.py: row names to leave out, and each row as ROW {json}.
    add("--skip-file", type=Path, help=argparse.SUPPRESS)
    add("--rows", action="store_true", help=argparse.SUPPRESS)


def choose(names: Sequence[str], filters: Sequence[str]) -> list[str]:
    """The names that contain one of ``filters``, or all. Raises Hopeless if that leaves none."""
    chosen = [name for name in names if not filters or any(part in name for part in filters)]
    if not chosen:
        some = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
        raise Hopeless(f"no row's name contains '{' or '.join(filters)}'; there are: {some}")
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
        row["note"] = reason(error)
    return row


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def each(work: Iterable[Work], arguments: argparse.Namespace) -> Iterator[Row]:
    """Measures what is not to be skipped; ends after an error that leaves the device unusable."""
    skip = set(json.loads(arguments.skip_file.read_text()) if arguments.skip_file else [])
    for one in work:
        if one.name in skip:
            continue
        if arguments.rows:
            print(f"\nBEGIN {one.name}", flush=True)
        row = fill(one)
        if arguments.rows:
            emit(row)
        yield row
        if is_fatal(row.get("note", "")):
            return


def emit(row: Row) -> None:
    """Hands a finished row to the driver."""
    print(f"\nROW {json.dumps(row)}", flush=True)


def code_of(rows: Sequence[Row]) -> int:
    """0; 1 if a row failed; 3 after an error that leaves the device unusable."""
    if any(is_fatal(row.get("note", "")) for row in rows):
        return 3
    return 0 if all(row["ok"] is not False for row in rows) else 1


def run(
    work: Iterable[Work],
    arguments: argparse.Namespace,
    result: dict[str, Any],
    show: Callable[[Row], str],
) -> int:
    """All rows, printed and written as they come. Returns :func:`code_of` them."""
    rows: list[Row] = result.setdefault("rows", [])
    for row in each(work, arguments):
        rows.append(row)
        print(show(row), flush=True)
        if arguments.json is not None:
            write_json(result, arguments.json)
    return code_of(rows)
