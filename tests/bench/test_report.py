"""Tables and pictures from results; the checkout's own pages are up to date."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from braze.__main__ import main
from braze.bench import plots, report, session
from braze.bench.rows import Hopeless

pytestmark = pytest.mark.cpu_only("reads files")
ROOT = Path(__file__).parents[2]


def row(suite: str, name: str, ratio: float, isa: str = "avx512", **more: Any) -> dict[str, Any]:
    def contender(us: float) -> dict[str, Any]:
        return {"warm": {"min_us": us, "median_us": us, "rounds_us": [us, us]}}

    contenders = {"braze": contender(100.0), "torch NHWC": contender(100.0 * ratio)}
    found: dict[str, Any] = {
        "suite": suite,
        "name": name,
        "isa": isa,
        "threads": 2,
        "device": "cpu",
    }
    found |= {"ok": True, "figure": "warm", "contenders": contenders, "theirs": "torch NHWC"}
    found |= {"ratio": ratio, "ratio_min": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio}
    found |= {
        "bytes": 1e6,
        "gb_s": 10.0,
        "floor_us": 50.0,
        "of_floor": 0.5,
        "tags": {"elements": 1000},
    }
    return found | more


def result(*rows: dict[str, Any], date: str = "2026-01-01", **where: Any) -> dict[str, Any]:
    environment = {"machine": "Zen 9, 2 cores", "gpu": None, "torch": "2.13.0", "commit": "abc1234"}
    environment |= {"braze": "0.1.0", **where}
    roofs = {"avx512/2": {"copy_gb_s": 20.0, "matmul_gflops": {"fp32": 100.0}}}
    data = {"format": session.FORMAT, "command": [], "date": date, "roofs": roofs}
    return data | {"environment": environment, "rows": list(rows)}


MANY = [
    *(
        row("optim", f"AdamW / fp32 {name}", 2.5, tags={"elements": elements})
        for name, elements in (("1K", 10**3), ("10K", 10**4), ("1M", 10**6))
    ),
    row("optim", "AdamW / 1000 x 64", 34.0),
    row("optim", "AdamW / 1000 x 64", 30.0, "avx2"),
    row("optim", "A/A AdamW / 1000 x 64", 1.01),
    row("norm", "bf16 NHWC relu N=8 / forward", 2.0),
    row(
        "conv",
        "conv+bn+relu fp32 NHWC inference",
        1.2,
        flops=10**9,
        bytes=None,
        gb_s=None,
        of_floor=None,
    ),
]


def test_tables_are_made_of_rows() -> None:
    text = report.optim([result(*MANY)])
    assert re.search(r"^\| 1000 x 64 \|  \|  \| 34.* / 30.* \|  \|$", text, re.MULTILINE)
    assert "Zen 9, 2 cores; torch 2.13.0; commit abc1234; avx512 / avx2" in text
    assert "A/A" not in text and "Adam / " not in text
    assert report.dropout([result(*MANY)]) == "Not measured yet."
    models = row("train", "resnet18 N=8 fp32", 1.5)
    models["contenders"]["torch NCHW"] = {"warm": {"median_us": 300.0}}
    assert "1.50" in report.models([result(models)]) and "3.00" in report.models([result(models)])


def test_a_newer_result_of_a_row_counts_and_the_newest_machine_is_shown() -> None:
    old = result(row("optim", "SGD / 1 x 64", 5.0), date="2025-01-01")
    new = result(row("optim", "SGD / 1 x 64", 6.0), date="2026-01-01")
    other = result(row("optim", "SGD / 1 x 64", 7.0), date="2024-01-01", machine="Xeon")
    text = report.optim([new, other, old])
    assert "6.00" in text and "5.00" not in text and "7.00" not in text
    page = report.performance([new, other, old])
    assert "## Xeon" in page and "## Zen 9" in page and "Not measured yet" in page


def test_blocks_are_filled_and_stale_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "page.md", tmp_path / "r.json"
    file.write_text(json.dumps(result(*MANY)))
    page.write_text("before\n<!-- bench:optim -->\nold\n<!-- /bench:optim -->\nafter\n")
    arguments = ["bench", "report", str(file), "--readme", str(page)]
    assert main([*arguments, "--check"]) == 1
    err = capsys.readouterr().err
    assert "page.md: optim" in err and "bench report --readme" in err and "old" in page.read_text()
    assert main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert main([*arguments, "--check"]) == 0
    page.write_text(text.replace("34", "35"))
    assert main([*arguments, "--check"]) == 1
    with pytest.raises(Hopeless, match="no block 'nonsense'"):
        report.fill("<!-- bench:nonsense -->", [])
    with pytest.raises(Hopeless, match="has no <!-- /bench:optim -->"):
        report.fill("<!-- bench:optim -->", [])


def test_this_checkouts_pages_are_up_to_date() -> None:
    """No figure of the README or the documentation is typed, or left from older results."""
    pages = ["--readme", str(ROOT / "README.md"), "--docs", str(ROOT / "docs/performance.md")]
    assert main(["bench", "report", *pages, "--check"]) == 0
    for page in (ROOT / "README.md", ROOT / "docs/performance.md"):
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", page.read_text()):
            assert (page.parent / name).is_file()


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


def test_what_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "r.json").write_text(json.dumps(result(*MANY)))
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "report", str(file), "--out", str(tmp_path / "x")])
    assert "pip install 'braze[bench]'" in capsys.readouterr().err
