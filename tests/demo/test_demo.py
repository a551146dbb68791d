"""The demo: its command line end to end, its arguments, and its parts."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from braze.demo import run as run_module
from braze.demo import sides as sides_module
from braze.demo.augment import augment
from braze.demo.cli import main, parse
from braze.demo.config import ARCHITECTURES, AUGMENTATIONS, Config, DemoError
from braze.demo.data import batches, batches_per_epoch, load
from braze.demo.metrics import confusion_matrix, scores
from braze.demo.models import build
from braze.demo.train import epochs_without_gain

pytestmark = pytest.mark.cpu_only("runs the demo's own processes")
# Rounding differences of single steps grow to about 4e-4 in two epochs.
TOLERANCE = 2e-3
QUICK = ["--epochs", "2", "--batch-size", "64", "--threads", "1"]


def run_demo(out: Path, *arguments: str) -> dict[str, Any]:
    assert main([*QUICK, "--out", str(out), *arguments]) == 0
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("braze demo: ")
    return lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimizer", "adam"],
        ["--optimizer", "sgd", "--weight-decay", "0.01", "--schedule", "step"],
        ["--optimizer", "sgd", "--accumulation-steps", "3", "--l1", "0.01"],
        ["--optimizer", "adamw", "--accumulation-steps", "2", "--schedule", "exponential"],
        ["--optimizer", "adamw", "--l1", "0.01"],
        ["--optimizer", "cag", "--schedule", "constant"],
        ["--optimizer", "cag", "--momentum", "0.5", "--accumulation-steps", "2", "--lr", "0.02"],
    ],
    ids=" ".join,
)
def test_curves_coincide(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_demo(tmp_path, *arguments)

    losses = result["torch"]["curves"]["losses"]
    window = result["args"]["accumulation_steps"]
    assert len(losses) == 2 * (1347 // 64 // window * window)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert result["max_loss_difference"] < TOLERANCE
    for side in ("torch", "braze"):
        assert len(result[side]["curves"]["optimizer_ms"]) == len(losses) // window
        assert result[side]["summary"]["step_ms"] > result[side]["summary"]["optimizer_ms"] > 0.0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best.pt", "curves.png", "result.json"}
    out, err = capsys.readouterr()
    assert err == ""
    assert "optimizer step, median" in out and "\x1b" not in out
    assert ("torch adds them up in backward" in out) == (window > 1)


def test_different_updates_do_not_coincide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sides_module._braze_optimizer

    def wrong(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
        optimizer = original(model, config)
        for group in optimizer.param_groups:
            group["lr"] *= 1.02
        return optimizer

    monkeypatch.setattr(sides_module, "_braze_optimizer", wrong)
    assert run_demo(tmp_path, "--optimizer", "sgd")["max_loss_difference"] > TOLERANCE


BAD = [
    (["--arch", "transformer"], "--arch"),
    (["--data", "imagenet"], "--data"),
    (["--optimizer", "lion"], "--optimizer"),
    (["--schedule", "linear"], "--schedule"),
    (["--lr", "-0.1"], "--lr"),
    (["--lr", "nan"], "'nan'"),
    (["--lr", "inf"], "'inf'"),
    (["--momentum", "1.5", "--optimizer", "sgd"], "--momentum"),
    (["--momentum", "0.9", "--optimizer", "adam"], "adam has none"),
    (["--weight-decay", "-1"], "--weight-decay"),
    (["--l1", "much"], "'much'"),
    (["--epochs", "0"], ">= 1"),
    (["--epochs", "1.5"], "'1.5'"),
    (["--batch-size", "0"], "--batch-size"),
    (["--accumulation-steps", "0"], "--accumulation-steps"),
    (["--accumulation-steps", "1000"], "1347"),
    (["--patience", "-1"], "--patience"),
    (["--seed", "-1"], "--seed"),
    (["--threads", "0"], "--threads"),
    (["--device", "tpu"], "--device"),
    (["--data", "mnist"], "--root DIR"),
    (["--data", "cifar10", "--root", "/no/such/folder"], "/no/such/folder"),
    (["--root", "."], "scikit-learn"),
    (["--augment", "flip"], "mirrored digit"),
    (["--augment", "blur"], "'blur'"),
    (["--augment", "none", "shift"], "none"),
    (["--epoch", "3"], "--epoch"),
    (["extra"], "extra"),
    (["--resume"], "without --resume"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_arguments(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert named in error_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cpu" in error_line(capsys)


def test_out_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "out" in error_line(capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert "--accumulation-steps" in out and err == ""


@pytest.mark.parametrize("name", ["sklearn.datasets", "torchvision"])
def test_missing_library(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    data = ["--data", "mnist", "--root", str(tmp_path)] if name == "torchvision" else []
    assert main([*data, "--out", str(tmp_path / "out")]) == 2
    line = error_line(capsys)
    assert "pip install " in line
    assert ("torchvision" if data else "scikit-learn") in line


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_demo(tmp_path, "--epochs", "1", "--optimizer", "sgd")
    assert not (tmp_path / "curves.png").exists()
    assert "pip install scikit-learn matplotlib" in capsys.readouterr().out


def test_divergence_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--optimizer", "sgd", "--lr", "1e30", "--out", str(tmp_path)]) == 1
    assert "--lr 1e+29" in error_line(capsys)


def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        (tmp_path / "best.pt").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "train", interrupted)
    assert main(["--out", str(tmp_path)]) == 130
    assert "--resume" in error_line(capsys)


@pytest.mark.parametrize("optimizer", ["adam", "cag"])
def test_resume_equals_an_uninterrupted_run(optimizer: str, tmp_path: Path) -> None:
    # alexnet, because of its dropout.
    common = ["--arch", "alexnet", "--optimizer", optimizer, "--schedule", "exponential"]
    common += ["--batch-size", "128", "--accumulation-steps", "2"]
    whole = run_demo(tmp_path / "whole", *common, "--epochs", "3")
    run_demo(tmp_path / "parts", *common, "--epochs", "1")
    parts = run_demo(tmp_path / "parts", *common, "--epochs", "3", "--resume")

    for side in ("torch", "braze"):
        for curve in ("losses", "epoch_loss", "accuracy", "precision", "recall"):
            expected = whole[side]["curves"][curve]
            assert parts[side]["curves"][curve] == pytest.approx(expected, abs=1e-5)


def test_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--out", str(tmp_path), *QUICK, "--schedule", "constant", "--optimizer", "sgd"]
    assert main([*run, "--epochs", "1"]) == 0
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert content["epoch"] == 1 and content["args"]["arch"] == "lenet"
    for side in ("torch", "braze"):
        assert {"model", "optimizer", "scheduler"} <= set(content[side])
    capsys.readouterr()

    for changed, named in (
        (["--arch", "vgg"], "--arch lenet, not with --arch vgg"),
        (["--seed", "7"], "--seed 0, not with --seed 7"),
        (["--augment", "none"], "--augment shift rotate, not with --augment none"),
        (["--epochs", "1"], "nothing is left"),
    ):
        assert main([*run, *changed, "--resume"]) == 2
        assert named in error_line(capsys)

    good = (tmp_path / "best.pt").read_bytes()
    for damaged in (b"", b"not a checkpoint", good[: len(good) // 2]):
        (tmp_path / "best.pt").write_bytes(damaged)
        assert main([*run, "--resume"]) == 2
        assert "cannot be read" in error_line(capsys)
    torch.save({"format": 1}, tmp_path / "best.pt")
    assert main([*run, "--resume"]) == 2
    assert "not a checkpoint of this demo" in error_line(capsys)


def test_early_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epochs", "9", "--patience", "1", "--min-delta", "0.9", "--optimizer", "sgd"]
    result = run_demo(tmp_path, *arguments)
    assert len(result["braze"]["curves"]["accuracy"]) == 2
    assert "stopped early" in capsys.readouterr().out


def test_epochs_without_gain() -> None:
    assert epochs_without_gain([0.5], 0.0) == 0
    assert epochs_without_gain([0.5, 0.7, 0.7, 0.6], 0.0) == 2
    assert epochs_without_gain([0.5, 0.55, 0.58, 0.65], 0.1) == 0
    assert epochs_without_gain([0.5, 0.55, 0.58], 0.1) == 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_architectures(arch: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    model = build(arch, channels, size, 10)
    logits = model(torch.randn(4, channels, size, size))
    assert logits.shape == (4, 10)
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        assert weight.grad.any(), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_architecture_trains(arch: str, tmp_path: Path) -> None:
    result = run_demo(tmp_path, "--arch", arch, "--epochs", "1", "--batch-size", "128")
    losses = result["braze"]["curves"]["losses"]
    assert losses[-1] < 0.95 * losses[0]
    # Deep networks amplify rounding within ten batches; a wrong update shows in the second.
    assert losses[:3] == pytest.approx(result["torch"]["curves"]["losses"][:3], abs=1e-4)


def test_build_refuses() -> None:
    with pytest.raises(ValueError, match="unknown architecture"):
        build("mlp", 1, 8, 10)
    with pytest.raises(ValueError, match="8x8"):
        build("lenet", 1, 4, 10)


def test_scores_by_hand() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 0])
    confusion = confusion_matrix(truth, predicted, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    result = scores(confusion)
    assert result.accuracy == pytest.approx(3 / 6)
    # Class 2 is never predicted: precision 0.
    assert result.precision == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert result.recall == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    with pytest.raises(ValueError, match="labels"):
        confusion_matrix(truth, predicted[:2], 3)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_augmentations(name: str, channels: int, size: int) -> None:
    def changed(seed: int) -> torch.Tensor:
        return augment(images.clone(), (name,), torch.Generator().manual_seed(seed))

    images = torch.rand(16, channels, size, size, generator=torch.Generator().manual_seed(1))
    result = changed(5)
    assert result.shape == images.shape and result.dtype == images.dtype
    assert result.min() >= 0.0 and result.max() <= 1.0 + 1e-6
    assert torch.equal(result, changed(5))
    assert not torch.equal(result, changed(6))
    assert not torch.equal(result, images)


def test_augmentations_do_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 8, 2] = 1.0
    images = image.repeat(64, 1, 1, 1)

    flipped = {tuple(x.nonzero()[0].tolist()) for x in augment(images, ("flip",), generator)}
    assert flipped == {(0, 8, 2), (0, 8, 13)}

    places = {tuple(x.nonzero()[0].tolist()) for x in augment(images, ("crop",), generator)}
    assert {place[1] for place in places} == {6, 7, 8, 9, 10}
    assert {place[2] for place in places} == {0, 1, 2, 3, 4}

    rows = torch.arange(16.0).reshape(1, 1, 16, 1)
    for name, farthest in (("shift", 1.0), ("rotate", 1.2)):
        moved = augment(images, (name,), generator)
        center = (moved * rows).sum(dim=(1, 2, 3)) / moved.sum(dim=(1, 2, 3))
        assert 0.3 < (center - 8.0).abs().max() <= farthest

    assert augment(images, (), generator) is images
    with pytest.raises(ValueError, match="blur"):
        augment(images, ("blur",), generator)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = load("digits", None)
    assert len(data.train_labels) == 1347 and len(data.test_labels) == 450
    assert data.test_labels.bincount().min() >= 43

    def drawn(seed: int, epoch: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)
        pairs = list(batches(data, 3, 32, ("shift",), seed, epoch))
        return torch.cat([images for images, _ in pairs])

    assert drawn(0, 1).shape == (96, 1, 8, 8)
    assert torch.equal(drawn(0, 1), drawn(0, 1))
    assert not torch.equal(drawn(0, 1), drawn(0, 2))
    assert not torch.equal(drawn(0, 1), drawn(1, 1))


def test_batches_per_epoch() -> None:
    assert batches_per_epoch(1347, 64, 1) == 21
    assert batches_per_epoch(1347, 64, 4) == 20
    with pytest.raises(DemoError, match="lower one"):
        batches_per_epoch(100, 64, 2)


def test_defaults() -> None:
    config = parse([])
    assert (config.data, config.arch, config.optimizer) == ("digits", "lenet", "adam")
    assert config.augment == ("shift", "rotate") and config.threads == 1
    assert parse(["--augment", "none"]).augment == ()
    assert parse(["--augment", "rotate,shift"]).augment == ("shift", "rotate")
    assert parse(["--optimizer", "cag"]).accumulation_steps == 4


class _Torchvision:
    """Stands in for torchvision.datasets, with small random images."""

    def __init__(self, shape: tuple[int, ...], complete: bool = True) -> None:
        def make(root: str, train: bool, download: bool) -> types.SimpleNamespace:
            assert not download
            if not complete:
                raise RuntimeError("Dataset not found.")
            generator = torch.Generator().manual_seed(int(train))
            count = 96 if train else 40
            pixels = torch.randint(0, 256, (count, *shape), generator=generator)
            targets = [index % 10 for index in range(count)]
            return types.SimpleNamespace(data=pixels.to(torch.uint8), targets=targets)

        make.__name__ = "Dataset"
        self.module = types.ModuleType("torchvision")
        self.module.datasets = types.SimpleNamespace(MNIST=make, CIFAR10=make)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28)), ("cifar10", (32, 32, 3))])
def test_torchvision_data(
    name: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", _Torchvision(shape).module)
    data = load(name, tmp_path)
    assert (data.channels, data.size) == (shape[2] if len(shape) == 3 else 1, shape[0])
    arguments = ["--data", name, "--root", str(tmp_path), "--batch-size", "32"]
    result = run_demo(tmp_path / "out", *arguments)
    assert result["max_loss_difference"] < TOLERANCE


def test_torchvision_files_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", _Torchvision((28, 28), False).module)
    arguments = ["--data", "mnist", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert str(tmp_path / "MNIST" / "raw") in error_line(capsys)
