"""Tables and pictures from results, for pages: nothing there is typed by hand.

Without files, all of a checkout's bench/results. --readme and --docs fill what stands between the markers
<!-- bench:NAME --> and <!-- /bench:NAME --> of a Markdown file; --check changes nothing, and fails where that
would.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .compare import load
from .files import read_json, slug, write_text
from .harness import CONTROL
from .rows import Hopeless, Row, writable
from .session import FORMAT, flat
from .sources import find_root
from .view import amount, duration

Data = dict[str, Any]
TIMES = plots.TIMES
REFRESH = "python -m braze bench report --readme README.md --docs docs/performance.md"
PICTURES = Path("docs/assets/performance")


def _ratio(row: Row | None) -> str:
    if row is None or row.get("ratio") is None:
        return ""
    value = float(row["ratio"])
    return f"{value:.2f}{TIMES}" if value < 9.95 else f"{value:.0f}{TIMES}"


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))


def machines(data: Sequence[Data]) -> dict[str, list[Data]]:
    """Results by what they were measured on, the newest last in each; GPUs are machines of their own."""
    found: dict[str, list[Data]] = {}
    for one in sorted(data, key=lambda one: str(one["date"])):
        gpu = (one["environment"].get("gpu") or {}).get("name")
        on_gpu = any(row.get("device") == "cuda" for row in one["rows"])
        found.setdefault(gpu if gpu and on_gpu else one["environment"]["machine"], []).append(one)
    return found


def _shown(data: Sequence[Data]) -> list[Data]:
    """Those of the machine of the newest result."""
    by_machine = machines(data)
    return max(by_machine.values(), key=lambda some: str(some[-1]["date"]), default=[])


def _rows(data: Sequence[Data], suite: str) -> dict[tuple[str, str], Row]:
    """By instruction set and name; of two results of one row the newer one."""
    rows = (row for one in data for row in one["rows"])
    return {
        (row["isa"], row["name"]): row
        for row in rows
        if row["suite"] == suite and not row["name"].startswith(CONTROL) and row.get("contenders")
    }


def _sets(rows: dict[tuple[str, str], Row]) -> list[str]:
    """Instruction sets that tell something: the widest, and AVX2."""
    known = sorted({isa for isa, _ in rows}, key=plots.SETS.index)
    return [*known[-1:], *(isa for isa in known[:-1] if isa == "avx2")]


def _measured(data: Sequence[Data]) -> str:
    """The machine, and what was measured on it."""
    where = data[-1]["environment"]
    commits = dict.fromkeys(one["environment"].get("commit") for one in data)
    known = ", ".join(commit for commit in commits if commit)
    return f"{where['machine']}; torch {where['torch']}; commit {known or 'unknown'}"


def _grid(
    data: Sequence[Data], suite: str, names: Sequence[str], columns: dict[str, str], first: str = ""
) -> str:
    """Ratios of the rows ``column.format(name)``, by name and column; several instruction sets by slashes."""
    rows = _rows(data, suite)
    sets = _sets(rows)
    lines = []
    for name in names:
        cells = [
            " / ".join(filter(None, (_ratio(rows.get((isa, form.format(name)))) for isa in sets)))
            for form in columns.values()
        ]
        if any(cells):
            lines.append((name, *cells))
    if not lines:
        return "Not measured yet."
    note = f"{_measured(data)}; {' / '.join(sets)}; medians of interleaved runs."
    return f"{markdown((first, *columns), lines)}\n\n{note}"


def optim(data: Sequence[Data]) -> str:
    names: tuple[str, ...] = (
        "1 x 64",
        "1000 x 64",
        "200 x (64x64 + 64)",
        "465 groups of 64",
        "ResNet-50",
    )
    names += ("fp32 100K", "fp32 1M", "fp32 10M", "fp32 100M", "bf16 1M", "bf16 10M", "bf16 100M")
    columns = {name: f"{name} / {{}}" for name in ("SGD", "Adam", "AdamW", "RMSprop")}
    return _grid(_shown(data), "optim", names, columns, "tensors")


def recipe(data: Sequence[Data]) -> str:
    names = ("1000 x 64", "ResNet-50", "fp32 100M", "bf16 10M")
    columns = {
        "SGD": "SGD clip+amp / {}",
        "AdamW": "AdamW clip+amp / {}",
        "SGD, + average": "SGD clip+amp+ema / {}",
        "AdamW, + average": "AdamW clip+amp+ema / {}",
        "`clip_grad_norm_` alone": "clip_grad_norm_ / {}",
    }
    return _grid(_shown(data), "optim", names, columns, "tensors")


def norm(data: Sequence[Data]) -> str:
    kinds = ("fp32 NHWC", "bf16 NHWC", "fp32 NCHW", "bf16 NCHW")
    columns = {
        f"{title}, {direction}": f"{{}} {name} N=8 / {direction}"
        for title, name in (
            ("BN + ReLU", "relu"),
            ("+ residual", "add+relu"),
            ("BN + SiLU", "silu"),
        )
        for direction in ("forward", "backward")
    }
    return _grid(_shown(data), "norm", kinds, columns, "")


def dropout(data: Sequence[Data]) -> str:
    names = ("dropout", "relu", "gelu", "add", "dropout2d")
    columns = {
        f"{kind}, {direction}": f"{{}} 4M {kind} {direction}"
        for kind in ("fp32", "bf16")
        for direction in ("forward", "forward+backward")
    }
    return _grid(_shown(data), "dropout", names, columns, "4M elements")


def models(data: Sequence[Data]) -> str:
    """Against torch in both layouts: channels last, and as it is by default."""
    shown = _shown(data)
    cells: dict[str, dict[str, str]] = {}
    sets: list[str] = []
    for suite in ("train", "infer"):
        rows = _rows(shown, suite)
        sets = sets or _sets(rows)[:1]
        for (isa, name), row in rows.items():
            if isa not in sets:
                continue
            medians = {k: v["warm"]["median_us"] for k, v in row["contenders"].items()}
            both = [medians[f"torch {layout}"] / medians["braze"] for layout in ("NHWC", "NCHW")]
            text = " / ".join(f"{value:.2f}{TIMES}" for value in both)
            cells.setdefault(name, {})[suite] = text
    if not cells:
        return "Not measured yet."
    lines = [(name, c.get("train", ""), c.get("infer", "")) for name, c in cells.items()]
    note = f"{_measured(shown)}; {sets[0]}. `braze.fuse(model, channels_last=True)` against torch eager in "
    note += "channels last / as it is by default."
    return f"{markdown(('', 'training step', 'inference'), lines)}\n\n{note}"


def picture(data: Sequence[Data]) -> str:
    shown = _shown(data)
    folder = PICTURES / slug(shown[-1]["environment"]["machine"]) if shown else PICTURES
    alt = (
        f"Ratios against torch and shares of memory bandwidth: {_measured(shown)}" if shown else ""
    )
    return f"![{alt}]({folder.as_posix()}/summary.png)"


def _complete(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        times, low, high = flat(row), row.get("low"), row.get("high")
        bounds = f" ({low:.2f} to {high:.2f})" if low and high else ""
        share = row.get("of_floor")
        cold = ""
        if row["figure"] != "cold" and times["braze_cold_us"] and times["theirs_cold_us"]:
            cold = f"{times['theirs_cold_us'] / times['braze_cold_us']:.2f}{TIMES}"
        lines.append(
            (
                row["name"],
                duration(times["braze_us"]),
                f"{duration(times['theirs_us'])} {(row.get('theirs') or '')[6:]}".strip(),
                _ratio(row) + bounds,
                cold,
                amount(row.get("bytes")) if row.get("bytes") else "",
                "" if share is None else f"{share:.0%}",
            )
        )
    return markdown(
        ("", "braze", "torch", "ratio (middle half)", "cold", "bytes", "of the floor"), lines
    )


def performance(data: Sequence[Data]) -> str:
    """All rows of all machines."""
    text = []
    by_machine = machines(data)
    for machine, some in by_machine.items():
        folder = PICTURES.relative_to("docs") / slug(machine)
        text.append(f"## {machine}\n\nMeasured: {_measured(some)}.")
        text += dict.fromkeys(one["remark"] for one in some if "remark" in one)
        for name in plots.PICTURES:
            if (find_root() / "docs" / folder / f"{name}.png").is_file():
                text.append(f"![{name} on {machine}]({folder.as_posix()}/{name}.png)")
        for suite, title in plots.TITLES.items():
            rows = _rows(some, suite)
            for isa in dict.fromkeys(isa for isa, _ in rows):
                own = [row for (other, _), row in rows.items() if other == isa]
                text.append(
                    f"### {title[:1].upper()}{title[1:]}: {isa} ({machine})\n\n{_complete(own)}"
                )
    if not any(row.get("device") == "cuda" for one in data for row in one["rows"]):
        text.append("## GPUs\n\nNot measured yet: no result of a GPU is in `bench/results`.")
    return "\n\n".join(text)


BLOCKS: dict[str, Callable[[Sequence[Data]], str]] = {
    "picture": picture,
    "optim": optim,
    "recipe": recipe,
    "norm": norm,
    "dropout": dropout,
    "models": models,
    "performance": performance,
}


def fill(text: str, data: Sequence[Data]) -> tuple[str, list[str]]:
    """The page with its blocks made anew, and the names of those that changed. Raises Hopeless for an unknown
    one, and for one without an end."""
    changed = []
    for name in re.findall(r"<!-- bench:(\S+) -->", text):
        if name not in BLOCKS:
            raise Hopeless(f"there is no block '{name}'; there are: {', '.join(BLOCKS)}")
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        head, _, rest = text.partition(begin)
        old, found, tail = rest.partition(end)
        if not found:
            raise Hopeless(f"{begin} has no {end}")
        new = f"\n\n{BLOCKS[name](data)}\n\n"
        changed += [name] if new != old else []
        text = f"{head}{begin}{new}{end}{tail}"
    return text, changed


def _results(files: Sequence[Path]) -> list[Data]:
    if files:
        return [load(path) for path in files]
    try:
        folder = find_root() / "bench" / "results"
    except FileNotFoundError as error:
        raise Hopeless(f"name the files, or: {error}") from error
    found = [read_json(path) for path in sorted(folder.glob("*/*.json"))]
    return [one for one in found if one is not None and one.get("format") == FORMAT]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="JSON", help="results (default: bench/results)")
    add("--out", type=writable, metavar="DIR", help="draw all pictures into this folder")
    add("--readme", type=Path, help="a page to fill")
    add("--docs", type=Path, help="another, and the pictures beside it, in assets/performance")
    add("--check", action="store_true", help="only see whether the pages are up to date")


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if --check finds a page that is not up to date."""
    data = _results(arguments.files)
    if not data:
        raise Hopeless("there are no results; make some: python -m braze bench all --json FILE")
    pages = [page for page in (arguments.docs, arguments.readme) if page is not None]
    if arguments.out is not None:
        for path in plots.draw(data, arguments.out):
            print(path)
    if arguments.docs is not None and not arguments.check:
        for machine, some in machines(data).items():
            folder = arguments.docs.parent / "assets" / "performance" / slug(machine)
            plots.draw(some, folder)
            plots.draw(some, folder / "summary.png")
    stale = []
    for page in pages:
        text, changed = fill(page.read_text(), data)
        stale += [f"{page}: {name}" for name in changed]
        if not arguments.check:
            write_text(page, text)
    if not (pages or arguments.out):
        print(
            "\n\n".join(
                f"{name}\n\n{block(data)}" for name, block in BLOCKS.items() if name != "picture"
            )
        )
    if arguments.check and stale:
        print(f"not up to date: {', '.join(stale)}; {REFRESH}", file=sys.stderr)
        return 1
    return 0
