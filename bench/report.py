"""Tables and pictures from results, for pages: nothing there is typed by hand.

Without files, all of a checkout's bench/results. --readme and --docs fill what stands between the markers
<!-- bench:NAME --> and <!-- /bench:NAME --> of a Markdown file; --docs also draws the pictures. --check changes
nothing, and fails where that would; of pictures it reads what they were drawn from, and needs no matplotlib.
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
from .session import FORMAT, flat, key_of
from .sources import find_root
from .view import amount, duration

Data = dict[str, Any]
REFRESH = "python -m braze bench report --readme README.md --docs docs/performance.md"
MISSING = "Not measured yet."
PICTURES = Path("docs/assets/performance")


def _ratio(row: Row | None) -> str:
    return "" if row is None or row.get("ratio") is None else plots.times(float(row["ratio"]))


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (headings, rule, *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _gpu(one: Data) -> str:
    """The GPU that it was measured on; "" for a CPU's."""
    gpu = one["environment"].get("gpu") or {}
    on_gpu = any(row.get("device") == "cuda" for row in one["rows"])
    return str(gpu.get("name", "unknown GPU")) if on_gpu else ""


def machines(data: Sequence[Data]) -> dict[str, list[Data]]:
    """Results by what they were measured on, the newest last in each; GPUs are machines of their own."""
    found: dict[str, list[Data]] = {}
    for one in sorted(data, key=lambda one: str(one["date"])):
        found.setdefault(_gpu(one) or one["environment"]["machine"], []).append(one)
    return found


def _newest(data: Sequence[Data], *suites: str) -> list[list[Data]]:
    """Of the CPUs, and of the GPUs, the one that was measured last, with all of its results of these suites."""
    having = [one for one in data if any(row["suite"] in suites for row in one["rows"])]
    found = []
    for on_gpu in (False, True):
        kind = [some for some in machines(having).values() if bool(_gpu(some[0])) == on_gpu]
        if kind:
            found.append(max(kind, key=lambda some: str(some[-1]["date"])))
    return found


def _rows(data: Sequence[Data], suite: str) -> dict[tuple[str, int, str], Row]:
    """By instruction set, threads and name; of two results of one row the newer one."""
    rows = (row for one in data for row in one["rows"])
    return {
        (row["isa"], row["threads"], row["name"]): row
        for row in rows
        if row["suite"] == suite and not row["name"].startswith(CONTROL) and row.get("contenders")
    }


def _of_most_threads(data: Sequence[Data], suite: str) -> dict[tuple[str, str], Row]:
    """By instruction set and name."""
    rows = sorted(_rows(data, suite).items(), key=lambda pair: pair[0][1])
    return {(isa, name): row for (isa, _, name), row in rows}


def _sets(rows: Iterable[Row]) -> list[str]:
    """Instruction sets that tell something: the widest, and AVX2. A GPU's rows have none to tell of."""
    known = sorted({row["isa"] for row in rows}, key=plots.width)
    return [*known[-1:], *(isa for isa in known[:-1] if isa == "avx2")]


def _measured(data: Sequence[Data], rows: Iterable[Row] | None = None) -> str:
    """The machine, and what was measured on it. ``rows``: only the results that these are of."""
    if rows is not None:
        wanted = {id(row) for row in rows}
        data = [one for one in data if any(id(row) in wanted for row in one["rows"])]
    where, gpu = data[-1]["environment"], _gpu(data[-1])
    torchs = dict.fromkeys(one["environment"]["torch"] for one in data)
    text = f"{f'{gpu}; ' if gpu else ''}{where['machine']}; torch {', '.join(torchs)}; commit "
    commits = dict.fromkeys(_commit(one["environment"]) for one in data)
    return text + ", ".join(commits)


def _commit(where: dict[str, Any]) -> str:
    changed = " with changes" if where.get("dirty") else ""
    return f"{where.get('commit') or 'unknown'}{changed}"


