"""One row of a benchmark: contenders that compute the same, checked, timed in turns, and what their times say.

A :class:`Suite` has cases, which are data: a :class:`Case` is one row, of one :class:`Part` or of several whose
times are added up, as the layers of a network are. ``braze`` is ours; ``torch`` and ``torch ...`` are what it
is compared with, the fastest of them; other names are of :mod:`.peers`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .clock import Call, Clock, Cuda, Samples, sample
from .rows import Row, Work, is_fatal, reason

OURS, AGAIN, CONTROL = "braze", "braze again", "A/A "
Makers = Mapping[str, Callable[[], Call]]
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest relative difference of results, by the dtype of the tensors.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}
# A mode of torch's that takes longer than the best by this factor is not timed any further.
_CLOSE = 1.3
# Steps of a compiled model that may go by before two in a row take the same time.
_UNSETTLED = 12


@dataclass(frozen=True)
class Built:
    """``makers``: by contender what makes its call, torch's first. ``check``: the relative difference of ours
    from torch's; by default of what the calls return."""

    makers: Makers
    check: Callable[[], float | None] | None = None


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share. ``copy``: bytes per second."""

    clock: Clock
    copy: float
    seconds: float
    against: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return self.clock.name


@dataclass(frozen=True)
class Part:
    """``bytes``: the fewest that one call can read and write. ``needs``: of memory, at most."""

    build: Callable[[Setting], Built]
    bytes: int | None = None
    flops: int | None = None
    needs: int = 0
    name: str = ""
    count: int = 1


@dataclass(frozen=True)
class Case:
    """``quick``: one of the few that stand for all. ``goals``: of the measured row. ``tolerance``: of
    :data:`TOLERANCE`'s kind, by default by the dtype. ``more``: fills in what is no time."""

    name: str
    tags: Mapping[str, Any]
    parts: tuple[Part, ...]
    quick: bool = False
    goals: Callable[[Row], list[dict[str, Any]]] | None = None
    tolerance: float | None = None
    more: Callable[[Setting, Row], None] | None = None


@dataclass(frozen=True)
class Suite:
    """``seconds``: of a part. ``figure``: which of a clock's figures counts, by device; ``figures``: which are
    measured, () for all. ``more``: rows that are no times, which come last."""

    name: str
    cases: Callable[[argparse.Namespace], Sequence[Case]]
    seconds: float
    figure: Mapping[str, str]
    figures: tuple[str, ...] = ()
    more: Callable[[argparse.Namespace, Setting], Sequence[Work]] = lambda arguments, setting: ()

    def work(self, case: Case, setting: Setting) -> Work:
        figures = self.figures or setting.clock.figures
        figure = self.figure[setting.device]

        def fill(row: Row) -> None:
            row.update(suite=self.name, tags=dict(case.tags), figure=figure)
            measure(case, setting, figures, row)

        return Work(case.name, fill)


def control(case: Case) -> Case:
    """The row that shows the noise: braze against itself."""
    part = case.parts[0]

    def build(setting: Setting) -> Built:
        make = part.build(setting).makers[OURS]
        return Built({AGAIN: make, OURS: make}, lambda: None)

    return Case(CONTROL + case.name, case.tags, (replace(part, build=build),), True)


