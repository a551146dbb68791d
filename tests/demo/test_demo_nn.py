"""The demo with --nn braze: the same networks from braze.nn, one import changed."""

from __future__ import annotations

from pathlib import Path

import braze.nn
import pytest
import torch
from braze.demo.cli import main, parse
from braze.demo.config import ARCHITECTURES
from braze.demo.models import build
from demo_runs import QUICK, WITH_DROPOUT, run_demo

pytestmark = pytest.mark.cpu_only("runs the demo's own processes")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_networks_from_either_namespace(arch: str) -> None:
    theirs, ours = build(arch, 1, 8, 10), build(arch, 1, 8, 10, braze.nn)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    norms = [m for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(type(m).__module__.startswith("braze.") for m in norms)
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)
    if arch in WITH_DROPOUT:
        assert any(
            type(m).__module__.startswith("braze.") for m in ours.modules() if "Drop" in str(m)
        )


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a not in WITH_DROPOUT])
def test_curves_coincide(arch: str, tmp_path: Path) -> None:
    arguments = ["--arch", arch, "--nn", "braze", "--epochs", "1", "--optimizer", "sgd"]
    result = run_demo(tmp_path, *arguments)
    losses = [result[side]["curves"]["losses"] for side in ("torch", "braze")]
    assert losses[1][:3] == pytest.approx(losses[0][:3], abs=1e-4)
    assert sum(losses[1][-5:]) < 0.96 * sum(losses[1][:5])


def test_accuracy_is_the_same_and_the_report_tells_the_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_demo(tmp_path, "--nn", "braze", "--epochs", "8")
    assert "torch: torch.optim, torch.nn; braze: braze.optim, braze.nn" in capsys.readouterr().out
    assert result["args"]["nn"] == "braze"
    assert result["parts"] == {"torch": "torch.optim, torch.nn", "braze": "braze.optim, braze.nn"}
    best = {side: result[side]["summary"]["best_accuracy"] for side in ("torch", "braze")}
    assert best["torch"] > 0.9 and abs(best["torch"] - best["braze"]) < 0.02


def test_dropout_trains(tmp_path: Path) -> None:
    result = run_demo(tmp_path, "--nn", "braze", "--arch", "alexnet", "--epochs", "2")
    losses = result["braze"]["curves"]["losses"]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_default_and_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]).nn == "torch"
    run = ["--out", str(tmp_path), *QUICK, "--schedule", "constant", "--optimizer", "sgd"]
    assert main([*run, "--epochs", "1"]) == 0
    # A file from before there was a choice is of torch.nn.
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    del content["args"]["nn"]
    torch.save(content, tmp_path / "best.pt")
    capsys.readouterr()
    assert main([*run, "--epochs", "2", "--resume", "--nn", "braze"]) == 2
    assert "--nn torch, not with --nn braze" in capsys.readouterr().err
    assert main([*run, "--epochs", "2", "--resume"]) == 0
