"""Pictures of results, by matplotlib: ratios, the roofline, and how both grow with sizes and threads."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .harness import CONTROL, OURS
from .rows import Hopeless, Row
from .session import key_of

# Okabe and Ito's colours, which colour-blind people can tell apart.
OURS_COLOUR, THEIRS_COLOUR, GREY = "#0072B2", "#D55E00", "#767676"
SUITE_COLOURS = {
    "optim": "#0072B2",
    "norm": "#009E73",
    "dropout": "#CC79A7",
    "conv": "#E69F00",
    "train": "#D55E00",
    "infer": "#56B4E9",
}
TITLES = {
    "optim": "optimizer step",
    "norm": "batch norm + activation",
    "dropout": "dropout",
    "conv": "convolution + BN + ReLU",
    "train": "training step",
    "infer": "inference",
}
# What stands for a suite that has many rows.
HEADLINES = (
    r"^AdamW / 1000 x 64$|^AdamW / ResNet-50$|^AdamW / bf16 10M$|^AdamW clip\+amp / ResNet-50$"
    r"|^bf16 NHWC (add\+)?relu|^fp32 NHWC relu|^(dropout|relu|add) 4M fp32|NHWC"
)
MOST = 4
# The narrowest first.
SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
DPI = 150
TIMES = "\N{MULTIPLICATION SIGN}"
Draw = Callable[[Any, list[Row], dict[str, Any]], bool]


def require() -> None:
    """Raises Hopeless, with the command, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Hopeless("matplotlib is not installed, which draws; pip install 'braze[bench]'")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)


def _timed(rows: Sequence[Row]) -> list[Row]:
    """Those that have a ratio, but for controls; of several results of one row the last."""
    latest = {key_of(row): row for row in rows}
    return [
        row
        for row in latest.values()
        if row.get("ratio") is not None and not row["name"].startswith(CONTROL)
    ]


def width(isa: str) -> int:
    """The instruction sets' order; unknown ones come first."""
    return SETS.index(isa) if isa in SETS else -1


