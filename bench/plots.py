"""Pictures of results, by matplotlib: ratios, the roofline, and how both grow with sizes and threads."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .harness import CONTROL, OURS
from .rows import Hopeless, Row

# Okabe and Ito's colours, which colour-blind people can tell apart.
OURS_COLOUR, THEIRS_COLOUR, LINE, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
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
    r"^AdamW / 1000 x 64$|^(AdamW|SGD) / ResNet-50$|^AdamW / bf16 10M$|^AdamW clip\+amp(\+ema)? / ResNet-50$"
    r"|^bf16 NHWC (add\+)?relu|^fp32 NHWC relu|^(dropout|relu|add) 4M fp32|NHWC"
)
MOST = 6
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
    axes.tick_params(labelsize=8)


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [
        row for row in rows if row.get("ratio") is not None and not row["name"].startswith(CONTROL)
    ]


def _best(rows: Sequence[Row]) -> list[Row]:
    """Of every device the rows of the widest instruction set and the most threads: the best of the machine."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: (SETS.index(row["isa"]), int(row["threads"]))):
        found[row["suite"], row["name"], row["device"]] = row
    return list(found.values())


def headlines(rows: Sequence[Row]) -> list[Row]:
    """A few rows of every suite."""
    chosen: list[Row] = []
    for suite in TITLES:
        own = [row for row in _best(_timed(rows)) if row["suite"] == suite]
        liked = [row for row in own if re.search(HEADLINES, row["name"])]
        chosen += (liked or own)[:MOST]
    return chosen


