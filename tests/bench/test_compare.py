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


def test_few_turns_prove_little() -> None:
    old, new = (row("r", us, 200.0, 0.04, 3, seed=3) for us in (100.0, 104.0))
    verdict = compare.judge(old, new, 0.03)
    assert verdict is not None and verdict.word == "UNCLEAR"


def test_what_braze_differs_from_itself_does_not_count() -> None:
    control = row("A/A r", 100.0, 110.0, 0.001)
    assert compare.noise([{"rows": [control]}]) == pytest.approx(0.0953, abs=1e-3)
    assert compare.noise([{"rows": [row("r", 1.0, 5.0, 0.0)]}]) == 0.0


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


@pytest.mark.parametrize("content", [None, "{", '{"format": "other"}'])
def test_files_that_do_not_compare(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = result(tmp_path / "a.json", row("one", 1.0, 2.0, 0.0)), tmp_path / "b.json"
    if content is not None:
        bad.write_text(content)
    for other, words in ((bad, "no result"), (result(tmp_path / "c.json"), "no row in common")):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", "compare", str(good), str(other)])
        assert words in capsys.readouterr().err


def test_another_machine_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = result(tmp_path / "a.json", row("one", 1.0, 2.0, 0.0))
    other = tmp_path / "b.json"
    other.write_text(path.read_text().replace("Zen 4", environment.processor() + "?"))
    assert main(["bench", "compare", str(path), str(other)]) == 0
    assert "not the same machine" in capsys.readouterr().out
