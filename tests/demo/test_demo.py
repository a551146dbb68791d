"""The demo: its command line end to end, and its parts."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import braze
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from braze import demo
from braze.__main__ import main
from braze.bench.command import Command
from braze.demo import data as demo_data
from braze.demo import sides as demo_sides
from braze.demo.models import ARCHITECTURES, build

pytestmark = pytest.mark.cpu_only("runs the demo's own processes")
# Rounding differences of single steps grow to about 4e-4 in two epochs.
TOLERANCE = 2e-3
QUICK = ["--epochs", "2", "--batch-size", "64", "--threads", "1"]
# Their masks differ from torch's; batch norm's rounding is all that the others see.
WITH_DROPOUT = ("alexnet", "googlenet")
NEW_LAYERS = (["--nn", "braze"], ["--fuse"])


def run_demo(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["demo", *QUICK, "--out", str(out), *arguments]) == 0
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def losses_of(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    return result["torch"]["curves"]["losses"], result["braze"]["curves"]["losses"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that tells why."""
    try:
        assert main(["demo", *arguments]) == code
    except SystemExit as end:
        assert end.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimizer", "adam"],
        ["--optimizer", "sgd", "--accumulation-steps", "3", "--l1", "0.01", "--schedule", "step"],
        ["--optimizer", "adamw", "--accumulation-steps", "2", "--schedule", "exponential"],
        ["--optimizer", "cag", "--schedule", "constant"],
        ["--optimizer", "cag", "--momentum", "0.5", "--accumulation-steps", "2", "--lr", "0.02"],
    ],
    ids=" ".join,
)
def test_curves_coincide(arguments: list[str], tmp_path: Path) -> None:
    result = run_demo(tmp_path, *arguments)
    losses, window = losses_of(result)[0], result["args"]["accumulation_steps"]
    assert len(losses) == 2 * (1347 // 64 // window * window)
    assert sum(losses[-5:]) < sum(losses[:5]) and result["max_loss_difference"] < TOLERANCE
    for side in ("torch", "braze"):
        figures = result[side]["summary"]
        assert len(result[side]["curves"]["optimizer_ms"]) == len(losses) // window
        assert figures["step_ms"] > figures["optimizer_ms"] > 0.0 and figures["stored_mb"] > 0.1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "curves.png", "result.json"}


def test_different_updates_do_not_coincide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = demo_sides.make_sides

    def wrong(*arguments: Any) -> Any:
        sides = original(*arguments)
        for group in sides[1].optimizer.param_groups:
            group["initial_lr"] *= 1.02
            group["lr"] *= 1.02
        return sides

    monkeypatch.setattr(demo_sides, "make_sides", wrong)
    assert run_demo(tmp_path, "--optimizer", "sgd")["max_loss_difference"] > TOLERANCE


@pytest.mark.parametrize("arguments", NEW_LAYERS, ids=" ".join)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains(arch: str, arguments: list[str], tmp_path: Path) -> None:
    common = ["--arch", arch, *arguments, "--epochs", "1", "--batch-size", "128"]
    theirs, ours = losses_of(run_demo(tmp_path, *common))
    assert sum(ours[-3:]) < 0.97 * sum(ours[:3])
    if arch not in WITH_DROPOUT:
        # Deep networks amplify rounding within ten batches; a wrong update shows in the second.
        assert ours[:3] == pytest.approx(theirs[:3], abs=1e-3)


