"""Tables and pictures from results; the checkout's own pages are up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench_results import MANY, result, row
from braze.__main__ import main
from braze.bench import plots, report
from braze.bench.rows import Hopeless

pytestmark = pytest.mark.cpu_only("reads files")
ROOT = Path(__file__).parents[2]


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


def on_gpu(*rows: dict[str, Any], **where: Any) -> dict[str, Any]:
    gpu = {"name": "H200"}
    return result(*({**one, "device": "cuda"} for one in rows), gpu=gpu, **where)


def test_a_gpu_has_a_table_of_its_own() -> None:
    """A newer result of a GPU does not take the place of the CPU's."""
    cpu = result(row("optim", "SGD / 1 x 64", 5.0), date="2025-01-01")
    gpu = on_gpu(row("optim", "SGD / 1 x 64", 6.0), date="2026-01-01")
    first, second = report.optim([gpu, cpu]).split("\n\n| tensors")
    assert "5.00" in first and "6.00" not in first and "H200" not in first
    assert "6.00" in second and "H200; Zen 9" in second and "avx512" not in second
    page = report.performance([gpu, cpu])
    assert "## H200" in page and "## Zen 9" in page and "Not measured yet" not in page
    assert "Not measured yet: no result of a GPU" in report.performance([cpu])
    assert report.picture([gpu, cpu]).count("summary.png") == 2


def test_a_suite_is_shown_where_it_was_measured_last() -> None:
    """The newest result is another suite's, of another machine; commits are those of the rows in the table."""
    old = result(row("dropout", "relu 4M fp32 forward", 5.0), date="2025-01-01", commit="aaa0000")
    more = result(row("norm", "x", 5.0), date="2025-01-02", commit="bbb0000")
    new = result(row("optim", "SGD / 1 x 64", 6.0), machine="Xeon", commit="ccc0000", dirty=True)
    text = report.dropout([old, more, new])
    assert "5.00" in text and "Zen 9" in text and "aaa0000" in text
    assert "bbb0000" not in text and "ccc0000" not in text
    assert "Xeon; torch 2.13.0; commit ccc0000 with changes" in report.optim([old, more, new])


def test_the_row_of_the_most_threads_is_shown_and_all_are_on_the_page() -> None:
    rows = [row("optim", "SGD / 1 x 64", float(n), threads=n) for n in (2, 1)]
    text = report.optim([result(*rows)])
    assert "2.00" in text and "1.00" not in text
    page = report.performance([result(*rows)])
    assert "avx512, 2 threads" in page and "avx512, 1 thread (" in page


def test_what_failed_is_on_the_page() -> None:
    failed = {**row("norm", "a|b", 1.0), "ok": False, "note": "RuntimeError: differs"}
    page = report.performance([result({k: v for k, v in failed.items() if k != "contenders"})])
    assert "- a|b (avx512): not measured: RuntimeError: differs" in page
    assert "| a\\|b |" in report.performance([result(row("norm", "a|b", 1.0))])


def test_pictures_beside_a_page_are_checked_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, file = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text("no block")
    gone = tmp_path / "assets/performance/gone/summary.png"
    gone.parent.mkdir(parents=True)
    gone.touch()
    arguments = ["bench", "report", str(file), "--docs", str(page)]

    def stale(data: dict[str, Any]) -> set[str]:
        file.write_text(json.dumps(data))
        with monkeypatch.context() as without:
            without.setattr(plots.importlib.util, "find_spec", lambda name: None)
            code = main([*arguments, "--check"])
        found = set(re.findall(r"(\w+/\w+)\.png", capsys.readouterr().err.replace("-", "_")))
        assert code == bool(found)
        return found

    data = result(*MANY)
    assert stale(data) == {"gone/summary", "zen_9_2_cores/summary"}
    assert main(arguments) == 0
    assert stale(data) == set() and not gone.exists()
    # Other figures in the same rows.
    every = {
        f"zen_9_2_cores/{name}" for name in ("summary", "ratios", "roofline", "compute", "sizes")
    }
    assert stale(result(*MANY[:-1], {**MANY[-1], "ratio": 1.3})) == every
    # Kinds that these results do not have are gone once they are drawn.
    file.write_text(json.dumps(result(row("train", "resnet18 N=8 fp32", 1.5))))
    assert main(arguments) == 0
    left = {path.stem for path in tmp_path.glob("assets/performance/*/*.png")}
    assert left == {"summary", "ratios", "roofline"}


def test_pictures_of_several_machines_are_apart(tmp_path: Path) -> None:
    files = []
    for name in ("Zen 9", "Xeon"):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(result(row("train", "x", 1.5), machine=name)))
    assert main(["bench", "report", *map(str, files), "--out", str(tmp_path / "out")]) == 0
    assert {p.parent.name for p in (tmp_path / "out").glob("*/ratios.png")} == {"zen-9", "xeon"}


def test_a_page_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "r.json").write_text(json.dumps(result(*MANY)))
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "report", str(file), "--readme", str(tmp_path / "none.md")])
    assert "cannot read" in capsys.readouterr().err


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


def test_what_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "r.json").write_text(json.dumps(result(*MANY)))
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "report", str(file), "--out", str(tmp_path / "x")])
    assert "pip install 'braze[bench]'" in capsys.readouterr().err
