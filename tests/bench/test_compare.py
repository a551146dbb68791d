"""Comparing two results: what is noise, and what is slower."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from braze.__main__ import main
from braze.bench import compare, environment, session

pytestmark = pytest.mark.cpu_only("reads files")


def row(
    name: str, ours: float, theirs: float | None, noise: float, turns: int = 40, seed: int = 0
) -> dict[str, Any]:
    """``noise``: standard deviation, as a share. The machine's phases hit both alike."""
    random.seed(f"{name}{seed}")
    phases = [random.uniform(1.0, 1.3) for _ in range(turns)]

    def times(us: float) -> dict[str, Any]:
        rounds = [us * phase * (1 + random.gauss(0, noise)) for phase in phases]
        return {
            "warm": {
                "min_us": min(rounds),
                "median_us": sorted(rounds)[turns // 2],
                "rounds_us": rounds,
            }
        }

    contenders = {"braze": times(ours)} | ({"torch": times(theirs)} if theirs else {})
    found: dict[str, Any] = {"suite": "optim", "name": name, "ok": True, "device": "cpu"}
    found |= {"isa": "avx2", "threads": 2, "figure": "warm", "contenders": contenders}
    return found | ({"theirs": "torch", "ratio": theirs / ours} if theirs else {})


def result(path: Path, *rows: dict[str, Any]) -> Path:
    where = {"machine": "Zen 4", "torch": "2.13.0"}
    path.write_text(json.dumps({"format": session.FORMAT, "environment": where, "rows": rows}))
    return path


@pytest.mark.parametrize(
    ("change", "noise", "words"),
    [
        (1.0, 0.005, {"SAME"}),
        (1.08, 0.01, {"SLOWER"}),
        (0.9, 0.01, {"FASTER"}),
        (1.0, 0.10, {"SAME", "UNCLEAR"}),
        (1.06, 0.15, {"SAME", "UNCLEAR"}),
    ],
)
def test_noise_is_no_verdict_and_a_change_is(change: float, noise: float, words: set[str]) -> None:
    for seed in range(30):
        old = row("r", 100.0, 200.0, noise, seed=seed)
        new = row("r", 100.0 * change, 200.0, noise, seed=seed + 1000)
        verdict = compare.judge(old, new, 0.03)
        assert verdict is not None and verdict.word in words and not verdict.alone


@pytest.mark.parametrize("turns", [3, 5, 8])
def test_few_turns_prove_little_and_a_great_change_all_the_same(turns: int) -> None:
    """Three turns by chance all slower than three others: once in twenty rows."""

    def words(change: float, noise: float) -> list[str]:
        pairs = (
            [
                row("r", us, 200.0, noise, turns, seed)
                for us, seed in ((100.0, i), (100 * change, -i))
            ]
            for i in range(1, 401)
        )
        verdicts = [compare.judge(old, new, 0.03) for old, new in pairs]
        return [verdict.word for verdict in verdicts if verdict is not None]

    assert words(1.0, 0.10).count("SLOWER") <= 1
    assert words(1.5, 0.01).count("SLOWER") > 390


def test_no_verdict_without_turns() -> None:
    old, new = (row("r", us, 200.0, 0.0) for us in (100.0, 300.0))
    for figures in new["contenders"].values():
        figures["warm"]["rounds_us"] = []
    verdict = compare.judge(old, new, 0.03)
    assert verdict is not None and verdict.word == "UNCLEAR"
    assert verdict.change == pytest.approx(3.0)


def test_of_both_results_the_same_contender_and_the_same_figure() -> None:
    """torch's fastest mode is another one in the second result, and only braze's cold time is in both."""
    old, new = (row("r", 100.0, 200.0, 0.001, seed=seed) for seed in (0, 1))
    new["contenders"]["torch fused"] = row("r", 100.0, 120.0, 0.001)["contenders"]["torch"]
    new["theirs"] = "torch fused"
    verdict = compare.judge(old, new, 0.03)
    assert verdict is not None and verdict.word == "SAME" and not verdict.alone
    for figures in old["contenders"].values():
        figures["cold"] = figures.pop("warm")
    old["figure"] = "cold"
    assert compare.judge(old, new, 0.03) is None
    new["contenders"]["braze"]["cold"] = row("r", 200.0, 1.0, 0.001)["contenders"]["braze"]["warm"]
    verdict = compare.judge(old, new, 0.03)
    assert verdict is not None and verdict.alone and verdict.word == "SLOWER"


def test_what_braze_differs_from_itself_does_not_count() -> None:
    control = row("A/A r", 100.0, 110.0, 0.001)
    assert compare.noise([{"rows": [control]}]) == pytest.approx(0.10, abs=3e-3)
    assert compare.noise([{"rows": [row("r", 1.0, 5.0, 0.0)]}]) == 0.0
    # A median of 1.00 among turns that are all over the place.
    lucky = row("A/A r", 100.0, 100.0, 0.2) | {"suite": "norm", "ratio": 1.0}
    assert compare.noise([{"rows": [lucky]}]) > 0.04
    # The noise of another suite is not this one's.
    assert compare.noise([{"rows": [lucky, control]}], "optim") == pytest.approx(0.1, abs=3e-3)
    assert compare.noise([{"rows": [lucky]}], "optim") > 0.04


def test_noise_is_no_evidence_that_nothing_changed() -> None:
    old, new = (row("r", us, 200.0, 0.005, seed=int(us)) for us in (100.0, 106.0))
    words = [compare.judge(old, new, 0.03, noise) for noise in (0.0, 0.2)]
    assert [verdict and verdict.word for verdict in words] == ["SLOWER", "UNCLEAR"]


def test_a_change_within_the_noise_of_the_control_is_not_slower(tmp_path: Path) -> None:
    def file(name: str, us: float, apart: float) -> str:
        rows = row("r", us, 200.0, 0.001), row("A/A r", 100.0, 100.0 * apart, 0.001)
        return str(result(tmp_path / name, *rows))

    old = file("a.json", 100.0, 1.0)
    assert main(["bench", "compare", old, file("b.json", 106.0, 1.0)]) == 1
    assert main(["bench", "compare", old, file("c.json", 106.0, 1.08)]) == 0
    assert main(["bench", "compare", file("d.json", 100.0, 1.08), str(tmp_path / "b.json")]) == 0


def test_a_row_that_fails_now_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = row("r", 100.0, 200.0, 0.001)
    failed = {k: v for k, v in good.items() if k != "contenders"} | {
        "ok": False,
        "note": "so wrong",
    }
    files = [result(tmp_path / f"{i}.json", r) for i, r in enumerate((good, failed))]
    assert main(["bench", "compare", *map(str, files)]) == 0
    assert "no times; so wrong" in capsys.readouterr().out


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(name, 100.0, 200.0, 0.005) for name in ("one", "two")]
    alone = row("alone", 100.0, None, 0.005)
    old = result(tmp_path / "a.json", *rows, alone, row("gone", 1.0, 2.0, 0.0))
    same = result(tmp_path / "b.json", *copy.deepcopy(rows), alone)
    assert main(["bench", "compare", str(old), str(same)]) == 0
    out = capsys.readouterr().out
    assert (
        "2 SAME, 0 FASTER, 0 SLOWER, 1 UNCLEAR" in out and "without torch" in out and "gone" in out
    )
    slower = result(tmp_path / "c.json", rows[0], row("two", 120.0, 200.0, 0.005))
    assert main(["bench", "compare", str(old), str(slower)]) == 1
    assert "1 SLOWER" in capsys.readouterr().out
    assert main(["bench", "compare", str(old), str(slower), "--threshold", "30"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "compare", str(old), str(slower), "--threshold", "-1"])


# Of the format, but cut: without rows; with a row that has no name.
CUT = json.dumps({"format": session.FORMAT})
NAMELESS = json.dumps({"format": session.FORMAT, "environment": {}, "rows": [{}]})


@pytest.mark.parametrize("content", [None, "{", '{"format": "other"}', CUT, NAMELESS])
def test_files_that_do_not_compare(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = result(tmp_path / "a.json", row("one", 1.0, 2.0, 0.0)), tmp_path / "b.json"
    if content is not None:
        bad.write_text(content)
    for other, words in ((bad, str(bad)), (result(tmp_path / "c.json"), "no row in common")):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", "compare", str(good), str(other)])
        assert words in capsys.readouterr().err


def test_another_machine_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = result(tmp_path / "a.json", row("one", 1.0, 2.0, 0.0))
    other = tmp_path / "b.json"
    other.write_text(path.read_text().replace("Zen 4", environment.processor() + "?"))
    assert main(["bench", "compare", str(path), str(other)]) == 0
    assert "not the same machine" in capsys.readouterr().out