@pytest.mark.parametrize("arguments", NEW_LAYERS, ids=" ".join)
def test_accuracy_is_the_same(arguments: list[str], tmp_path: Path) -> None:
    result = run_demo(tmp_path, *arguments, "--epochs", "8")
    layers = "braze.nn" if "--nn" in arguments else "braze.fuse(torch.nn)"
    assert result["parts"]["braze"] == f"braze.optim, {layers}"
    best = {side: result[side]["summary"]["best_accuracy"] for side in ("torch", "braze")}
    assert best["torch"] > 0.9 and abs(best["torch"] - best["braze"]) < 0.02


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--arch", "transformer"], "--arch"),
        (["--lr", "nan"], "nan"),
        (["--lr", "inf"], "inf"),
        (["--momentum", "1.5", "--optimizer", "sgd"], "below 1"),
        (["--momentum", "0.9", "--optimizer", "adam"], "adam has none"),
        (["--l1", "much"], "'much'"),
        (["--epochs", "1.5"], "'1.5'"),
        (["--epoch", "3"], "--epoch"),
        (["--batch-size", "0"], "at least 2"),
        (["--accumulation-steps", "1000"], "1347"),
        (["--seed", "-1"], "--seed"),
        (["--data", "mnist"], "--root DIR"),
        (["--data", "cifar10", "--root", "/no/such/folder"], "/no/such/folder"),
        (["--root", "."], "scikit-learn"),
        (["--resume"], "without --resume"),
    ],
)
def test_bad_arguments(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, *arguments, "--out", str(tmp_path / "out"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no usable GPU" in refused(capsys, "--device", "cuda", "--out", str(tmp_path))


def test_out_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert "out" in refused(capsys, "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["sklearn.datasets", "torchvision"])
def test_missing_library(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    data = ["--data", "mnist", "--root", str(tmp_path)] if name == "torchvision" else []
    assert "pip install " in refused(capsys, *data, "--out", str(tmp_path / "out"))


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_demo(tmp_path, "--epochs", "1")
    assert not (tmp_path / "curves.png").exists()


def test_divergence_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "--optimizer", "sgd", "--lr", "1e30", "--out", str(tmp_path)]
    assert "--lr 1e+29" in refused(capsys, *arguments, code=1)


def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        (tmp_path / "best.pt").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    assert "--resume" in refused(capsys, "--out", str(tmp_path), code=130)


@pytest.mark.parametrize("optimizer", ["adam", "cag"])
def test_resume_equals_an_uninterrupted_run(optimizer: str, tmp_path: Path) -> None:
    # alexnet, because of its dropout.
    common = ["--arch", "alexnet", "--optimizer", optimizer, "--schedule", "exponential"]
    common += ["--batch-size", "128", "--accumulation-steps", "2"]
    whole = run_demo(tmp_path / "whole", *common, "--epochs", "3")
    run_demo(tmp_path / "parts", *common, "--epochs", "1")
    parts = run_demo(tmp_path / "parts", *common, "--epochs", "3", "--resume")
    for side in ("torch", "braze"):
        for curve in ("losses", "epoch_loss", "accuracy"):
            expected = whole[side]["curves"][curve]
            assert parts[side]["curves"][curve] == pytest.approx(expected, abs=1e-5)


def test_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*QUICK, "--out", str(tmp_path), "--schedule", "constant", "--optimizer", "sgd"]
    run_demo(tmp_path, *run, "--epochs", "1")
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert content["epoch"] == 1 and content["args"]["arch"] == "lenet"
    # What one side saved, the other can load.
    arguments = parsed(*run)
    sides = demo_sides.make_sides(arguments, demo_data.load("digits", None))
    sides[0].load_state(content["braze"])
    sides[1].load_state(content["torch"])
    for changed, named in (
        (["--arch", "vgg"], "arch lenet, not with arch vgg"),
        (["--seed", "7", "--fuse"], "fuse False, seed 0, not with fuse True, seed 7"),
        (["--epochs", "1"], "already holds epoch 1"),
    ):
        assert named in refused(capsys, *run, *changed, "--resume")
    good = (tmp_path / "best.pt").read_bytes()
    for damaged in (b"", b"not a checkpoint", good[: len(good) // 2]):
        (tmp_path / "best.pt").write_bytes(damaged)
        assert "is no checkpoint of this demo" in refused(capsys, *run, "--resume")
    torch.save({"format": 1}, tmp_path / "best.pt")
    assert "its format is 1" in refused(capsys, *run, "--resume")


def test_monitor_tells_a_plain_deep_network_from_one_with_batch_norm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *QUICK, "--monitor", "--out", str(tmp_path)]) == 0
    plain, normalized = capsys.readouterr().out.splitlines()
    assert "plain: gradients vanish in 0.weight, " in plain
    assert "batch_norm: gradients are healthy" in normalized
    pictures = {path.name for path in tmp_path.iterdir()}
    assert pictures == {"gradients_plain.png", "gradients_batch_norm.png"}


def test_early_stopping(tmp_path: Path) -> None:
    result = run_demo(tmp_path, "--epochs", "9", "--patience", "1", "--lr", "0")
    assert len(result["braze"]["curves"]["accuracy"]) < 9


# ------------------------------------------------------------------- parts


def parsed(*arguments: str) -> Any:
    parser = Command(module="braze.demo")
    return demo.complete(parser.parse_args(list(arguments)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_architectures(arch: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    theirs, ours = (build(arch, channels, size, 10, nn) for nn in (torch.nn, braze.nn))
    images = torch.randn(4, channels, size, size)
    logits = theirs(images)
    assert logits.shape == (4, 10)
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for name, weight in theirs.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)
    homes = {type(m).__module__.split(".")[0] for m in ours.modules() if hasattr(m, "running_mean")}
    assert homes == {"braze"}
    if size == 8:  # every batch norm can be fused
        report = braze.fusion_report(braze.fuse(theirs.train(), example=images))
        assert report.joined and not report.left and not report.alone and not report.folded


def test_only_the_side_of_braze_is_fused() -> None:
    digits = demo_data.load("digits", None)
    theirs, ours = demo_sides.make_sides(parsed("--fuse", "--arch", "resnet"), digits)
    homes = [
        {
            type(m).__module__.split(".")[0]
            for m in side.model.modules()
            if hasattr(m, "running_var")
        }
        for side in (theirs, ours)
    ]
    assert homes == [{"torch"}, {"braze"}]
    for a, b in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = demo_data.load("digits", None)
    assert len(data.train_labels) == 1347 and len(data.test_labels) == 450
    assert data.test_labels.bincount().min() >= 43

    def drawn(seed: int, epoch: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)
        pairs = list(demo_data.batches(data, 3, 32, True, seed, epoch))
        return torch.cat([images for images, _ in pairs])

    assert drawn(0, 1).shape == (96, 1, 8, 8)
    assert torch.equal(drawn(0, 1), drawn(0, 1))
    assert not torch.equal(drawn(0, 1), drawn(0, 2))
    assert not torch.equal(drawn(0, 1), drawn(1, 1))
    plain = next(demo_data.batches(data, 1, 1347, False, 0, 1))[0]
    assert plain.mean().abs() < 1e-5 and plain.std() == pytest.approx(1.0, abs=1e-3)


def test_augmentation_moves_and_mirrors() -> None:
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 8, 2] = 1.0
    for mirrored, columns in ((False, set(range(5))), (True, {*range(5), *range(11, 16)})):
        generator = torch.Generator().manual_seed(0)
        moved = demo_data._augmented(image.repeat(256, 1, 1, 1), mirrored, generator)
        places = moved.nonzero()
        assert moved.shape == (256, 1, 16, 16)
        assert set(places[:, 2].tolist()) == {6, 7, 8, 9, 10}
        assert set(places[:, 3].tolist()) == columns


class _Torchvision:
    """A stand-in for torchvision, which need not be installed, with few and random images."""

    def __init__(self, shape: tuple[int, ...], complete: bool = True) -> None:
        def make(root: str, train: bool, download: bool) -> types.SimpleNamespace:
            assert not download
            if not complete:
                raise RuntimeError("Dataset not found.")
            count = 96 if train else 40
            pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
            return types.SimpleNamespace(data=pixels, targets=[i % 10 for i in range(count)])

        make.__name__ = "Dataset"
        self.module = types.ModuleType("torchvision")
        self.module.datasets = types.SimpleNamespace(MNIST=make, CIFAR10=make)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28)), ("cifar10", (32, 32, 3))])
def test_torchvision_data(
    name: str,
    shape: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", _Torchvision(shape).module)
    channels = shape[2] if len(shape) == 3 else 1
    images = demo_data.load(name, tmp_path).train_images
    assert images.shape == (96, channels, shape[0], shape[0])
    arguments = ["--data", name, "--root", str(tmp_path), "--batch-size", "32"]
    assert run_demo(tmp_path / "out", *arguments)["max_loss_difference"] < TOLERANCE
    monkeypatch.setitem(sys.modules, "torchvision", _Torchvision(shape, False).module)
    capsys.readouterr()
    assert f"no complete {name} files" in refused(capsys, *arguments, "--out", str(tmp_path))
