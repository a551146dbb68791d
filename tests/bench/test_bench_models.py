"""The benchmarks of whole models: loading, counting, timing, and what they judge."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import braze
import pytest
import torch
import torch.nn.functional as F
from braze.__main__ import main
from braze.bench import (
    clock,
    fuse,
    fuse_count,
    harness,
    infer,
    model_cases,
    model_peak,
    models,
    rows,
    train,
)
from braze.bench.harness import Setting
from braze.bench.model_cases import Cell
from torch import Tensor, nn

pytestmark = [
    pytest.mark.cpu_only("runs the benchmark's own processes"),
    pytest.mark.slow("measures whole models"),
]

needs_torchvision = pytest.mark.skipif(
    not models.is_installed("torchvision"), reason="torchvision is not installed"
)
needs_timm = pytest.mark.skipif(
    not (models.is_installed("torchvision") and models.is_installed("timm")),
    reason="timm or torchvision is not installed",
)


class Net(nn.Module):
    """Batch norms before: an activation; a sum, and used elsewhere; a view; nothing. And two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.acted = nn.BatchNorm2d(8)
        self.added = nn.BatchNorm2d(8)
        self.shared = nn.BatchNorm2d(8)
        self.viewed = nn.BatchNorm2d(8)
        self.last = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.drop = nn.Dropout2d()
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.act(self.same(self.acted(self.conv(x))))
        x = self.act(self.added(x).contiguous() + x)
        y = self.shared(x)
        x = F.silu(y) + y.mean()
        x = F.relu(self.viewed(x)[:, :, 1:])
        x = self.drop(self.last(x)).mean(dim=(2, 3))
        return [self.head(x), self.head(-x)]


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name is that small network's."""

    def load(name: str) -> nn.Module:
        torch.manual_seed(0)
        return Net().train()

    monkeypatch.setattr(models, "load", load)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SMALL = ["--batch", "2", "--size", "16", "--seconds", "0", "--threads", "1"]

# ----------------------------------------------------------------- loading


@needs_torchvision
def test_every_name_exists_and_loads_without_weights() -> None:
    known = models._import_torchvision().list_models()
    assert set(models.TORCHVISION) <= set(known)
    model = models.load("resnet18")
    assert model.training and models.example("resnet18", 2, 40).shape == (2, 3, 40, 40)
    assert models.example("r3d_18", 2, 40).dim() == 5
    with pytest.raises(models.ModelError, match="did you mean resnet18"):
        models.load("resnet181")


@needs_timm
def test_timm_models() -> None:
    assert isinstance(models.load("timm:lcnet_050"), nn.Module)
    with pytest.raises(models.ModelError, match=r"did you mean .*timm:resnet50"):
        models.load("timm:resnet5")
    import timm

    assert all(timm.is_model(name.removeprefix("timm:")) for name in models.TIMM)


@pytest.mark.parametrize(
    ("name", "command"),
    [("resnet18", "pip install --no-deps 'torchvision==0."), ("timm:resnet18", "pip install timm")],
)
@pytest.mark.parametrize("bench", [["fuse"], ["train", "--model"], ["infer", "--model"]])
def test_a_missing_package_is_told_with_the_command(
    name: str,
    command: str,
    bench: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    gone = ("torchvision", "timm")
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda p, *at: None if p in gone else find(p, *at)
    )
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *bench, name])
    assert command in capsys.readouterr().err


# ---------------------------------------------------------------- counting


def test_the_count_sees_what_follows_a_batch_norm() -> None:
    x = torch.randn(2, 3, 6, 6)
    followed = fuse_count.norms_followed(Net(), x)
    assert followed.every == ["acted", "added", "shared"]
    assert followed.only == ["acted", "added"]


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(True), nn.SiLU(True), nn.GELU(), nn.Hardswish(), nn.Sigmoid(), nn.Mish()],
    ids=str,
)
def test_the_count_knows_activations(activation: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), activation, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    assert fuse_count.norms_followed(model, torch.randn(2, 3, 4, 4)) == (["0"], ["0"])


