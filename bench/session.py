"""``python -m braze bench``: the options of all suites, runs in child processes, and the file of results."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from braze._native import _C

from . import environment, peers, rows, view
from .clock import matmul_rate, open_clock
from .files import write_json, write_text
from .harness import DTYPES, Case, Setting, Suite, control, merge
from .rows import Hopeless, Row, Work, count, writable

FORMAT = "braze-bench/1"
# torch's name of each of braze's instruction sets.
TORCHS = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "avx512_bf16": "avx512"}
# Of --quick: the share of a row's seconds.
QUICK = 0.2
CSV = (
    "suite name device isa threads theirs ratio ratio_min low high braze_us theirs_us braze_cold_us bytes gb_s "
    "floor_us of_floor difference ok note"
).split()


def _counts(text: str) -> list[int]:
    return [count(word) for word in text.split(",")]


def _sets(text: str) -> list[str]:
    known = _C.available_instruction_sets()
    wanted = known if text == "all" else text.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise argparse.ArgumentTypeError(
            f"'{unknown[0]}' is not an instruction set of this machine; there are: {', '.join(known)}"
        )
    return list(wanted)


def _against(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in peers.PEERS]:
        known = ", ".join(peers.PEERS)
        raise argparse.ArgumentTypeError(
            f"'{unknown[0]}' is nobody to compare with; known: {known}"
        )
    return names


def add_options(parser: argparse.ArgumentParser, seconds: str) -> None:
    """The same for every suite."""
    add = parser.add_argument
    rows.add_options(parser, ("cpu", "cuda"))
    add("--dtype", choices=DTYPES, help="only rows of this dtype")
    add("--threads", type=_counts, metavar="N,...", help="of the CPU (default: torch's)")
    add(
        "--isa",
        type=_sets,
        metavar="SET,...",
        help="instruction sets of braze and torch, each in a process of its own; all: every one that this "
        "machine has (default: the best)",
    )
    add("--quick", action="store_true", help="few rows, a fifth of the time each")
    add("--repeat", type=count, default=1, metavar="N", help="so many times over all rows (1)")
    add("--seconds", type=float, help=f"of measuring a part of a row (default {seconds})")
    add("--csv", type=writable, help="also write a line a row to this file")
    add("--plot", type=writable, metavar="PNG|DIR", help="also draw: one picture, or all of them")
    add(
        "--against",
        type=_against,
        default=["torch"],
        metavar="WHO,...",
        help=f"of {', '.join(peers.PEERS)}; torch is always there, what is not installed is said",
    )
    add("--explain", action="store_true", help="how it is measured, and nothing else")


@dataclass
class Document:
    """The results so far; written after every row."""

    arguments: argparse.Namespace
    data: dict[str, Any] = field(default_factory=dict)

    def put(self, row: Row) -> Row:
        """Adds a row, to the turns of the same row if there is one. Returns what it became."""
        known = self.data["rows"]
        key = key_of(row)
        at = next((i for i, old in enumerate(known) if key_of(old) == key), None)
        if at is None:
            known.append(row)
        else:
            row = known[at] = merge(known[at], row)
        if self.arguments.json is not None:
            write_json(self.data, self.arguments.json)
        if self.arguments.csv is not None:
            write_text(self.arguments.csv, self._csv())
        return row

    def _csv(self) -> str:
        lines: list[str] = []
        out = csv.DictWriter(_Lines(lines), CSV, extrasaction="ignore")
        out.writeheader()
        out.writerows({**row, **flat(row)} for row in self.data["rows"])
        return "".join(lines)


@dataclass
class _Lines:
    """What csv wants of a file."""

    lines: list[str]

    def write(self, text: str) -> None:
        self.lines.append(text)


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("suite", "name", "device", "isa", "threads"))


def flat(row: Row) -> dict[str, float | None]:
    """Medians in microseconds of ours and of the best of torch's; of ours with cold caches."""
    contenders, figure = row.get("contenders", {}), row.get("figure", "warm")

    def of(name: str | None, figure: str) -> float | None:
        median: float | None = contenders.get(name, {}).get(figure, {}).get("median_us")
        return median

    return {
        "braze_us": of("braze", figure),
        "theirs_us": of(row.get("theirs"), figure),
        "braze_cold_us": of("braze", "cold"),
        "theirs_cold_us": of(row.get("theirs"), "cold"),
    }