def _grid(
    data: Sequence[Data], suite: str, names: Sequence[str], columns: dict[str, str], first: str = ""
) -> str:
    """Ratios of the rows ``column.format(name)``, by name and column; several instruction sets by slashes. A
    table for a CPU, and one for a GPU."""
    text = []
    for some in _newest(data, suite):
        rows = _of_most_threads(some, suite)
        wanted = {form.format(name) for form in columns.values() for name in names}
        used = [row for (_, name), row in rows.items() if name in wanted]
        sets, lines = _sets(used), []
        for name in names:
            cells = [
                " / ".join(
                    filter(None, (_ratio(rows.get((isa, form.format(name)))) for isa in sets))
                )
                for form in columns.values()
            ]
            if any(cells):
                lines.append((name, *cells))
        if lines:
            told = [_measured(some, used), *([] if _gpu(some[0]) else [" / ".join(sets)])]
            note = "; ".join([*told, "medians of interleaved runs."])
            text.append(f"{markdown((first, *columns), lines)}\n\n{note}")
    return "\n\n".join(text) or MISSING


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
    return _grid(data, "optim", names, columns, "tensors")


def recipe(data: Sequence[Data]) -> str:
    names = ("1000 x 64", "ResNet-50", "fp32 100M", "bf16 10M")
    columns = {
        "SGD": "SGD clip+amp / {}",
        "AdamW": "AdamW clip+amp / {}",
        "SGD, + average": "SGD clip+amp+ema / {}",
        "AdamW, + average": "AdamW clip+amp+ema / {}",
        "`clip_grad_norm_` alone": "clip_grad_norm_ / {}",
    }
    return _grid(data, "optim", names, columns, "tensors")


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
    return _grid(data, "norm", kinds, columns, "")


def dropout(data: Sequence[Data]) -> str:
    names = ("dropout", "relu", "gelu", "add", "dropout2d")
    columns = {
        f"{kind}, {direction}": f"{{}} 4M {kind} {direction}"
        for kind in ("fp32", "bf16")
        for direction in ("forward", "forward+backward")
    }
    return _grid(data, "dropout", names, columns, "4M elements")


def models(data: Sequence[Data]) -> str:
    """Against torch in both layouts: channels last, and as it is by default."""
    text = []
    for some in _newest(data, "train", "infer"):
        cells: dict[str, dict[str, str]] = {}
        used: list[Row] = []
        for suite in ("train", "infer"):
            rows = _of_most_threads(some, suite)
            sets = _sets(rows.values())[:1]
            for (isa, name), row in rows.items():
                figures = {
                    who: figures[row["figure"]]["median_us"]
                    for who, figures in row["contenders"].items()
                    if figures.get(row["figure"])
                }
                both = [figures.get(f"torch {layout}") for layout in ("NHWC", "NCHW")]
                if isa in sets and figures.get("braze") and any(both):
                    used.append(row)
                    cells.setdefault(name, {})[suite] = " / ".join(
                        plots.times(theirs / figures["braze"]) if theirs else "-" for theirs in both
                    )
        lines = [(name, c.get("train", ""), c.get("infer", "")) for name, c in cells.items()]
        if lines:
            sets = [] if _gpu(some[0]) else list(dict.fromkeys(row["isa"] for row in used))
            note = "; ".join([_measured(some, used), *sets])
            text.append(
                f"{markdown(('', 'training step', 'inference'), lines)}\n\n{note}. "
                "`braze.fuse(model, channels_last=True)` against torch eager in channels last / as it is "
                "by default."
            )
    return "\n\n".join(text) or MISSING


def picture(data: Sequence[Data]) -> str:
    text = []
    for some in _newest(data, *plots.TITLES):
        folder = PICTURES / slug(next(iter(machines(some))))
        alt = f"Ratios against torch and shares of memory bandwidth: {_measured(some)}"
        text.append(f"![{alt}]({folder.as_posix()}/summary.png)")
    return "\n\n".join(text) or MISSING


