"""Two results of the same benchmark: SAME, FASTER, SLOWER or UNCLEAR, row by row.

Compared is braze's time as a share of torch's in the same turn, so that a slower phase of the machine cancels;
where one result has no torch, braze's time alone, which the table says. Each side is the interval in which the
median lies with 95 % confidence. SLOWER and FASTER: the intervals are apart by more than the least change that
counts, which is --threshold, or what braze differs from itself in the A/A rows. SAME: they cannot be. Exit code
1 if any row is SLOWER.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import view
from .files import read_json
from .harness import CONTROL, OURS, ratios_of
from .rows import Hopeless, Row
from .session import FORMAT, key_of

COLOURS = {"SAME": "", "FASTER": "green", "SLOWER": "red", "UNCLEAR": "yellow"}


@dataclass(frozen=True)
class Verdict:
    """``low``, ``high``: bounds of how much longer braze takes in the second result, as a factor."""

    word: str
    change: float
    low: float
    high: float
    alone: bool


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises Hopeless if it is none."""
    data = read_json(path)
    if data is None or data.get("format") != FORMAT:
        raise Hopeless(f"{path} is no result of braze bench --json (format {FORMAT})")
    return data


def _shares(row: Row, alone: bool) -> list[float]:
    """braze's time as a share of torch's, or in microseconds, turn by turn."""
    contenders, figure = row["contenders"], row["figure"]
    ours = contenders[OURS][figure]
    if alone:
        return [value for value in ours["rounds_us"] if value is not None]
    return ratios_of(ours, contenders[row["theirs"]][figure])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """In which the median lies with 95 % confidence, by ranks; all there is, for fewer than eight values."""
    ordered = sorted(values)
    n = len(ordered)
    away = 0.98 * math.sqrt(n) if n >= 8 else n
    return ordered[max(0, math.floor(n / 2 - away))], ordered[
        min(n - 1, math.ceil(n / 2 + away) - 1)
    ]


def noise(data: Sequence[dict[str, Any]]) -> float:
    """The most by which braze differed from itself, as a share; 0 where there is no control."""
    rows = [row for one in data for row in one["rows"] if row["name"].startswith(CONTROL)]
    return max((abs(math.log(row["ratio"])) for row in rows if row.get("ratio")), default=0.0)


def judge(old: Row, new: Row, least: float) -> Verdict | None:
    """None where one of them has no times."""
    if not (old.get("contenders") and new.get("contenders")):
        return None
    alone = not (old.get("theirs") and new.get("theirs")) or old["figure"] != new["figure"]
    before, after = _shares(old, alone), _shares(new, alone)
    if not (before and after):
        return None
    (a, b), (c, d) = interval(before), interval(after)
    low, high = c / b, d / a
    change = statistics.median(after) / statistics.median(before)
    if low > 1 + least:
        word = "SLOWER"
    elif high < 1 / (1 + least):
        word = "FASTER"
    else:
        word = "SAME" if 1 / (1 + least) <= low and high <= 1 + least else "UNCLEAR"
    return Verdict(word, change, low, high, alone)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("old", type=Path, help="a file that --json wrote")
    add("new", type=Path, help="another")
    add("--threshold", type=float, default=3.0, help="percent that count at the least (default 3)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table. Returns 1 if a row is SLOWER, else 0; raises Hopeless for files that do not compare."""
    view.require()
    from rich.table import Table

    data = [load(arguments.old), load(arguments.new)]
    old, new = ({key_of(row): row for row in one["rows"]} for one in data)
    shared = [key for key in old if key in new and not old[key]["name"].startswith(CONTROL)]
    if not shared:
        raise Hopeless(f"{arguments.old} and {arguments.new} have no row in common")
    least = max(arguments.threshold / 100, noise(data))
    out = view.console()
    for what in ("machine", "torch"):
        seen = [one["environment"][what] for one in data]
        if seen[0] != seen[1]:
            out.print(f"[yellow]not the same {what}: {seen[0]}; {seen[1]}[/]")
    table = Table("", "time of braze", "bounds", "", box=view.box())
    words: list[str] = []
    for key in shared:
        verdict = judge(old[key], new[key], least)
        name = " ".join(str(part) for part in (key[1], key[0], *key[3:]))
        if verdict is None:
            table.add_row(name, "-", "-", "no times")
            continue
        words.append(verdict.word)
        alone = ", without torch" if verdict.alone else ""
        bounds = f"{verdict.low - 1:+.1%} to {verdict.high - 1:+.1%}"
        word = f"{verdict.word}{alone}"
        table.add_row(name, f"{verdict.change - 1:+.1%}", bounds, word, style=COLOURS[verdict.word])
    out.print(table)
    for path, more in ((arguments.old, old.keys() - new), (arguments.new, new.keys() - old)):
        if more := {key for key in more if not key[1].startswith(CONTROL)}:
            out.print(f"only in {path}: {', '.join(sorted(key[1] for key in more))}")
    counts = ", ".join(f"{words.count(word)} {word}" for word in COLOURS)
    out.print(f"{counts}; less than {least:.1%} does not count")
    return 1 if "SLOWER" in words else 0
