"""Pictures of results: which are drawn, what is in them, and that nothing is cut or beneath something else."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from bench_results import MANY, result, row
from braze.bench import plots, report

pytestmark = pytest.mark.cpu_only("reads files")
ROOT = Path(__file__).parents[2]
LONG = [
    *(
        row("norm", f"bf16 NHWC add+relu N=8 / {way}", ratio)
        for way in ("forward", "backward")
        for ratio in (0.4, 70.0)
    ),
    *(row("train", f"mobilenet_v2 N=8 bf16 {i}", 1.2, gb_s=None, bytes=None) for i in range(4)),
    *(row("infer", f"mobilenet_v2 N=8 bf16 {i}", 1.6, gb_s=None, bytes=None) for i in range(4)),
    *(row("optim", "AdamW / fp32 1M", 2.0, threads=n, tags={"elements": 1}) for n in (1, 2)),
]


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_pictures(tmp_path: Path) -> None:
    data = [result(*MANY)]
    (one,) = plots.draw(data, tmp_path / "one.png")
    assert size(one)[0] == 12 * plots.DPI and one.stat().st_size > 20_000
    names = {path.stem for path in plots.draw(data, tmp_path / "all")}
    assert names == {"ratios", "roofline", "compute", "sizes"}
    threads = [row("optim", "AdamW / fp32 1M", 2.0, threads=n) for n in (1, 2)]
    assert {p.stem for p in plots.draw([result(*threads)], tmp_path / "t")} >= {"threads"}
    same = plots.draw(data, tmp_path / "two.png")[0]
    assert same.read_bytes() == one.read_bytes()


def test_pictures_show_the_best_set_and_a_few_rows_of_each_suite() -> None:
    rows = [row("optim", f"AdamW / x{i}", 2.0) for i in range(30)]
    chosen = plots.headlines([*rows, *MANY])
    assert len([r for r in chosen if r["suite"] == "optim"]) <= plots.MOST
    assert not any(r["name"].startswith("A/A") for r in chosen)
    kept = plots._best(MANY[3:5])
    assert [r["isa"] for r in kept] == ["avx512"]


def test_of_two_results_of_a_row_the_newer_one() -> None:
    old, new = (row("optim", "AdamW / 1000 x 64", ratio) for ratio in (2.0, 3.0))
    assert plots.headlines([old, new]) == [new]


def test_results_without_what_a_picture_needs(tmp_path: Path) -> None:
    """Roofs that were not measured, sizes that are not in the tags, an instruction set of another machine."""
    rows = [row("optim", f"AdamW / fp32 {n}M", 2.0, "sve", tags={}) for n in (1, 10, 100)]
    data = result(*rows) | {"roofs": {}}
    assert {path.stem for path in plots.draw([data], tmp_path)} == {"ratios", "roofline"}
    assert plots.draw([result()], tmp_path / "none") == []
    assert plots.draw([result()], tmp_path / "none.png")


def test_this_checkouts_results_can_be_drawn(tmp_path: Path) -> None:
    found = [json.loads(path.read_text()) for path in ROOT.glob("bench/results/cpu-*/*.json")]
    assert found
    for some in report.machines(found).values():
        assert plots.draw(some, tmp_path / "one.png")


def test_a_mark_follows_the_figures_and_not_the_order_of_keys() -> None:
    data = result(*MANY)
    again = json.loads(json.dumps(data, sort_keys=True)) | {"age": "older"}
    assert plots.mark([data]) == plots.mark([again])
    again["rows"][0]["ratio"] += 0.01
    assert plots.mark([data]) != plots.mark([again])


def labels(axis: Any) -> list[Any]:
    """Of the ticks within the axes; matplotlib keeps others and does not draw them."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1 for tick in ticks if tick.label1.get_text()]


def faults(figure: Any) -> list[str]:
    """Texts that are cut by the picture's edge, and labels of an axis that touch each other."""
    figure.canvas.draw()
    found = []
    whole = figure.bbox.padded(1)
    for axes in (axes for axes in figure.axes if axes.axison):
        both = axes.xaxis, axes.yaxis
        texts = [axes._left_title, *axes.texts, *(axis.label for axis in both)]
        for text in (*texts, *(label for axis in both for label in labels(axis))):
            box = text.get_window_extent()
            inside = whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
            if text.get_text() and not inside:
                found.append(f"cut: {text.get_text()}")
        for a, b in itertools.chain(*(itertools.pairwise(labels(axis)) for axis in both)):
            if a.get_window_extent().overlaps(b.get_window_extent()):
                found.append(f"touch: {a.get_text()}, {b.get_text()}")
    return found


@pytest.mark.parametrize("rows", [MANY, LONG, [*MANY, *LONG]], ids=["many", "long", "both"])
@pytest.mark.parametrize("target", ["all", "one.png"])
def test_nothing_is_cut_and_no_labels_touch(
    rows: list[dict[str, Any]], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, data: figures.append(figure) or path)
    assert plots.draw([result(*rows)], tmp_path / target)
    for figure in figures:
        assert faults(figure) == []
    # What the detector is for.
    axes = figures[0].axes[0]
    axes.set_title("a title that does not fit " * 9, loc="left")
    axes.set_yticks([0.0, 0.001], ["over", "lap"])
    words = " ".join(faults(figures[0]))
    assert "cut: a title" in words and "touch: over, lap" in words