def _complete(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        times, low, high = flat(row), row.get("low"), row.get("high")
        bounds = f" ({low:.2f} to {high:.2f})" if low and high else ""
        share = row.get("of_floor")
        cold = ""
        if row["figure"] != "cold" and times["braze_cold_us"] and times["theirs_cold_us"]:
            cold = plots.times(times["theirs_cold_us"] / times["braze_cold_us"])
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


def _notes(data: Sequence[Data]) -> str:
    """What rows say of themselves, those that failed as well."""
    latest = {
        key_of(row): row for one in data for row in one["rows"] if row["suite"] in plots.TITLES
    }
    lines = {
        f"- {row['name']} ({row.get('isa')}): {'' if row['ok'] else 'not measured: '}{row['note']}"
        for row in latest.values()
        if row.get("note")
    }
    return "\n".join(sorted(lines))


def _is_drawn(path: Path) -> bool:
    try:
        return (find_root() / "docs" / path).is_file()
    except FileNotFoundError:
        return False


def performance(data: Sequence[Data]) -> str:
    """All rows of all machines."""
    text = []
    for machine, some in machines(data).items():
        folder = PICTURES.relative_to("docs") / slug(machine)
        text.append(f"## {machine}\n\nMeasured: {_measured(some)}.")
        text += dict.fromkeys(one["remark"] for one in some if "remark" in one)
        for name in plots.PICTURES:
            if _is_drawn(folder / f"{name}.png"):
                text.append(f"![{name} on {machine}]({folder.as_posix()}/{name}.png)")
        for suite, title in plots.TITLES.items():
            rows = _rows(some, suite)
            for isa, threads in dict.fromkeys((isa, threads) for isa, threads, _ in rows):
                own = [row for key, row in rows.items() if key[:2] == (isa, threads)]
                many = f"{threads} thread{'s' if threads > 1 else ''}"
                place = f": {isa}, {many}" if not _gpu(some[0]) else ""
                heading = f"### {title[:1].upper()}{title[1:]}{place} ({machine})"
                text.append(f"{heading}\n\n{_measured(some, own)}.\n\n{_complete(own)}")
        if told := _notes(some):
            text.append(f"### What is to be said ({machine})\n\n{told}")
    if not any(_gpu(one) for one in data):
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
    every = map(read_json, sorted(folder.glob("*/*.json")))
    return [one for one in every if one is not None and one.get("format") == FORMAT]


def _draw(data: Sequence[Data], folder: Path) -> list[Path]:
    """All pictures of every machine, in a folder of its own; those that are no more drawn go."""
    made = []
    for machine, some in machines(data).items():
        own = folder / slug(machine)
        made += [*plots.draw(some, own), *plots.draw(some, own / "summary.png")]
    for path in set(folder.glob("*/*.png")) - set(made):
        path.unlink()
    return made


def _stale(data: Sequence[Data], folder: Path) -> list[str]:
    """Pictures that are missing, or were drawn from something else."""
    marks = {slug(name): plots.mark(some).encode() for name, some in machines(data).items()}
    there = {*folder.glob("*/*.png"), *(folder / name / "summary.png" for name in marks)}
    return [
        str(path)
        for path in sorted(there)
        if path.parent.name not in marks
        or not path.is_file()
        or marks[path.parent.name] not in path.read_bytes()
    ]


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
    stale = []
    if arguments.out is not None:
        several = machines(data)
        for machine, some in several.items():
            own = arguments.out / slug(machine) if len(several) > 1 else arguments.out
            print(*plots.draw(some, own), sep="\n")
    if arguments.docs is not None:
        folder = arguments.docs.parent / "assets" / "performance"
        if arguments.check:
            stale = _stale(data, folder)
        else:
            _draw(data, folder)
    for page in pages:
        try:
            before = page.read_text()
        except OSError as error:
            raise Hopeless(f"cannot read {page}: {error.strerror}") from error
        text, changed = fill(before, data)
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
