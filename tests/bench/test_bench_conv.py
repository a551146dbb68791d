"""The benchmark of the convolution kernels: what it counts, compares and claims; the golden convolutions."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import ops_conv
import pytest
import torch
from braze.__main__ import main
from braze.bench import clock, conv_bytes, conv_kernels, golden_conv, harness, memory
from braze.bench.conv_bytes import Traffic
from braze.bench.resnet50 import Convolution, convolutions
from torch import Tensor, nn

pytestmark = pytest.mark.cpu_only("runs the benchmark's own processes")
ROOT = Path(__file__).parents[2]
SETTING = harness.Setting(clock.Host(), 1e9, 0.0)
FIRST = Convolution(16, 8, 1, 1, 5, "first")
MIDDLE = Convolution(8, 8, 3, 2, 5, "middle")
LAST = Convolution(8, 24, 1, 1, 3, "last")
SHORTCUT = Convolution(16, 24, 1, 2, 5, "shortcut")
BLOCK = (FIRST, MIDDLE, LAST)


# ------------------------------------------------------------------- bytes


def test_bytes_of_launches() -> None:
    """By hand: images of 5 x 5, 3 x 3 after a stride of 2, two of them; 16 bits."""
    assert conv_bytes.forward(FIRST, 2) == 2 * (2 * 16 * 25 + 16 * 8 + 2 * 8 * 25)
    # A 1x1 convolution needs every other pixel, a 3x3 one all.
    assert conv_bytes.forward(SHORTCUT, 2) == 2 * (2 * 16 * 9 + 16 * 24 + 2 * 24 * 9)
    assert conv_bytes.forward(MIDDLE, 2) == 2 * (2 * 8 * 25 + 9 * 64 + 2 * 8 * 9)
    x, w, dy = 2 * 16 * 25, 16 * 8, 2 * 8 * 25
    of_weight, of_input = x + dy + w, dy + w + x
    assert conv_bytes.gradients(FIRST, 2, False, False) == 2 * (of_weight + of_input)
    assert conv_bytes.gradients(FIRST, 2, False, False, both=False) == 2 * of_weight
    # The batch norm before is one more tensor for one launch, an implicit gradient one more for each.
    assert conv_bytes.gradients(FIRST, 2, True, False) == 2 * (of_weight + of_input + x)
    assert conv_bytes.gradients(FIRST, 2, False, True) == 2 * (of_weight + of_input + 2 * dy)


def test_bytes_between_two_convolutions() -> None:
    """Tensors of 2 bytes an element. eager: statistics, batch norm and ReLU are 1 + 2 + 2 of them, and backward
    3 + 2 + 3; braze: 1 in an epilogue and 2 in two prologues, or, before a 3x3 convolution, a pass of 3."""
    assert conv_bytes.between(1, "torch") == Traffic(10, 16, 4)
    assert conv_bytes.between(1, "cudnn") == Traffic(6, 10, 4)
    assert conv_bytes.between(1, "braze") == Traffic(0, 6, 2)
    assert conv_bytes.between(3, "braze") == Traffic(0, 8, 2)


def test_a_joins_passes() -> None:
    """Elements of the result, 2 bytes each: what is normalised, the residual, y and a bit; two gradients."""
    one = 2 * conv_bytes.outputs_of(LAST, 1)
    assert conv_bytes.norm(LAST, "cudnn", 1) == Traffic(4.0625 * one, 8.125 * one, 1.0625 * one)
    assert conv_bytes.norm(LAST, "braze", 1).forward == 3.0625 * one
    both = replace(LAST, projected=True)
    assert conv_bytes.norm(both, "braze", 1) == conv_bytes.norm(both, "cudnn", 1)
    assert conv_bytes.norm(both, "cudnn", 1).backward == (2 * 4.0625 + 2) * one
    assert conv_bytes.norm(SHORTCUT, "cudnn", 1).backward == 0


class Eager(nn.Module):
    """A bottleneck as torchvision has it."""

    def __init__(self) -> None:
        super().__init__()
        parts = [
            (nn.Conv2d(c.inputs, c.outputs, c.kernel, c.stride, c.kernel // 2, bias=False), c)
            for c in (*BLOCK, SHORTCUT)
        ]
        self.convs = nn.ModuleList(conv for conv, _ in parts)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c.outputs) for _, c in parts)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm in list(zip(self.convs, self.norms, strict=True))[:2]:
            y = norm(conv(y)).relu_()
        y, identity = (self.norms[i](self.convs[i](z)) for i, z in ((2, y), (3, x)))
        y += identity
        return y.relu_()


def test_saved_bytes_are_those_that_autograd_keeps() -> None:
    """But for the statistics of batch norms, and nothing else; the last ReLU's result is kept for itself."""
    x = torch.randn(64, 16, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    counted = 0.0
    for conv in (*BLOCK, SHORTCUT):
        one = replace(conv, projected=True)
        counted += conv_bytes.convolution(one, "torch", 64).saved
        counted += conv_bytes.norm(one, "torch", 64, users=1).saved
    kept = memory.stored_bytes(Eager().to(torch.bfloat16), x)
    assert 0 <= kept - counted <= 2 * 4 * sum(2 * c.outputs for c in (*BLOCK, SHORTCUT))


def test_bytes_of_resnet50() -> None:
    """What braze's kernels leave out is exactly the activations between its chained convolutions."""
    before, after = (conv_bytes.resnet50(way, 1) for way in ("cudnn", "braze"))
    unwritten = sum(
        2 * conv_bytes.outputs_of(conv, 1)
        for conv in convolutions()
        if conv.place == "first" or (conv.place == "middle" and not conv.projected)
    )
    assert before.saved - after.saved == unwritten
    statistics = sum(
        2 * conv_bytes.outputs_of(conv, 1)
        for conv in convolutions()
        if conv.inner or (conv.joins and not conv.projected)
    )
    assert before.forward - after.forward == 2 * unwritten + statistics
    assert conv_bytes.resnet50("cudnn", 2).saved == 2 * before.saved


def test_the_page_has_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "conv", "--bytes"]) == 0
    shown = capsys.readouterr().out
    assert shown in (ROOT / "docs" / "internals" / "convolutions.md").read_text()
    assert main(["bench", "conv", "--bytes", "--batch", "32"]) == 0
    assert "of 32 images" in capsys.readouterr().out


