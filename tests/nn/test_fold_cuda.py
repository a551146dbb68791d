"""Folded convolutions on a GPU, against torch's eager modules in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import braze
import pytest
import torch
from braze import _native
from cudnn_stand_in import LAYOUTS
from devices import MODE
from fuse_cases import Residual, bn
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    MODE == "fake" or not torch.cuda.is_available() or _native.CUDA_FILE is None,
    reason="needs a GPU and braze's kernels for it",
)
# cuDNN may choose a Winograd algorithm; TF32 would be off by 1e-3.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "identity": nn.Identity(),
    "silu": nn.SiLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def image(*shape: int, dtype: torch.dtype, layout: str) -> Tensor:
    x = torch.randn(shape, device="cpu").to("cuda", dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])


class Join(nn.Module):
    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv, norm, act

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)) + residual)
        return y


def to_device(model: nn.Module, dtype: torch.dtype, layout: str) -> nn.Module:
    return model.eval().to("cuda", dtype).to(memory_format=LAYOUTS[layout])


def check(plain: nn.Module, fused: nn.Module, *inputs: Tensor) -> None:
    dtype = inputs[0].dtype
    theirs = copy.deepcopy(plain).double()(*(x.double() for x in inputs))
    like = plain(*inputs)
    # The first call folds and times.
    for ours in (fused(*inputs), fused(*inputs)):
        assert ours.dtype == dtype and ours.stride() == like.stride()
        error = float((ours.double() - theirs).abs().max() / theirs.abs().max())
        assert error <= TOLERANCE[dtype], error
    assert any("_braze_folded" in module.__dict__ for module in fused.modules())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inputs", [3, 8, 64])
def test_values(dtype: torch.dtype, layout: str, adds: bool, activation: str, inputs: int) -> None:
    act = ACTIVATIONS[activation]
    geometry: dict[str, Any] = {"stride": (2, 1), "padding": (3, 4), "dilation": (1, 5)}
    made = nn.Conv2d(inputs, 64, (3, 2), **geometry), bn(64), act
    plain = to_device(Join(*made) if adds else nn.Sequential(*made), dtype, layout)
    x = [image(4, inputs, 13, 16, dtype=dtype, layout=layout)]
    if adds:
        x.append(image(4, 64, 9, 19, dtype=dtype, layout=layout))
    check(plain, braze.fuse(copy.deepcopy(plain)), *x)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointwise_and_grouped(dtype: torch.dtype, layout: str) -> None:
    plain = nn.Sequential(
        *(nn.Conv2d(64, 128, 1, bias=False), bn(128), nn.ReLU()),
        *(nn.Conv2d(128, 128, 3, 2, 1, groups=128, bias=False), bn(128), nn.ReLU6()),
        *(nn.Conv2d(128, 64, 3, 1, 1, groups=4), bn(64), nn.ReLU()),
    )
    plain = to_device(plain, dtype, layout)
    x = image(2, 64, 14, 14, dtype=dtype, layout=layout)
    check(plain, braze.fuse(copy.deepcopy(plain)), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(layout: str) -> None:
    plain = to_device(Residual(16, 32), torch.float32, layout)
    fused = braze.fuse(copy.deepcopy(plain))
    x = image(2, 16, 14, 14, dtype=torch.float32, layout=layout)
    with torch.autocast("cuda", torch.bfloat16):
        theirs = plain(x)
        for ours in (fused(x), fused(x)):
            assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            assert error <= TOLERANCE[torch.bfloat16], error


@pytest.mark.parametrize(("warm", "frozen"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_captured(warm: bool, frozen: bool, layout: str) -> None:
    """What is frozen and was called is captured as it is folded, and outlives a change; else the modules
    themselves are."""
    dtype = torch.bfloat16
    plain = to_device(Residual(16, 32), dtype, layout)
    fused = braze.fuse(copy.deepcopy(plain)).requires_grad_(not frozen)
    x = image(2, 16, 14, 14, dtype=dtype, layout=layout)
    plain(x)  # cuDNN's own first call
    if warm:
        check(plain, fused, x)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = fused(x)
    folded = [m for m in fused.modules() if "_braze_folded" in m.__dict__]
    assert len(folded) == (3 if warm else 0)
    x.copy_(image(2, 16, 14, 14, dtype=dtype, layout=layout))
    before = plain(x)
    for model in (plain, fused):
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = plain(x)
    fused.train().eval()
    fused(x)  # folds anew, in whatever memory was freed
    graph.replay()
    expected = before if warm and frozen else after
    error = float((y - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE[dtype], error


def test_changes_are_seen() -> None:
    plain = to_device(Residual(16, 32), torch.float32, "nhwc")
    fused = braze.fuse(copy.deepcopy(plain))
    x = image(2, 16, 14, 14, dtype=torch.float32, layout="nhwc")
    for _ in range(2):
        check(plain, fused, x)
        for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
            ours.mul_(1.5), theirs.mul_(1.5)
        fused.load_state_dict({name: value * 2 for name, value in fused.state_dict().items()})
        plain.load_state_dict({name: value * 2 for name, value in plain.state_dict().items()})


def test_writes_through_data_are_seen_after_eval() -> None:
    plain = to_device(nn.Sequential(nn.Conv2d(8, 8, 3), bn(8), nn.ReLU()), torch.float32, "nhwc")
    fused = braze.fuse(copy.deepcopy(plain))
    x = image(2, 8, 9, 9, dtype=torch.float32, layout="nhwc")
    before = fused(x)
    for model in (plain, fused):
        model[0].weight.data[3] = 1.0
        model.eval()
    check(plain, fused, x)
    assert not torch.equal(fused(x), before)


def test_cudnns_two_calls() -> None:
    """They exist and do what they are called for, whichever is faster."""
    plain = to_device(
        nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), bn(64), nn.ReLU()), torch.float16, "nhwc"
    )
    fused = braze.fuse(copy.deepcopy(plain))
    x = image(8, 64, 28, 28, dtype=torch.float16, layout="nhwc")
    check(plain, fused, x)
    conv, norm = fused[0], fused[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = (
        (conv.weight.double() * scale.view(-1, 1, 1, 1))
        .half()
        .to(memory_format=torch.channels_last)
    )
    bias = ((conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()).half()
    geometry: Any = (conv.stride, conv.padding, conv.dilation, 1)
    theirs = plain(x)
    for z in (None, torch.randn_like(theirs)):
        if z is None:
            ours, expected = torch.cudnn_convolution_relu(x, weight, bias, *geometry), theirs
        else:
            ours = torch.cudnn_convolution_add_relu(x, weight, z, 1.0, bias, *geometry)
            expected = torch.relu(fused[1](conv(x)) + z)
        error = float((ours - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCE[torch.float16], error