def _best(rows: Sequence[Row]) -> list[Row]:
    """Of every device the rows of the widest instruction set and the most threads: the best of the machine."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: (width(row["isa"]), int(row["threads"]))):
        found[row["suite"], row["name"], row["device"]] = row
    return list(found.values())


def _roof(row: Row, data: dict[str, Any]) -> dict[str, Any]:
    """What the machine reaches where that row was measured; empty if nobody knows."""
    place = f"{row['isa']}/{row['threads']}" if row["device"] == "cpu" else data["gpu"]
    found: dict[str, Any] = data["roofs"].get(place, {})
    return found


def headlines(rows: Sequence[Row]) -> list[Row]:
    """A few rows of every suite."""
    chosen: list[Row] = []
    for suite in TITLES:
        own = [row for row in _best(_timed(rows)) if row["suite"] == suite]
        liked = [row for row in own if re.search(HEADLINES, row["name"])]
        chosen += (liked or own)[:MOST]
    return chosen


def times(ratio: float) -> str:
    """A ratio as a person reads it: three digits, and no more than are known."""
    return f"{ratio:.2f}{TIMES}" if ratio < 9.95 else f"{ratio:.0f}{TIMES}"


def ratios(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """Bars: how much faster braze is, with the middle half of the turns."""
    shown = headlines(rows)
    if not shown:
        return False
    at, ticks, last = 0.0, list[tuple[float, str]](), ""
    for row in shown:
        if row["suite"] != last:
            at -= 0.35 if last else 0.0
            last = row["suite"]
            ticks.append((at, TITLES[last]))
            at -= 1
        ratio = row["ratio"]
        axes.barh(at, ratio - 1, left=1, height=0.74, color=SUITE_COLOURS[last])
        end = max(ratio, 1.0)
        if row.get("low") and row.get("high"):
            axes.hlines(at, row["low"], row["high"], color="black", linewidth=1.3)
            end = max(end, row["high"])
        axes.text(end, at, f" {times(ratio)}", va="center", fontsize=9)
        ticks.append((at, row["name"]))
        at -= 1
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    highest, lowest = (of(row["ratio"] for row in shown) for of in (max, min))
    axes.set_xscale("log")
    left, right = min(0.85, 0.9 * lowest), 1.25 * max(highest, 1.6)
    axes.set_xlim(left, right)
    between = (1.5,) if right < 20 else ()  # no room for it otherwise
    known = (0.1, 0.25, 0.5, 1, *between, 2, 3, 5, 10, 20, 50, 100, 200)
    marks = [mark for mark in known if left <= mark <= right]
    axes.set_xticks(marks, [f"{m:g}{TIMES}" for m in marks])
    axes.minorticks_off()
    axes.set_ylim(at + 0.3, 0.7)
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{TIMES} as fast as torch; black: the middle half of the turns", fontsize=9)
    _tidy(axes, "braze against the fastest of torch")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for label in axes.get_yticklabels():
        if label.get_text() in TITLES.values():
            label.set_fontweight("bold")
    return True


def roofline(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """Bytes a second that rows reach, over the bytes they must move; the line is what a copy reaches."""
    shown = [row for row in _best(_timed(rows)) if row.get("gb_s") and row["suite"] in TITLES]
    if not shown:
        return False
    for suite in dict.fromkeys(row["suite"] for row in shown):
        own = [row for row in shown if row["suite"] == suite]
        axes.scatter([row["bytes"] for row in own], [row["gb_s"] for row in own], s=16, alpha=0.85,
                     color=SUITE_COLOURS[suite], label=TITLES[suite], zorder=3)  # fmt: skip
        theirs = [(row["bytes"], row["gb_s"] / row["ratio"]) for row in own]
        axes.scatter(*zip(*theirs, strict=True), s=14, facecolors="none", zorder=2,
                     edgecolors=SUITE_COLOURS[suite], alpha=0.6)  # fmt: skip
    copies = {
        roof["copy_gb_s"]: row["isa"] if row["device"] == "cpu" else ""
        for row in shown
        if (roof := _roof(row, data))
    }
    for copy, isa in copies.items():
        axes.axhline(copy, color="black", linewidth=1.2)
        of = f" ({isa})" if len(copies) > 1 else ""
        # At the left, where rows are far below.
        axes.text(0.01, copy, f"copy{of}: {copy:.0f} GB/s", fontsize=9, va="bottom", zorder=4,
                  bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5},
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that one call must move; above the line: in the caches", fontsize=9)
    axes.set_ylabel("GB/s", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(
        fontsize=8, frameon=False, loc="lower right", title="filled: braze, hollow: torch"
    ).get_title().set_fontsize(8)
    _tidy(axes, "Bandwidth")
    return True


def compute(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """Operations a second of the rows that have some, beside the product of matrices of their dtype."""
    shown = [row for row in _best(_timed(rows)) if row.get("flops")]
    if not shown:
        return False
    for i, row in enumerate(shown):
        first = "" if i else None  # of a legend: each once
        ours = row["flops"] / row["contenders"][OURS][row["figure"]]["median_us"] / 1e3
        for value, colour, shift, label in (
            (ours, OURS_COLOUR, 0.2, "braze"),
            (ours / row["ratio"], THEIRS_COLOUR, -0.2, "torch"),
        ):
            text = label if first is None else ""
            axes.barh(-i + shift, value, height=0.38, color=colour, label=text)
        roof = _roof(row, data).get("matmul_gflops", {}).get(row["tags"].get("dtype"))
        if roof:
            text = "product of matrices of that dtype" if first is None else ""
            axes.vlines(roof, -i - 0.42, -i + 0.42, color="black", linewidth=2, label=text)
    axes.set_yticks([-i for i in range(len(shown))], [row["name"] for row in shown])
    axes.set_ylim(-len(shown) + 0.4, 0.6)
    axes.set_xlabel("GFLOP/s", fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=3)
    _tidy(axes, "Convolution + BN + ReLU")
    axes.tick_params(axis="y", length=0)
    return True


def _lines(axes: Any, rows: Sequence[Row], of: Callable[[Row], float]) -> None:
    """A line by instruction set, ours and theirs; the wider the set, the more solid."""
    styles = dict(zip(reversed(SETS), ("-", "--", "-.", ":"), strict=True))
    for isa in sorted({row["isa"] for row in rows}, key=width, reverse=True):
        own = sorted((row for row in rows if row["isa"] == isa), key=of)
        for who, colour in ((OURS, OURS_COLOUR), ("torch", THEIRS_COLOUR)):
            speeds = [row["gb_s"] / (1.0 if who == OURS else row["ratio"]) for row in own]
            axes.plot(
                [of(row) for row in own],
                speeds,
                styles.get(isa, "-"),
                color=colour,
                label=f"{who}, {isa}" if own[0]["device"] == "cpu" else who,
                marker=".",
            )
    axes.set_ylabel("GB/s", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)


def sizes(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """AdamW on one fp32 tensor of 100 to 100M elements."""
    named = [
        row
        for row in _timed(rows)
        if re.fullmatch(r"AdamW / fp32 \d+[KM]?", row["name"])
        and row.get("gb_s")
        and row["tags"].get("elements")
    ]
    most = max((row["threads"] for row in named), default=0)
    shown = [row for row in named if row["threads"] == most]
    if len({row["name"] for row in shown}) < 3:
        return False
    _lines(axes, shown, lambda row: float(row["tags"]["elements"]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("elements of the tensor", fontsize=9)
    _tidy(axes, "AdamW step by size (fp32)")
    return True


def threads(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """Of the row that moves the most bytes, of those measured with several numbers of threads."""
    by_name: dict[str, list[Row]] = {}
    for row in _timed(rows):
        if row.get("gb_s") and row["device"] == "cpu":
            by_name.setdefault(row["name"], []).append(row)
    several = [own for own in by_name.values() if len({row["threads"] for row in own}) > 1]
    if not several:
        return False
    shown = max(several, key=lambda own: float(own[0]["bytes"]))
    _lines(axes, shown, lambda row: float(row["threads"]))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("threads", fontsize=9)
    axes.set_xticks(sorted({row["threads"] for row in shown}))
    _tidy(axes, f"{shown[0]['name']} by threads")
    return True


PICTURES: dict[str, Draw] = {
    "ratios": ratios,
    "roofline": roofline,
    "compute": compute,
    "sizes": sizes,
    "threads": threads,
}


def _footer(figure: Any, data: Sequence[dict[str, Any]], rows: Sequence[Row]) -> None:
    where = data[-1]["environment"]
    commits = dict.fromkeys(one["environment"].get("commit") for one in data)
    known = ", ".join(commit for commit in commits if commit)
    timed = _best(_timed(rows))
    sets = dict.fromkeys(f"{row['isa']}, " for row in timed if row["device"] == "cpu")
    gpu = f"{where['gpu']['name']}, " if not sets and where.get("gpu") else ""
    text = f"{gpu}{where['machine']}, {''.join(sets)}torch {where['torch']}, braze {where['braze']}"
    if known:
        text += f", commit {known}"
    # At the bottom, where constrained layout keeps room for it.
    figure.supxlabel(f"{text}. Medians of turns.", fontsize=8, color=GREY)


def mark(data: Sequence[dict[str, Any]]) -> str:
    """What a picture carries of the results, and of this file, that it was drawn from."""
    drawn = [[one.get(key) for key in ("environment", "roofs", "rows")] for one in data]
    text = json.dumps(drawn, sort_keys=True).encode() + Path(__file__).read_bytes()
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def _save(figure: Any, path: Path, data: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without matplotlib's version: same results, same bytes.
    figure.savefig(path, metadata={"Software": None, "Comment": mark(data)})
    return path


def draw(data: Sequence[dict[str, Any]], target: Path) -> list[Path]:
    """One picture with what matters into a .png, or a picture of each kind into a folder.

    Args:
        data: result files, of one machine.

    Returns:
        What was written. What the data does not have is left out.
    """
    require()
    rows = [row for one in data for row in one["rows"]]
    gpus = [one["environment"]["gpu"] for one in data if one["environment"].get("gpu")]
    merged = {
        "roofs": {k: v for one in data for k, v in one["roofs"].items()},
        "gpu": gpus[-1].get("name") if gpus else None,
    }
    bars = headlines(rows)
    height = max(4.5, 1.5 + 0.26 * len(bars) + 0.36 * len({row["suite"] for row in bars}))
    if target.suffix == ".png":
        beside = [
            p for p in (roofline, sizes, compute) if p(_figure(1, 1).subplots(), rows, merged)
        ]
        # One beneath the other where there is room for two.
        beside = beside[: 2 if height > 7 else 1]
        figure = _figure(12, height)
        left, *others = figure.subplot_mosaic(
            [["ratios", str(i)] for i in range(max(1, len(beside)))], width_ratios=(1.1, 1)
        ).values()
        if not ratios(left, rows, merged):
            left.set_axis_off()
        for axes, picture in itertools.zip_longest(others, beside):
            axes.set_axis_off() if picture is None else picture(axes, rows, merged)
        _footer(figure, data, rows)
        return [_save(figure, target, data)]
    made = []
    for name, picture in PICTURES.items():
        figure = _figure(8, height if name == "ratios" else 4.5)
        if picture(figure.subplots(), rows, merged):
            _footer(figure, data, rows)
            made.append(_save(figure, target / f"{name}.png", data))
    return made