def ratios(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """Bars: how much faster braze is, with the middle half of the turns."""
    shown = headlines(rows)
    if not shown:
        return False
    at, ticks, last = 0.0, [], ""
    for row in shown:
        if row["suite"] != last:
            at -= 0.6 if last else 0.0
            last = row["suite"]
            axes.text(0.0, at + 0.15, TITLES[last], transform=axes.get_yaxis_transform(), fontsize=9,
                      fontweight="bold", va="bottom", color=SUITE_COLOURS[last])  # fmt: skip
            at -= 0.75
        ratio = row["ratio"]
        axes.barh(at, ratio - 1, left=1, height=0.72, color=SUITE_COLOURS[last])
        if row.get("low") and row.get("high"):
            axes.hlines(at, row["low"], row["high"], color="black", linewidth=1.1)
        text = f" {ratio:.2f}{TIMES}" if ratio < 9.95 else f" {ratio:.0f}{TIMES}"
        axes.text(max(ratio, row.get("high") or 0, 1.0), at, text, va="center", fontsize=8)
        ticks.append((at, row["name"]))
        at -= 1
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(at + 0.3, 1.0)
    highest = max(row["ratio"] for row in shown)
    axes.set_xscale("log")
    lowest = min(0.8, *(0.95 * row["ratio"] for row in shown))
    axes.set_xlim(lowest, 1.35 * highest)
    known = (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
    marks = [mark for mark in known if lowest <= mark <= 1.3 * highest]
    axes.set_xticks(marks, [f"{m:g}{TIMES}" for m in marks])
    axes.minorticks_off()
    axes.axvline(1, color=GREY, linewidth=1)
    axes.tick_params(axis="y", length=0)
    _tidy(axes, f"braze against the fastest of torch (1{TIMES} = as fast)")
    return True


def roofline(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """Bytes a second that rows reach, over the bytes they must move; the line is what a copy reaches."""
    shown = [row for row in _best(_timed(rows)) if row.get("gb_s") and row["suite"] in TITLES]
    if not shown:
        return False
    for suite in dict.fromkeys(row["suite"] for row in shown):
        own = [row for row in shown if row["suite"] == suite]
        axes.scatter([row["bytes"] for row in own], [row["gb_s"] for row in own], s=16, alpha=0.85,
                     color=SUITE_COLOURS[suite], label=f"braze: {TITLES[suite]}", zorder=3)  # fmt: skip
        theirs = [(row["bytes"], row["gb_s"] / row["ratio"]) for row in own]
        axes.scatter(*zip(*theirs, strict=True), s=14, facecolors="none", zorder=2,
                     edgecolors=SUITE_COLOURS[suite], alpha=0.6)  # fmt: skip
    row = shown[-1]
    place = f"{row['isa']}/{row['threads']}" if row["device"] == "cpu" else ""
    roof = data["roofs"].get(place) or next(iter(data["roofs"].values()))
    axes.axhline(roof["copy_gb_s"], color="black", linewidth=1.2)
    axes.text(0, roof["copy_gb_s"], f" copy in memory, {roof['copy_gb_s']:.0f} GB/s", ha="left",
              va="bottom", fontsize=8, transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that must move", fontsize=8)
    axes.set_ylabel("GB/s", fontsize=8)
    axes.grid(alpha=0.25)
    axes.legend(
        fontsize=7.5, frameon=False, loc="lower right", title="hollow: torch", title_fontsize=7.5
    )
    _tidy(axes, "Bandwidth reached (above the line: in the caches)")
    return True


def compute(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """Operations a second of the rows that have some, under the product of matrices."""
    shown = [row for row in _best(_timed(rows)) if row.get("flops")]
    if not shown:
        return False
    row = shown[-1]
    roof = data["roofs"].get(f"{row['isa']}/{row['threads']}") or next(iter(data["roofs"].values()))
    for i, row in enumerate(shown):
        ours = row["contenders"][OURS][row["figure"]]["median_us"]
        rate = row["flops"] / ours / 1e3
        for value, colour, shift in (
            (rate, OURS_COLOUR, 0.2),
            (rate / row["ratio"], THEIRS_COLOUR, -0.2),
        ):
            axes.barh(-i + shift, value, height=0.36, color=colour)
    for name, rate in roof.get("matmul_gflops", {}).items():
        axes.axvline(rate, color="black", linewidth=1)
        axes.text(rate, 0.8, f" {name} product", fontsize=7.5, va="bottom")
    axes.set_yticks([-i for i in range(len(shown))], [row["name"] for row in shown])
    axes.set_xlabel("GFLOP/s; blue: braze, orange: torch", fontsize=8)
    _tidy(axes, "Convolutions, of what a matrix product reaches")
    return True


def _lines(axes: Any, rows: Sequence[Row], of: Callable[[Row], float]) -> None:
    """A line by optimizer and instruction set, ours and theirs."""
    from itertools import cycle

    styles = cycle(("-", "--", ":", "-."))
    for isa in dict.fromkeys(row["isa"] for row in rows):
        own = sorted((row for row in rows if row["isa"] == isa), key=of)
        style = next(styles)
        for who, colour in ((OURS, OURS_COLOUR), ("torch", THEIRS_COLOUR)):
            scale = [1.0 if who == OURS else row["ratio"] for row in own]
            speeds = [row["gb_s"] / s for row, s in zip(own, scale, strict=True)]
            label = f"{who}, {isa}"
            axes.plot(
                [of(row) for row in own], speeds, style, color=colour, label=label, marker="."
            )
    axes.set_ylabel("GB/s", fontsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)


def sizes(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """AdamW on one fp32 tensor of 100 to 100M elements."""
    named = [row for row in _timed(rows) if re.fullmatch(r"AdamW / fp32 \d+[KM]?", row["name"])]
    most = max((row["threads"] for row in named), default=0)
    shown = [row for row in named if row["threads"] == most]
    if len({row["name"] for row in shown}) < 3:
        return False
    _lines(axes, shown, lambda row: float(row["tags"]["elements"]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("elements of the tensor", fontsize=8)
    _tidy(axes, "AdamW step by size (fp32)")
    return True


def threads(axes: Any, rows: list[Row], data: dict[str, Any]) -> bool:
    """Of one row, if several numbers of threads were measured."""
    known = _timed(rows)
    for row in known:
        own = [r for r in known if r["name"] == row["name"] and r.get("gb_s")]
        if len({r["threads"] for r in own}) > 1:
            _lines(axes, own, lambda row: float(row["threads"]))
            axes.set_xlabel("threads", fontsize=8)
            axes.set_xticks(sorted({r["threads"] for r in own}))
            _tidy(axes, f"{row['name']} by threads")
            return True
    return False


PICTURES: dict[str, Draw] = {
    "ratios": ratios,
    "roofline": roofline,
    "compute": compute,
    "sizes": sizes,
    "threads": threads,
}


def _footer(figure: Any, data: Sequence[dict[str, Any]]) -> None:
    where, rows = data[0]["environment"], [row for one in data for row in one["rows"]]
    sets = ", ".join(dict.fromkeys(str(row["isa"]) for row in _best(_timed(rows))))
    commit = f", commit {where['commit']}" if where.get("commit") else ""
    text = f"{where['machine']}, {sets}; torch {where['torch']}, braze {where['braze']}{commit}"
    # At the bottom, where constrained layout keeps room for it.
    figure.supxlabel(f"{text}. Medians of interleaved runs.", fontsize=7.5, color=GREY)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
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
    merged = {"roofs": {k: v for one in data for k, v in one["roofs"].items()}}
    height = 1.6 + 0.27 * len(headlines(rows))
    if target.suffix == ".png":
        figure = _figure(12, max(5.0, height))
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
        if not ratios(left, rows, merged):
            left.set_axis_off()
        if not (roofline(right, rows, merged) or compute(right, rows, merged)):
            right.set_axis_off()
        _footer(figure, data)
        return [_save(figure, target)]
    made = []
    for name, picture in PICTURES.items():
        figure = _figure(8, height if name == "ratios" else 4.5)
        if picture(figure.subplots(), rows, merged):
            _footer(figure, data)
            made.append(_save(figure, target / f"{name}.png"))
    return made
