"""Two results of the same benchmark: SAME, FASTER, SLOWER or UNCLEAR, row by row.

Compared is braze's time as a share of torch's in the same turn, so that a slower phase of the machine cancels;
where one result lacks torch, braze's time alone, which the table says. Each side is the interval in which the
median lies with 99 % confidence. SLOWER and FASTER: the intervals are apart by more than the least change that
counts, which is --threshold, or what braze may differ from itself by the A/A rows of the same suite. SAME: the
change is less than --threshold wherever in the intervals the medians are. UNCLEAR: the turns cannot tell. Exit
code 1 if any row is SLOWER.
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
# Of the ranks around the median, in units of sqrt(n): half of the normal distribution's 99 % point.
_RANKS = 1.288
# Below so many values all of them are in the interval, and it is wider than they are: see interval().
_FEW = 8


@dataclass(frozen=True)
class Verdict:
    """``change``: braze's time in the second result by that in the first, the medians; ``low``, ``high``: its
    bounds. ``alone``: without torch."""

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
    rows = data.get("rows")
    whole = isinstance(rows, list) and all(isinstance(r, dict) and "name" in r for r in rows)
    if not (whole and isinstance(data.get("environment"), dict)):
        raise Hopeless(f"{path} is damaged: it has no rows with names, or no environment")
    return data


def _times(row: Row, who: str | None, figure: str) -> dict[str, Any]:
    found: dict[str, Any] = (row.get("contenders") or {}).get(who, {}).get(figure, {})
    return found


def _shared(old: Row, new: Row) -> tuple[str, str | None] | None:
    """A figure that braze has in both rows, and one of torch's contenders, None if only one row has it.

    Of both rows the same: the fastest of torch's modes may be another one in another run.
    """
    for figure in (old.get("figure"), new.get("figure")):
        if figure and all(_times(row, OURS, figure).get("median_us") for row in (old, new)):
            for who in (old.get("theirs"), new.get("theirs")):
                if who and all(_times(row, who, figure).get("median_us") for row in (old, new)):
                    return figure, who
            return figure, None
    return None


def _shares(row: Row, figure: str, who: str | None) -> list[float]:
    """braze's time as a share of that contender's, or in microseconds, turn by turn; the quotient of
    medians where turns were not kept."""
    ours = _times(row, OURS, figure)
    if who is None:
        known = [value for value in ours.get("rounds_us", ()) if value is not None]
        return known or [ours["median_us"]]
    theirs = _times(row, who, figure)
    kept = "rounds_us" in ours and "rounds_us" in theirs
    return (ratios_of(ours, theirs) if kept else []) or [ours["median_us"] / theirs["median_us"]]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """In which the median lies with 99 % confidence, by ranks.

    Three values have it between them in 75 of 100 cases, seven in 98: for fewer than eight the interval is
    their range and, on either side, 3 / (n - 1) times that. One value, or two, tell nothing of their spread.
    """
    ordered, n = sorted(values), len(values)
    if n < 3:
        return 0.0, math.inf
    if n < _FEW:
        more = (ordered[-1] - ordered[0]) * 3 / (n - 1)
        return max(0.0, ordered[0] - more), ordered[-1] + more
    away = _RANKS * math.sqrt(n)
    first = max(0, math.floor(n / 2 - away))
    last = min(n - 1, math.ceil(n / 2 + away) - 1)
    return ordered[first], ordered[last]


def noise(data: Sequence[dict[str, Any]], suite: str | None = None) -> float:
    """The most by which braze may differ from itself, as a share; 0 where there is no control.

    By the intervals of the A/A rows: a median that happens to be 1.00 is no sign of silence. ``suite``: only of
    its rows; where it has none, of all.
    """
    rows = [row for one in data for row in one["rows"] if row["name"].startswith(CONTROL)]
    rows = [row for row in rows if row.get("suite") == suite] or rows
    return max((_noise(row) for row in rows), default=0.0)


def _noise(row: Row) -> float:
    if not row.get("ratio"):
        return 0.0
    figure, known = row.get("figure", ""), [row["ratio"]]
    turns = _shares(row, figure, row.get("theirs")) if _shared(row, row) else []
    if len(turns) > 2:
        known += interval(turns)
    return math.expm1(max(abs(math.log(value)) for value in known if value > 0))


def judge(old: Row, new: Row, threshold: float, noise: float = 0.0) -> Verdict | None:
    """Shares: SAME is less than ``threshold``, a change more than both. None where a row has no times."""
    if (shared := _shared(old, new)) is None:
        return None
    before, after = _shares(old, *shared), _shares(new, *shared)
    (a, b), (c, d) = interval(before), interval(after)
    low, high = c / b, d / a if a else math.inf
    change = statistics.median(after) / statistics.median(before)
    least = max(threshold, noise)
    if low > 1 + least:
        word = "SLOWER"
    elif high < 1 / (1 + least):
        word = "FASTER"
    else:
        word = "SAME" if 1 / (1 + threshold) <= low and high <= 1 + threshold else "UNCLEAR"
    return Verdict(word, change, low, high, shared[1] is None)


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("old", type=Path, help="a file that --json wrote")
    add("new", type=Path, help="another")
    add(
        "--threshold",
        type=_percent,
        default=3.0,
        help="percent that count at the least (default 3)",
    )


def _place(data: dict[str, Any]) -> dict[str, Any]:
    where = data["environment"]
    return {**where, "GPU": (where.get("gpu") or {}).get("name")}


def run(arguments: argparse.Namespace) -> int:
    """Prints the table. Returns 1 if a row is SLOWER, else 0; raises Hopeless for files that do not compare."""
    view.require()
    from rich.markup import escape
    from rich.table import Table

    data = [load(arguments.old), load(arguments.new)]
    old, new = (
        {key_of(row): row for row in one["rows"] if not row["name"].startswith(CONTROL)}
        for one in data
    )
    shared = [key for key in old if key in new]
    if not shared:
        raise Hopeless(f"{arguments.old} and {arguments.new} have no row in common")
    out = view.console()
    for what in ("machine", "GPU", "torch"):
        seen = [_place(one).get(what) for one in data]
        if seen[0] != seen[1]:
            out.print(f"[yellow]not the same {what}: {seen[0]}; {seen[1]}[/]")
    table = Table("", "time of braze", "bounds", "counts", "", box=view.box())
    words: list[str] = []
    for key in shared:
        threshold, own = arguments.threshold / 100, noise(data, old[key].get("suite"))
        verdict = judge(old[key], new[key], threshold, own)
        name = escape(" ".join(str(part) for part in (key[1], key[0], *key[3:])))
        if verdict is None:
            notes = [f"{row['note']}" for row in (old[key], new[key]) if row.get("note")]
            table.add_row(name, "-", "-", "-", escape("; ".join(["no times", *notes])))
            continue
        words.append(verdict.word)
        bounds = f"{verdict.low - 1:+.1%} to {verdict.high - 1:+.1%}"
        table.add_row(
            name,
            f"{verdict.change - 1:+.1%}",
            bounds if verdict.high < math.inf else "too few turns",
            f"{max(threshold, own):.1%}",
            f"{verdict.word}{', without torch' if verdict.alone else ''}",
            style=COLOURS[verdict.word],
        )
    out.print(table)
    for path, more in ((arguments.old, old.keys() - new), (arguments.new, new.keys() - old)):
        if more:
            names = ", ".join(sorted({str(key[1]) for key in more}))
            out.print(f"{len(more)} only in {path}: {names}", markup=False)
    out.print(", ".join(f"{words.count(word)} {word}" for word in COLOURS))
    return 1 if "SLOWER" in words else 0
