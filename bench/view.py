"""What a person sees of a benchmark: progress with the time left, and tables, by rich."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from .harness import AGAIN, CONTROL, OURS
from .rows import Hopeless, Row


def require() -> None:
    """Raises Hopeless, with the command, where rich is missing."""
    if importlib.util.find_spec("rich") is None:
        raise Hopeless("rich is not installed, which shows tables; pip install 'braze[bench]'")


def console() -> Any:
    """As wide as the terminal; a file gets whole lines."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=150)


def box() -> Any:
    from rich.box import SIMPLE_HEAD

    return SIMPLE_HEAD


def duration(us: float | None) -> str:
    """Three digits and a unit."""
    if us is None:
        return "-"
    for limit, scale, unit in ((1e3, 1, "us"), (1e6, 1e3, "ms")):
        if us < 0.9995 * limit:
            return f"{us / scale:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def amount(count: float | None) -> str:
    """Bytes, in 10^3 and so on."""
    if count is None:
        return "-"
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 9.95 else f"{value:.0f}x"


def colour(row: Row) -> str:
    """By the middle half of a row's ratios: all above 1, all below, or neither."""
    low, high = row.get("low") or row.get("ratio"), row.get("high") or row.get("ratio")
    if low is None or high is None:
        return ""
    return "green" if low > 1 else "red" if high < 1 else ""


def table(rows: Sequence[Row], title: str) -> Any:
    """One line a row; of peers those that are in any of the rows."""
    from rich.table import Table

    shown = [row for row in rows if row.get("contenders")]
    peers = list(
        dict.fromkeys(
            name
            for row in shown
            for name in row["contenders"]
            if name not in (OURS, row.get("theirs"), AGAIN)
        )
    )
    if rows[0]["suite"] == "optim":
        peers = [name for name in peers if not name.startswith("torch")]  # torch's other modes
    result = Table(title=title, title_justify="left", title_style="bold", box=box())
    result.add_column("", no_wrap=True)
    headings = (
        OURS,
        "torch",
        "",
        *peers,
        "ratio",
        "middle half",
        "cold",
        "bytes",
        "GB/s",
        "of floor",
    )
    for heading in headings:
        justify: Any = "left" if heading == "" else "right"
        result.add_column(heading, justify=justify, no_wrap=True)
    for row in shown:
        figure, contenders = row["figure"], row["contenders"]

        def time(name: str | None, figure: str = figure, of: Any = contenders) -> float | None:
            median: float | None = of.get(name, {}).get(figure, {}).get("median_us")
            return median

        theirs = row.get("theirs")
        cold = time(theirs, "cold"), time(OURS, "cold")
        is_cold = figure != "cold" and cold[0] is not None and cold[1] is not None
        bounds = (row.get("low"), row.get("high"))
        share = row.get("of_floor")
        style = colour(row)
        text = _ratio(row.get("ratio"))
        result.add_row(
            row["name"],
            duration(time(OURS)),
            duration(time(theirs)),
            (theirs or "").removeprefix("torch").strip(),
            *(duration(time(name)) for name in peers),
            f"[{style}]{text}[/]" if style else text,
            " - ".join(_ratio(bound)[:-1] for bound in bounds) if all(bounds) else "-",
            _ratio(cold[0] / cold[1]) if is_cold and cold[0] and cold[1] else "-",
            amount(row.get("bytes")),
            "-" if row.get("gb_s") is None else f"{row['gb_s']:.3g}",
            "-" if share is None else f"{share:.0%}",
            style="dim" if row["name"].startswith(CONTROL) else None,
        )
    return result


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be said of rows beside their figures."""
    found = [f"{row['name']}: {row['note']}" for row in rows if row.get("note")]
    for row in rows:
        found += [
            f"{row['name']}: {name} left out: {why}" for name, why in row.get("failed", {}).items()
        ]
        found += [
            f"goal {'met' if goal['met'] else 'MISSED'}: {goal['goal']}; here {goal['value']:.2f}"
            for goal in row.get("goals", [])
        ]
        if row.get("memory_mb"):
            peaks = ", ".join(f"{name} {mb:.0f}" for name, mb in row["memory_mb"].items())
            found.append(f"{row['name']}: peak memory, MB: {peaks}")
        if row.get("launches"):
            counts = (f"{m} {c['kernels']} (+{c['copies']})" for m, c in row["launches"].items())
            found.append(f"{row['name']} (+ copies and fills): {', '.join(counts)}")
    return found


class View:
    """Shows rows as they come, and all of them at the end, however it ends."""

    def __init__(self, data: dict[str, Any], variants: int, missing: Sequence[str]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._data, self._variants, self._missing = data, variants, missing
        self._console = console()
        columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), "{task.description}")
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> View:
        where = self._data["environment"]
        gpu = f", {where['gpu']['name']}" if where["gpu"] else ""
        self._console.print(f"{where['machine']}{gpu}, torch {where['torch']}")
        if where["busy"] > 0.05:
            self._console.print(
                f"[yellow]other programs use {where['busy']:.0%} of the processors: figures will be noisy[/]"
            )
        for text in self._missing:
            self._console.print(f"[yellow]{text}[/]")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self._data["rows"]:
            key = tuple(row.get(k) for k in ("suite", "device", "isa", "threads"))
            groups.setdefault(key, []).append(row)
        for (suite, device, isa, threads), rows in groups.items():
            gpu = (self._data["environment"]["gpu"] or {}).get("name")
            place = gpu if device == "cuda" else f"{isa}/{threads}"
            copy = self._data["roofs"].get(place, {}).get("copy_gb_s")
            where = f"{isa}, {threads} threads" if device == "cpu" else place
            self._console.print()
            self._console.print(
                table(rows, f"{suite}: {where}" + (f", copy {copy:.3g} GB/s" if copy else ""))
            )
            for text in notes(rows):
                self._console.print(text, markup=False)

    def facts(self, facts: dict[str, Any]) -> None:
        total = self._progress.tasks[0].total or 0
        # The first variant tells for those to come.
        self._progress.update(self._task, total=total or facts["rows"] * self._variants)

    def begin(self, name: str) -> None:
        self._progress.update(self._task, description=name)

    def row(self, row: Row) -> None:
        self._progress.advance(self._task)
        text = _ratio(row.get("ratio"))
        self._progress.console.print(
            f"  {row['name']}  {text if row['ok'] is not False else 'FAILED'}", style=colour(row)
        )