@dataclass(frozen=True)
class Variant:
    """What a process is held to; () and None: what it has anyway."""

    isa: str | None
    threads: int | None

    def environment(self) -> dict[str, str]:
        if self.isa is None:
            return {}
        return {"BRAZE_CPU_CAPABILITY": self.isa, "ATEN_CPU_CAPABILITY": TORCHS[self.isa]}

    def is_here(self) -> bool:
        return self.environment().items() <= os.environ.items()


Emit = Callable[[str, Any], None]


def _chosen(suite: Suite, arguments: argparse.Namespace) -> list[Case]:
    cases = [
        case
        for case in suite.cases(arguments)
        if arguments.dtype in (None, case.tags["dtype"]) and (case.quick or not arguments.quick)
    ]
    if not cases:
        return []
    names = rows.choose([case.name for case in cases], arguments.filter)
    return [case for case in cases if case.name in names]


def _chosen_of_all(suites: Sequence[Suite], arguments: argparse.Namespace) -> dict[str, list[Case]]:
    """Of each suite that has some. Raises Hopeless if none has."""
    chosen, first = {}, None
    for suite in suites:
        try:
            chosen[suite.name] = _chosen(suite, arguments)
        except Hopeless as error:
            first = first or error
    if not any(chosen.values()):
        raise first or Hopeless("no row is of that dtype and --quick at once")
    return chosen


def measure(suites: Sequence[Suite], arguments: argparse.Namespace, emit: Emit) -> int:
    """Measures in this process. Returns :func:`rows.code_of` all rows.

    ``emit`` gets what happens: "facts" (of this process), "begin" (a row's name) and "row".
    """
    chosen = _chosen_of_all(suites, arguments)
    clock = open_clock(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads[0])
    told = dict(device=arguments.device, isa=_C.instruction_set(), threads=torch.get_num_threads())
    # Nobody waits for a rehearsal.
    timed = arguments.seconds != 0
    copy = clock.copy_bandwidth(0.5 if timed else 0.0)
    roof: dict[str, Any] = {"copy_gb_s": copy / 1e9}
    kinds = {name: DTYPES[name] for name in ("fp32", "bf16") if timed}
    roof["matmul_gflops"] = {name: matmul_rate(clock, kind) / 1e9 for name, kind in kinds.items()}
    place = f"{told['isa']}/{told['threads']}" if clock.name == "cpu" else clock.facts()["name"]
    total = sum(len(cases) + 1 for cases in chosen.values() if cases) * arguments.repeat
    emit("facts", {"roofs": {place: roof}, "rows": total, **told})
    seen: list[Row] = []
    for suite in suites:
        if not (cases := chosen.get(suite.name)):
            continue
        seconds = suite.seconds if arguments.seconds is None else arguments.seconds
        if arguments.quick and arguments.seconds is None:
            seconds *= QUICK
        setting = Setting(clock, copy, seconds, tuple(arguments.against))
        work = [suite.work(case, setting) for case in (control(cases[0]), *cases)]
        work = [*work * arguments.repeat, *suite.more(arguments, setting)]
        begun = [_told(one, told, partial(emit, "begin", one.name)) for one in work]
        for row in rows.each(begun, arguments):
            seen.append(row)
            emit("row", row)
    return rows.code_of(seen)


def _told(work: Work, facts: Row, begin: Callable[[], None]) -> Work:
    """The work that first says that it begins; its row has the facts."""

    def measure(row: Row) -> None:
        begin()
        row.update(facts)
        work.measure(row)

    return Work(work.name, measure)