def difference(ours: Any, theirs: Any) -> float:
    """The largest ||ours - theirs|| / ||theirs|| of all tensors in two results."""
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    return max((_relative(a, b) for a, b in pairs if isinstance(a, Tensor)), default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    norm, wide = torch.linalg.vector_norm, b.detach().double()
    return float(norm(a.detach().double() - wide) / norm(wide).clamp(min=1e-300))


def settle(call: Call) -> float:
    """Calls until two calls in a row take the same time within a quarter.

    Returns:
        Seconds that the calls before took longer than the last one: what compiling costs.
    """
    spent: list[float] = []
    while len(spent) < _UNSETTLED:
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
        if len(spent) > 2 and abs(spent[-1] - spent[-2]) < 0.25 * spent[-1]:
            break
    return sum(spent) - len(spent) * spent[-1]


def _make(makers: Makers, row: Row) -> dict[str, Call]:
    """The contenders' calls. One of torch's, or a peer's, that fails is left out and told in ``failed``."""
    calls: dict[str, Call] = {}
    for name, make in makers.items():
        try:
            call = make()
            if name == "compile":
                row.setdefault("compile_s", {})[name] = round(settle(call), 2)
            call()
            call()
            calls[name] = call
        except Exception as error:
            if name == OURS or is_fatal(str(error)):
                raise
            row.setdefault("failed", {})[name] = reason(error)
    return calls


def _is_torchs(name: str) -> bool:
    return name == AGAIN or (name.startswith("torch") and not name.endswith("graph"))


def _the_fastest(clock: Clock, calls: dict[str, Call], row: Row) -> dict[str, Call]:
    """Without torch's modes that are far from the best; their times are in ``slower``, microseconds."""
    modes = [name for name in calls if _is_torchs(name)]
    if len(modes) < 3:
        return calls
    probe = sample(clock, {name: calls[name] for name in modes}, 0.0, ("warm",))
    times = {name: probe[name]["warm"].least for name in modes}
    slow = {n: t for n, t in times.items() if t > _CLOSE * min(times.values())}
    row["slower"] = {name: _figure(t * 1e6) for name, t in slow.items()}
    return {name: call for name, call in calls.items() if name not in slow}


def measure(case: Case, setting: Setting, figures: tuple[str, ...], row: Row) -> None:
    """One row."""
    clock, sums = setting.clock, dict[str, dict[str, Samples]]()
    needed, free = max(part.needs for part in case.parts), clock.free_bytes()
    if needed > 0.9 * free:
        row["ok"] = None
        row["note"] = (
            f"skipped: needs up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )
        return
    for i, part in enumerate(case.parts):
        built = part.build(setting)
        calls = _make(built.makers, row)
        reference = next(iter(calls))
        if built.check is not None:
            found = built.check()
        elif reference != OURS:
            found = difference(calls[OURS](), calls[reference]())
        else:
            found = None
        limit = TOLERANCE[case.tags["dtype"]] if case.tolerance is None else case.tolerance
        if found is not None:
            row["difference"] = max(found, row.get("difference", 0.0))
            if not found <= limit:
                where = f" of {part.name}" if part.name else ""
                text = f"braze's result{where} differs from {reference}'s by {found:.1e}, relative"
                raise RuntimeError(f"{text}; {limit:.0e} is allowed")
        seen = sample(clock, _the_fastest(clock, calls, row), setting.seconds, figures)
        if isinstance(clock, Cuda):
            row["host_waits"] = row.get("host_waits", False) or clock.waits(calls[OURS])
        if len(case.parts) > 1:
            row.setdefault("parts", []).append(_part(part, seen, row["figure"], setting.copy))
        _add(sums, seen, part.count, first=i == 0)
    summarise(case, setting, sums, row)
    if case.more is not None:
        case.more(setting, row)
    row["goals"] = case.goals(row) if case.goals is not None else []


def _add(
    sums: dict[str, dict[str, Samples]],
    seen: dict[str, dict[str, Samples]],
    count: int,
    first: bool,
) -> None:
    """Adds a part's samples, turn by turn; a contender that was not in every part is dropped."""
    if first:
        zero = {
            f: Samples(0.0, [0.0] * len(s.rounds)) for f, s in next(iter(seen.values())).items()
        }
        sums.update({n: {f: replace(z) for f, z in zero.items()} for n in seen})
    for name in [name for name in sums if name not in seen]:
        del sums[name]
    for name, figures in sums.items():
        for figure, total in figures.items():
            new = seen[name][figure]
            total.least += count * new.least
            pairs = zip(total.rounds, new.rounds, strict=False)
            total.rounds = [a + count * b for a, b in pairs]


def _part(
    part: Part, seen: dict[str, dict[str, Samples]], figure: str, copy: float
) -> dict[str, Any]:
    medians = {name: samples[figure].median * 1e6 for name, samples in seen.items()}
    theirs = min((t for name, t in medians.items() if _is_torchs(name)), default=math.nan)
    return {
        "name": part.name,
        "count": part.count,
        "braze_us": _figure(medians[OURS]),
        "theirs_us": _figure(theirs),
        "ratio": _figure(theirs / medians[OURS]),
        "floor_us": None if part.bytes is None else _figure(part.bytes / copy * 1e6),
    }


def _figure(value: float) -> float | None:
    """Five digits; None where there is none, for JSON has no nan."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _json(samples: Samples) -> dict[str, Any]:
    return {
        "min_us": _figure(samples.least * 1e6),
        "median_us": _figure(samples.median * 1e6),
        "rounds_us": [_figure(value * 1e6) for value in samples.rounds],
    }


def _total(parts: Sequence[Part], of: Callable[[Part], int | None]) -> int | None:
    values = [of(part) for part in parts]
    known = [v * p.count for v, p in zip(values, parts, strict=True) if v is not None]
    return sum(known) if len(known) == len(parts) else None


def summarise(case: Case, setting: Setting, sums: dict[str, dict[str, Samples]], row: Row) -> None:
    """What the samples say: ratios round by round, and the share of what memory allows."""
    row["bytes"] = _total(case.parts, lambda part: part.bytes)
    row["flops"] = _total(case.parts, lambda part: part.flops)
    row["floor_us"] = None if row["bytes"] is None else _figure(row["bytes"] / setting.copy * 1e6)
    row["contenders"] = {
        name: {figure: _json(samples) for figure, samples in figures.items()}
        for name, figures in sums.items()
    }
    refresh(row)


def refresh(row: Row) -> None:
    """Sets what follows from the row's contenders."""
    contenders = row["contenders"]
    if contenders[OURS][row["figure"]]["median_us"] is None:
        row["note"] = "the host was too slow to keep the device busy: end to end"
        row["figure"] = "warm"
    figure = row["figure"]
    ours = contenders[OURS][figure]
    if row["bytes"] is not None:
        row["gb_s"] = _figure(row["bytes"] / ours["median_us"] / 1e3)
        row["of_floor"] = _figure(row["floor_us"] / ours["median_us"])
    others = [n for n in contenders if _is_torchs(n) and contenders[n][figure]["median_us"]]
    if not others:
        return
    row["theirs"] = min(others, key=lambda n: float(contenders[n][figure]["median_us"]))
    theirs = contenders[row["theirs"]][figure]
    ratios = sorted(ratios_of(theirs, ours))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [math.nan] * 3
    row.update(
        ratio=_figure(statistics.median(ratios) if ratios else math.nan),
        ratio_min=_figure(theirs["min_us"] / ours["min_us"]),
        low=_figure(low),
        high=_figure(high),
    )


def ratios_of(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[float]:
    """Of the turns in which both were measured."""
    pairs = zip(theirs["rounds_us"], ours["rounds_us"], strict=False)
    return [a / b for a, b in pairs if a is not None and b is not None]


def merge(old: Row, new: Row) -> Row:
    """The row with the turns of both; the new one alone if the old one has none."""
    if not (old.get("contenders") and new.get("contenders")):
        return new
    for name, figures in new["contenders"].items():
        for figure, samples in figures.items():
            before = old["contenders"].get(name, {}).get(figure)
            if before is None:
                continue
            samples["rounds_us"] = before["rounds_us"] + samples["rounds_us"]
            samples["min_us"] = min(before["min_us"], samples["min_us"])
            known = [value for value in samples["rounds_us"] if value is not None]
            samples["median_us"] = _figure(statistics.median(known)) if known else None
    refresh(new)
    return new
