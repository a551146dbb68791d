"""The batch-norm benchmarks: their layers, figures and goals, and the CUDA one rehearsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from braze.__main__ import main
from braze.bench import batch_norm, batch_norm_cases, batch_norm_cuda, cuda_clock, rows
from braze.bench.batch_norm_cases import Case, Layer
from torch import nn

pytestmark = pytest.mark.cpu_only("runs the benchmark's own processes")


def test_resnet50() -> None:
    layers = batch_norm_cases.resnet50_layers()
    assert sum(layer.count for layer in layers) == 53
    assert sum(layer.joins for layer in layers) == 16
    assert sum(layer.channels * layer.count for layer in layers) == 26560
    # Elements of one image, as many as its convolutions put out.
    assert sum(layer.channels * layer.side**2 * layer.count for layer in layers) == 11_113_984
    names = [layer.name for layer in layers]
    assert len(set(names)) == 12 and set(batch_norm_cases.QUICK) < set(names)


def test_bytes() -> None:
    layer = Layer(64, 2, 1, 1)
    case = Case("bf16", "NHWC", "relu", 3)
    assert case.bytes_of(layer) == 3 * 64 * 4 * 2
    assert case.bytes_moved(layer, "forward") == 3 * case.bytes_of(layer)
    assert case.bytes_moved(layer, "backward") == 5 * case.bytes_of(layer)
    join = Case("bf16", "NHWC", "relu", 3, join=True)
    assert join.bytes_moved(layer, "backward") == 6 * case.bytes_of(layer)
    assert join.layers_of([Layer(8, 2, 3), Layer(8, 4, 3, 2)]) == [Layer(8, 4, 2, 2)]


@pytest.mark.parametrize("join", [False, True])
def test_both_compute_the_same(join: bool) -> None:
    case = Case("fp32", "NHWC", "silu", 2, join)
    layer = Layer(8, 5, 1, 1)
    for direction in batch_norm_cases.PASSES:
        calls = batch_norm_cases.contenders(case, layer, direction, "cpu")
        ours, theirs = calls["braze"](), calls["torch"]()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    x = case.input(layer, "cpu")
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_stored_bytes_are_counted_once() -> None:
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    assert batch_norm_cases.stored_bytes(nn.Sequential(nn.SiLU(), nn.SiLU()), x) == 2 * x.nbytes
    assert batch_norm_cases.stored_bytes(nn.ReLU(), x) == x.nbytes
    assert batch_norm_cases.stored_bytes(nn.Identity(), x) == 0


def test_silu_stores_a_third_less() -> None:
    kept = batch_norm_cases.stored(Case("fp32", "NHWC", "silu", 8), Layer(64, 14, 1), "cpu")
    assert kept["braze"] < 0.67 * kept["torch"]


def row(layer: str, count: int, torch_us: float, braze_us: float) -> dict[str, Any]:
    return {
        "layer": layer,
        "count": count,
        "torch_us": torch_us,
        "braze_us": braze_us,
        "no_reuse_us": 2 * braze_us,
        "torch_median_us": torch_us,
        "braze_median_us": 2 * braze_us,
        "ratio_min": torch_us / braze_us,
        "ratio": torch_us / braze_us,
        "floor_us": 3.0,
    }


def test_sums_count_every_layer() -> None:
    layers = [row("a", 3, 10.0, 5.0), row("b", 1, 6.0, 12.0)]
    case = Case("fp32", "NHWC", "relu", 8)
    total = batch_norm.total(case, "forward", layers)
    assert total["torch_us"] == 36 and total["braze_us"] == 27 and total["no_reuse_us"] == 54
    assert total["layers"] == 4
    assert total["ratio_min"] == 36 / 27 and total["ratio_median"] == 36 / 54
    assert total["worst_layer"] == 0.5 and total["floor_us"] == 12 and total["goal"] == 2.2
    assert batch_norm.total(Case("fp32", "NHWC", "silu", 8), "forward", layers)["goal"] is None


def test_goals_are_judged() -> None:
    case = batch_norm_cuda.CASES[0]
    for braze_us, met in ((10.0, True), (18.0, False)):
        total = batch_norm_cuda.total(
            case, "forward", [{**row("a", 2, 20.0, braze_us), "floor_us": 9.0}]
        )
        assert [goal["met"] for goal in total["goals"]] == [met, met]
    other = batch_norm_cuda.total(batch_norm_cuda.CASES[1], "forward", [row("a", 1, 1.0, 1.0)])
    assert other["goals"] == []


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--quick", "--batch", "2", "--seconds", "0", "--only", "bf16", "--json", str(path)]
    assert main(["bench", "batch_norm", *arguments]) == 0
    figures = json.loads(path.read_text())
    assert len(figures["sums"]) == 4 and len(figures["rows"]) == 16
    assert figures["stored"][0]["activation"] == "relu"
    assert all(
        r["braze_us"] > 0 and r["torch_us"] > 0 and r["no_reuse_us"] > 0 and r["floor_us"] > 0
        for r in figures["rows"]
    )
    out = capsys.readouterr().out
    assert "bf16 NHWC relu N=2, backward" in out and "worst layer" in out
    arguments = ["--quick", "--batch", "1", "--seconds", "0", "--join", "--activation", "silu"]
    assert main(["bench", "batch_norm", *arguments, "--direction", "forward"]) == 0
    assert "fp32 NCHW add+silu N=1, forward" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [["--only", "fp8"], ["--threads", "0"], ["--batch", "0"]])
def test_bad_arguments(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "batch_norm", *bad])
    assert bad[1] in capsys.readouterr().err


def test_cuda_benchmark_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, skip = tmp_path / "figures.json", tmp_path / "skip.json"
    quick = ["--device", "cpu", "--quick", "--batch", "2", "--seconds", "0", "--rows"]
    skip.write_text(json.dumps(["bf16 NHWC relu N=2 / backward"]))
    arguments = [*quick, "--only", "bf16 NHWC relu", "--json", str(path), "--skip-file", str(skip)]
    assert main(["bench", "batch_norm_cuda", *arguments]) == 0
    (measured,) = json.loads(path.read_text())["rows"]
    assert measured["name"] == "bf16 NHWC relu N=2 / forward" and measured["ok"]
    assert [r["layer"] for r in measured["layers"]] == list(batch_norm_cases.QUICK)
    out = capsys.readouterr().out
    assert f"BEGIN {measured['name']}" in out and f'ROW {{"name": "{measured["name"]}"' in out


def test_a_failing_layer_fails_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(batch_norm_cuda, "contenders", broken)
    case = Case("fp32", "NHWC", "relu", 1)

    def measured(layer: Layer) -> dict[str, Any]:
        fixed = (case, [layer], "forward", cuda_clock.Rehearsal(), 1e9, 0.0)
        return rows.fill(rows.Work("row", lambda row: batch_norm_cuda.measure(*fixed, row)))

    failed = measured(Layer(8, 4, 1))
    assert not failed["ok"] and "8x4x4: ValueError: on purpose" in failed["note"]
    refused = measured(Layer(2**20, 64, 1))
    assert not refused["ok"] and "GiB are free" in refused["note"]


def test_a_slow_host_is_given_more_time() -> None:
    class Slow(cuda_clock.Rehearsal):
        def __init__(self) -> None:
            self.asked: list[float] = []

        def cold(self, call: Any, count: int, expected: float) -> list[float]:
            self.asked.append(expected)
            return [1e-3] * count if len(self.asked) > 2 else []

    clock = Slow()
    seen = batch_norm_cuda.sample(clock, {"only": lambda: None}, 0.0)
    assert len(seen["only"]) == 5
    assert clock.asked[2] == 4 * clock.asked[0]