# -------------------------------------------------------------------- rows


def arguments(device: str, **more: Any) -> Namespace:
    return Namespace(device=device, quick=False, filter=[], **more)


def test_rows_are_all_that_the_kernels_take() -> None:
    assert conv_kernels.layers().total() == 52
    cases = conv_kernels.cases(arguments("cuda", batch=None))
    assert (
        len(cases) == len({case.name for case in cases}) == 2 * 2 * 2 * len(conv_kernels.layers())
    )
    quick = [case for case in cases if case.quick]
    assert cases[: len(quick)] == quick and len(quick) == 2 * len(conv_kernels.QUICK)
    judged = [case for case in cases if case.goals is not None]
    assert len(judged) == 2 * len(conv_kernels.GOALS) and set(map(id, quick)) <= set(
        map(id, judged)
    )
    for case in judged:
        assert case.goals is not None
        assert [g["met"] for g in case.goals({"name": case.name, "ratio": 1.21})] == [True]
        assert [g["met"] for g in case.goals({"name": case.name, "ratio": 1.19})] == [False]
    by_name = {case.name: case for case in cases}
    first = by_name["kernels conv 256-64 1x1 56 / backward bf16 N=256"]
    shape = Convolution(256, 64, 1, 1, 56, "first")
    assert first.parts[0].bytes == conv_bytes.gradients(shape, 256, False, True)
    assert conv_kernels.cases(arguments("cpu", batch=None)) == []
    assert {c.tags["batch"] for c in conv_kernels.cases(arguments("cpu", batch=3))} == {3}


def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Any:
    of = (v.view(1, -1, 1, 1) for v in (mean, invstd * weight, bias))
    mean, scale, bias = of
    return ((x.float() - mean) * scale + bias).to(x.dtype)


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return mean, (var + eps).rsqrt()


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *_: bool
) -> tuple[Tensor, ...]:
    centred = x.float() - mean.view(1, -1, 1, 1)
    total, product = (v.sum((0, 2, 3)) for v in (dy.float(), dy.float() * centred))
    assert weight.shape == mean.shape
    return total, product, product * invstd, total


def backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    total: Tensor,
    product: Tensor,
    count: Tensor,
) -> Tensor:
    assert count.dtype is torch.int32
    of = (mean, invstd, weight, total / count, product / count)
    mean, invstd, weight, total, product = (v.view(1, -1, 1, 1) for v in of)
    centred = x.float() - mean
    return ((dy - total - centred * invstd**2 * product) * invstd * weight).to(x.dtype)