@pytest.mark.parametrize("write", ["y + x", "x + y", "y += x", "torch.add(x, y)", "x.add_(y)"])
def test_the_count_knows_sums(write: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            names = {"torch": torch, "x": x.clone(), "y": self.bn(x)}
            exec(write, names)
            return names["y"].relu()

    assert fuse_count.norms_followed(Sum(), torch.randn(2, 3, 4, 4)).every == ["bn"]


def test_the_row_of_a_model(net: None) -> None:
    row = rows.fill(rows.Work("net", lambda row: fuse.measure("net", 2, 8, True, row)))
    assert row["ok"] and row["norms"] == 5 and row["followed"] == 3 and row["only"] == 2
    assert 3 >= row["fused"] >= row["fused_only"] >= 1 and row["fuse_s"] > 0
    assert len(row["missing"]) == 3 - row["fused"]
    assert row["used_elsewhere"] == ["shared"]
    assert row["output"] < 1e-10 and row["gradient"] < 1e-10 and row["eval"] < 1e-4
    assert 0 < row["bf16"] < 2
    sums = fuse.total([row, row, {"name": "failed", "ok": False}])
    assert sums["followed"] == 6 and sums["output"] == row["output"]
    assert sums["percent_only"] == 100 * row["fused_only"] / 2


def test_the_command(net: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fuse.json"
    arguments = ["a", "timm:b", "--size", "8", "--missing", "--threads", "1", "--json", str(file)]
    assert main(["bench", "fuse", *arguments, "--layout", "NCHW"]) == 0
    figures = json.loads(file.read_text())
    assert [row["name"] for row in figures["rows"]] == ["a", "timm:b"]
    assert figures["totals"][0]["name"] == "total of 1 torchvision"
    assert figures["totals"][-1]["followed"] == 6
    assert "goal 95 %:" in capsys.readouterr().out


def test_a_model_that_changes_is_noticed(
    net: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = braze.fuse

    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        fused = original(model, **options)
        with torch.no_grad():
            next(m for m in fused.modules() if isinstance(m, nn.Conv2d)).weight[0] *= 1.01
        return fused

    monkeypatch.setattr(braze, "fuse", wrong)
    assert main(["bench", "fuse", "net", "--size", "8", "--threads", "1"]) == 1
    assert "CHANGED: output, gradient, eval" in capsys.readouterr().out


@pytest.mark.parametrize("bench", ["train", "infer"])
def test_ours_failing_fails_the_row(
    bench: str, net: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> nn.Module:
        raise ValueError("on purpose")

    monkeypatch.setattr(braze, "fuse", broken)
    assert main(["bench", bench, *SMALL, "--model", "net", "--dtype", "fp32"]) == 1
    assert "ValueError: on purpose" in capsys.readouterr().out


def test_a_model_that_fails_is_told(
    net: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> nn.Module:
        raise ValueError("on purpose")

    monkeypatch.setattr(braze, "fuse", broken)
    assert main(["bench", "fuse", "net", "--size", "8", "--threads", "1"]) == 1
    assert "ValueError: on purpose" in capsys.readouterr().out


# ------------------------------------------------------------------ timing


def setting(*against: str) -> Setting:
    return Setting(clock.Host(), 1e9, 0.0, against)


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "quick": False, **given})


def test_contenders_compute_the_same(net: None) -> None:
    for task in (train.TASK, infer.TASK):
        cell = Cell("net", 2, "fp32", 8)
        source = models.load("net")
        source.drop.p = 0.0
        results = []
        for name in ("torch NHWC", "torch NCHW", "braze"):
            model = model_cases.build(cell, name, source, task.training)
            assert model is not source and model.training == task.training
            call = task.call(cell, model_cases.layout_of(name), model)
            results.append(call())
            fused = braze.fusion_report(model).joined
            assert fused and (type(model) is Net) == (name != "braze")
            if task.training:
                assert all(p.grad is not None for p in model.parameters())
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_dtypes_and_layouts(net: None) -> None:
    cell = Cell("resnet18", 2, "bf16 cast", 8)
    x = model_cases.images(cell, "NHWC")
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
    model = model_cases.build(cell, "torch NHWC", models.load("net"), False)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    plain = model_cases.images(Cell("resnet18", 2, "fp32", 8), "NCHW")
    assert plain.is_contiguous() and torch.equal(plain.bfloat16(), x)


def test_compile_time_is_what_the_first_calls_took_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([30.0, 5.0, 1.0, 1.01])
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(seconds)

    assert harness.settle(call) == pytest.approx(37.01 - 4 * 1.01)
    assert next(seconds, None) is None


def test_loss_of_images_and_of_pixels() -> None:
    labels = models.labels(2)
    logits = torch.randn(2, 11)
    pixels = logits[:, :, None, None].expand(-1, -1, 3, 3)
    torch.testing.assert_close(train.loss_of(pixels, labels), train.loss_of(logits, labels))


@pytest.mark.parametrize("bench", ["train", "infer"])
def test_commands(bench: str, net: None, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main(["bench", bench, *SMALL, "--dtype", "fp32", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    defaults = train.CELLS if bench == "train" else infer.CELLS
    models_of = {c.model for c in defaults if c.dtype == "fp32" and c.device == "cpu"}
    timed = [row for row in figures["rows"] if not row["name"].startswith("A/A ")]
    assert {row["name"].split()[0] for row in timed} == models_of
    for row in timed:
        assert row["ok"] and row["theirs"] in ("torch NHWC", "torch NCHW") and row["ratio"] > 0
        assert set(row["contenders"]) == {"torch NHWC", "torch NCHW", "braze", "braze, no reuse"}


def test_options_choose_cells() -> None:
    def cells(task: model_cases.Task, **given: Any) -> list[Cell]:
        return model_cases.chosen_cells(task, options(**given))

    on_cpu = [cell for cell in infer.CELLS if cell.device == "cpu"]
    assert cells(train.TASK) == list(train.CELLS) and cells(infer.TASK) == on_cpu
    assert [c.name for c in cells(infer.TASK, model="net")] == ["net N=8 fp32", "net N=8 bf16"]
    assert len(cells(infer.TASK, batch=3)) == len(on_cpu) - 1
    on_cuda = cells(infer.TASK, device="cuda")
    assert on_cuda and all(cell.name.endswith(" cuda") for cell in on_cuda)
    assert {cell.device for cell in cells(train.TASK, device="cuda")} == {"cuda"}
    judged = next(c for c in model_cases.cases(infer.TASK, options(device="cuda")) if c.goals)
    assert judged.goals is not None
    times = {n: {"warm": {"median_us": us}} for n, us in (("torch NHWC", 14.0), ("braze", 10.0))}
    assert [g["met"] for g in judged.goals({"device": "cuda", "contenders": times})] == [False]


def test_what_cannot_be_compiled_is_left_out_and_told(
    net: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(model: nn.Module) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("no compiler")

        return Broken()

    monkeypatch.setattr(torch, "compile", compiled)
    arguments = ["--model", "net", "--dtype", "fp32", "--against", "compile"]
    assert main(["bench", "infer", *SMALL, *arguments]) == 0
    assert "compile left out: RuntimeError: no compiler" in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert main(["bench", "infer", *SMALL, *arguments]) == 0
    assert "compile" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [["--batch", "0"], ["--threads", "0"], ["--dtype", "fp8"]])
def test_bad_arguments(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for bench in ("train", "infer"):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", bench, *bad])
        assert bad[0] in capsys.readouterr().err


# ------------------------------------------------------------------ memory


needs_peak = pytest.mark.skipif(model_peak.why_not() is not None, reason=str(model_peak.why_not()))


@needs_peak
def test_peak_is_of_the_call_alone() -> None:
    # So large that malloc takes fresh memory, whatever was freed before, and gives it back.
    large = torch.ones(2**25)
    del large
    peak = model_peak.peak_of(lambda: torch.ones(2**24).sum(), model_peak.resident())
    assert 0.9 * 2**26 < peak < 1.5 * 2**26
    assert model_peak.peak_of(lambda: None, model_peak.resident()) < 2**22


@needs_peak
@needs_torchvision
def test_peak_memory_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--model", "resnet18", "--dtype", "fp32", "--memory", "--json", str(file)]
    code = main(["bench", "train", *SMALL, *arguments, "--size", "32"])
    row = json.loads(file.read_text())["rows"][-1]
    # Its gradients are 47 MB.
    assert all(40 < mb < 90 for mb in row["memory_mb"].values())
    assert all(mb > 40 for mb in row["memory_first_mb"].values())
    assert code == (0 if row["ok"] else 1)
    assert "peak memory, MB: braze" in capsys.readouterr().out


def test_more_memory_than_torch_fails_the_row(net: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(task: str, cell: Cell, contender: str, threads: int) -> dict[str, float]:
        return {"peak_mb": 101.0 if contender == "braze" else 100.0, "first_mb": 1.0}

    monkeypatch.setattr(model_peak, "measure", peaks)
    row: dict[str, Any] = {"ok": True}
    model_cases._peaks(infer.TASK, Cell("net", 1, "fp32", 8), setting(), row)
    assert not row["ok"] and "MORE MEMORY" in row["note"]
