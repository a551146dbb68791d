"""The demo with --fuse: the network of torch.nn, passed through braze.fuse on braze's side."""

from __future__ import annotations

from pathlib import Path

import braze
import pytest
import torch
from braze.demo.cli import main, parse
from braze.demo.config import ARCHITECTURES
from braze.demo.data import load
from braze.demo.models import build
from braze.demo.report import parts_of
from braze.demo.sides import make_sides
from demo_runs import QUICK, WITH_DROPOUT, run_demo

pytestmark = pytest.mark.cpu_only("runs the demo's own processes")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_batch_norm_is_fused(arch: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 1, 8, 8)
    model = braze.fuse(build(arch, 1, 8, 10), example=images)
    report = braze.fusion_report(model)
    assert report.joined and not report.left and not report.alone and not report.folded
    assert list(model.state_dict()) == list(build(arch, 1, 8, 10).state_dict())


def test_only_the_side_of_braze_is_fused() -> None:
    data = load("digits", None)
    theirs, ours = make_sides(parse([*QUICK, "--fuse", "--arch", "resnet"]), data)
    plain = [m for m in theirs.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    fused = [m for m in ours.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(plain) == len(fused) > 0
    assert all(type(m) is torch.nn.BatchNorm2d for m in plain)
    assert all(type(m).__module__.startswith("braze.") for m in fused)
    for a, b in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a not in WITH_DROPOUT])
def test_curves_coincide(arch: str, tmp_path: Path) -> None:
    result = run_demo(tmp_path, "--arch", arch, "--fuse", "--epochs", "1", "--optimizer", "sgd")
    losses = [result[side]["curves"]["losses"] for side in ("torch", "braze")]
    assert losses[1][:3] == pytest.approx(losses[0][:3], abs=1e-4)
    assert sum(losses[1][-5:]) < 0.96 * sum(losses[1][:5])


def test_accuracy_is_the_same_and_the_report_tells_the_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_demo(tmp_path, "--fuse", "--epochs", "8")
    parts = {"torch": "torch.optim, torch.nn", "braze": "braze.optim, braze.fuse(torch.nn)"}
    assert "; ".join(f"{k}: {v}" for k, v in parts.items()) in capsys.readouterr().out
    assert result["args"]["fuse"] is True and result["parts"] == parts
    best = {side: result[side]["summary"]["best_accuracy"] for side in ("torch", "braze")}
    assert best["torch"] > 0.9 and abs(best["torch"] - best["braze"]) < 0.02


def test_dropout_trains(tmp_path: Path) -> None:
    result = run_demo(tmp_path, "--fuse", "--arch", "alexnet", "--epochs", "2")
    losses = result["braze"]["curves"]["losses"]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_networks_of_braze_nn_can_be_fused_too(tmp_path: Path) -> None:
    arguments = ["--fuse", "--nn", "braze", "--arch", "resnet"]
    assert parts_of(parse(arguments))["braze"] == "braze.optim, braze.fuse(braze.nn)"
    result = run_demo(tmp_path, *arguments, "--epochs", "1", "--optimizer", "sgd")
    losses = [result[side]["curves"]["losses"] for side in ("torch", "braze")]
    assert losses[1][:3] == pytest.approx(losses[0][:3], abs=1e-4)


def test_default_and_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]).fuse is False
    run = ["--out", str(tmp_path), *QUICK, "--schedule", "constant", "--optimizer", "sgd"]
    assert main([*run, "--epochs", "1", "--fuse"]) == 0
    capsys.readouterr()
    assert main([*run, "--epochs", "2", "--resume"]) == 2
    assert "was trained with --fuse, not with no --fuse" in capsys.readouterr().err
    assert main([*run, "--epochs", "2", "--resume", "--fuse"]) == 0
    # A file from before there was a choice is of a network that is not fused.
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    del content["args"]["fuse"]
    content["epoch"] = 1
    torch.save(content, tmp_path / "best.pt")
    assert main([*run, "--epochs", "2", "--resume", "--fuse"]) == 2
    assert "with no --fuse, not with --fuse" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--fuse" in capsys.readouterr().out