TORCHS = {
    "batch_norm_elemt": elemt,
    "batch_norm_stats": stats,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}


def differences(conv: Convolution, direction: str) -> dict[str, float]:
    """Of each contender from braze, with torch's batch norm as if the CPU had its steps."""
    problem = conv_kernels.Problem(conv, torch.bfloat16, 3, "cpu")
    contenders = getattr(problem, direction)()
    found = {name: one.common(one.call()) for name, one in contenders.items()}
    return {name: harness.difference(found["braze"], found[name]) for name in found}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("conv", [*BLOCK, SHORTCUT], ids=lambda conv: conv.place)
def test_contenders_compute_the_same(
    conv: Convolution, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's steps are CUDA's alone: written here for the CPU, with the arguments that their schemas have."""
    for name, step in TORCHS.items():
        monkeypatch.setattr(conv_kernels.aten, name, step)
    found = differences(conv, direction)
    assert len(found) == 3 and max(found.values()) < 5e-3
    if direction == "forward" or conv.normalised or conv_kernels.is_implicit(conv):
        wrong = {
            "batch_norm_stats": lambda *a: [2 * v for v in stats(*a)],
            "batch_norm_backward_reduce": lambda *a: [2 * v for v in backward_reduce(*a)],
            "batch_norm_backward_elemt": lambda *a: 2 * backward_elemt(*a),
        }
        for name, step in wrong.items():
            monkeypatch.setattr(conv_kernels.aten, name, step)
        assert differences(conv, direction)["torch"] > 0.4


def test_a_row_of_the_kernels(tmp_path: Path) -> None:
    """On the CPU, by the operators' reference."""
    file = tmp_path / "rows.json"
    command = ["bench", "conv", "--batch", "1", "--seconds", "0", "--json", str(file)]
    command += ["--filter", "512-128 1x1 28 / backward bf16", "--filter", "3x3 14 / forward fp16"]
    assert main(command) == 0
    rows = [
        row for row in json.loads(file.read_text())["rows"] if not row["name"].startswith("A/A")
    ]
    assert len(rows) == 2 and all(row["ok"] and row["suite"] == "conv kernels" for row in rows)
    for row in rows:
        assert row["theirs"] == "torch + norm" and row["difference"] < 4e-3
        assert row["floor_us"] > 0 and row["tflop_s"] > 0 and "failed" not in row


# ------------------------------------------------------------------ golden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv", golden_conv.CONVOLUTIONS, ids=lambda conv: conv.name)
def test_golden_convolutions_are_exact(conv: golden_conv.Convolution, dtype: torch.dtype) -> None:
    """A number that fp32 has to round would give every GPU its own bits. In fp64 the same numbers come out, and
    they fill less than fp32's 24 bits whatever part of a sum is looked at."""
    of = golden_conv.Numbers(conv, dtype, "cpu")

    def wide(x: Tensor | None) -> Any:
        return None if x is None else x.double()

    y = ops_conv.convolved(wide(of.x), wide(of.stats), *conv.act)
    dz = ops_conv.output_gradient(*map(wide, of.grad))
    assert torch.equal(y.to(dtype).double(), y) and torch.equal(dz.to(dtype).double(), dz)
    weight, found = of.weight.double(), golden_conv.products(conv, dtype, "cpu")
    out = torch.nn.functional.conv2d(y, weight, None, *conv.window)
    dw = torch.nn.grad.conv2d_weight(y, weight.shape, dz, *conv.window)
    assert torch.equal(found["output"], out.to(dtype))
    assert torch.equal(found["weight.grad32"].double(), dw)
    assert torch.equal(found["weight.grad"], dw.to(dtype))
    # Sums of magnitudes bound every sum; units are the products of the factors' units.
    most = torch.nn.functional.conv2d(y.abs(), weight.abs(), None, *conv.window).max()
    assert most < 2**24 * unit(y) * unit(weight)
    most = torch.nn.grad.conv2d_weight(y.abs(), weight.shape, dz.abs(), *conv.window).max()
    assert most < 2**24 * unit(y) * unit(dz)
    most = torch.nn.grad.conv2d_input(y.shape, weight.abs(), dz.abs(), *conv.window).max()
    assert most < 2**24 * unit(dz) * unit(weight)


def unit(x: Tensor) -> float:
    """The largest power of two that all elements are multiples of."""
    size = 1.0
    while not torch.equal((x / size).round() * size, x):
        size /= 2
    return size