def _in_child(variant: Variant, arguments: argparse.Namespace, emit: Emit) -> int:
    """The same command line in a process of its own; of an option that is there twice, the last counts."""
    command = [*arguments.command_line, "--rows"]
    if variant.isa is not None:
        command += ["--isa", variant.isa]
    if variant.threads is not None:
        command += ["--threads", str(variant.threads)]
    environ = {**os.environ, **variant.environment()}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            kind, _, text = line.partition(" ")
            if kind in ("FACTS", "ROW"):
                emit(kind.lower(), json.loads(text))
            elif kind == "BEGIN":
                emit("begin", text.strip())
    return child.returncode


def _variants(arguments: argparse.Namespace) -> Iterator[Variant]:
    pairs = itertools.product(arguments.isa or [None], arguments.threads or [None])
    return itertools.starmap(Variant, pairs)


def run(suites: Sequence[Suite], arguments: argparse.Namespace) -> int:
    """All variants. Returns the first code that is not 0; 130 after Ctrl-C, with what was measured."""
    if arguments.explain:
        print(Path(__file__).with_name("README.md").read_text())
        return 0
    variants = list(_variants(arguments))
    alone = len(variants) == 1 and variants[0].is_here()
    if arguments.rows and alone:
        return measure(suites, arguments, _plain)
    _chosen_of_all(suites, arguments)  # a wrong name is told before anything is measured
    if arguments.plot is not None:
        from . import plots

        plots.require()
    view.require()
    share = environment.wait_until_idle() if arguments.seconds != 0 else 0.0
    document = Document(arguments)
    document.data = {
        "format": FORMAT,
        "command": arguments.command_line[arguments.command_line.index("bench") + 1 :],
        "date": environment.now(),
        "environment": environment.describe(share),
        "roofs": {},
        "rows": [],
    }
    codes: list[int] = []
    missing = peers.missing(arguments.against)
    with view.View(document.data, len(variants), missing) as shown:

        def emit(kind: str, value: Any) -> None:
            if kind == "facts":
                document.data["roofs"].update(value["roofs"])
                shown.facts(value)
            elif kind == "begin":
                shown.begin(value)
            else:
                shown.row(document.put(value))

        try:
            for variant in variants:
                call = partial(measure, suites) if alone else partial(_in_child, variant)
                codes.append(call(arguments, emit))
        except KeyboardInterrupt:
            codes.append(130)
    if 130 in codes or -2 in codes:
        print("stopped; what was measured is kept", file=sys.stderr)
    if arguments.plot is not None and document.data["rows"]:
        for path in plots.draw([document.data], arguments.plot):
            print(path)
    return 130 if 130 in codes or -2 in codes else next(filter(None, codes), 0)


def _plain(kind: str, value: Any) -> None:
    """For a driver that reads lines; rows.each writes the rows themselves."""
    if kind == "facts":
        print(f"FACTS {json.dumps(value)}", flush=True)
    elif kind == "row":
        print(line(value), flush=True)


def line(row: Row) -> str:
    """A row in one line of plain text."""
    times = flat(row)
    text = row["name"]
    if times["braze_us"] is not None:
        text += f": braze {times['braze_us']:.1f} us"
    if times["theirs_us"] is not None:
        text += f", {row['theirs']} {times['theirs_us']:.1f} us, {row['ratio']:.2f} x"
    if row.get("of_floor") is not None:
        text += f", {row['gb_s']:.0f} GB/s, {row['of_floor']:.2f} of the floor"
    return f"{text} {row.get('note', '')}".rstrip()


def commands(*suites: Suite, seconds: str = "") -> tuple[Callable[..., None], Callable[..., int]]:
    """``add_arguments`` and ``run`` of a module that is a command."""
    told = seconds or f"{suites[0].seconds:g}"
    return lambda parser: add_options(parser, told), partial(run, suites)
