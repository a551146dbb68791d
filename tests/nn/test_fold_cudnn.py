"""Folded convolutions by cuDNN, on stand-ins: the calls' arguments, the values, changes of what is folded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import braze
import pytest
import torch
from cudnn_stand_in import (
    GEOMETRY,
    LAYOUTS,
    MEASURING,
    NHWC,
    TOLERANCE,
    Cudnn,
    check,
    expected,
    image,
    module,
)
from fuse_cases import Residual
from torch import Tensor, nn

pytestmark = pytest.mark.cpu_only("has stand-ins for what is CUDA's")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_argument(
    cudnn: Cudnn, dtype: torch.dtype, layout: str, adds: bool, bias: bool
) -> None:
    memory = LAYOUTS[layout]
    model = module(dtype, memory, outputs=16, bias=bias, **GEOMETRY)
    x = image(2, 8, 9, 8, dtype=dtype, layout=memory)
    residual = None
    if adds:
        residual = torch.randn(expected(model, x).shape).to(dtype).contiguous(memory_format=memory)
    y = check(model, x, residual)
    assert y.is_contiguous(memory_format=memory)
    if layout == "nchw" and dtype is not torch.float32:
        assert cudnn.take() == ["apart"]
        return
    assert cudnn.take() == [*MEASURING, "fused"]
    for arguments in cudnn.arguments:
        assert arguments["x"] is x and arguments["z"] is residual
        weight = arguments["weight"]
        assert weight.dtype == dtype and weight.shape == model.conv.weight.shape
        assert weight.stride() == model.conv.weight.stride()
        assert arguments["bias"].dtype == dtype and arguments["bias"].shape == (16,)
        assert {name: arguments[name] for name in GEOMETRY if name != "kernel_size"} == {
            name: value for name, value in GEOMETRY.items() if name != "kernel_size"
        }
        assert arguments["groups"] == 1


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("adds", [False, True])
def test_another_order_would_be_noticed(
    cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], adds: bool
) -> None:
    """The control of the test above: stride, padding and dilation permuted."""
    model = module(**GEOMETRY)
    x = image(2, 8, 12, 12)
    residual = torch.randn(expected(model, x).shape).to(memory_format=NHWC) if adds else None
    check(model, x, residual)

    def swapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            *tensors, stride, padding, dilation, groups = arguments
            geometry = (stride, padding, dilation)
            return function(*tensors, *(geometry[i] for i in order), groups)

        return call

    monkeypatch.setattr(torch, "cudnn_convolution_relu", swapped(cudnn.relu))
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", swapped(cudnn.add_relu))
    with pytest.raises((AssertionError, RuntimeError)):
        check(model, x, residual)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_pointwise_weights_are_in_channels_last_format(cudnn: Cudnn, kernel_size: int) -> None:
    """Where both formats are the same in memory, strides tell torch which one is meant."""
    padding = kernel_size // 2
    model = module(layout=torch.contiguous_format, kernel_size=kernel_size, padding=padding)
    check(model, image())
    assert cudnn.arguments[0]["weight"].stride()[1] == 1
    assert cudnn.arguments[0]["weight"].stride()[3] == 8


def test_contiguous_input_of_a_model_in_channels_last(cudnn: Cudnn) -> None:
    model = module(torch.bfloat16)
    check(model, image(dtype=torch.bfloat16, layout=torch.contiguous_format))
    assert cudnn.take() == [*MEASURING, "fused"]
    assert cudnn.arguments[-1]["x"].is_contiguous(memory_format=NHWC)


def test_a_residual_block(cudnn: Cudnn) -> None:
    """ReLU, sum and ReLU are in the two calls; the shortcut has no activation."""
    plain = Residual(8, 16).eval().to(memory_format=NHWC)
    fused = braze.fuse(copy.deepcopy(plain))
    x = image()
    fused(x)
    cudnn.take(), cudnn.arguments.clear()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert sorted(cudnn.take()) == ["apart", "fused", "fused"]
    assert [arguments["z"] is not None for arguments in cudnn.arguments] == [False, True]


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(cudnn: Cudnn, given: torch.dtype) -> None:
    """The fused calls are not on autocast's list: everything has its dtype before."""
    model = module()
    x = image(dtype=given)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert model(x, y).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16 and cudnn.take() == [*MEASURING, "fused"] * 2
    for arguments in cudnn.arguments:
        for name in ("x", "weight", "bias"):
            assert arguments[name].dtype == torch.bfloat16
    theirs = expected(model, x)
    assert (y.double() - theirs).abs().max() <= 3e-2 * theirs.abs().max()
    if given is torch.float32:
        check(model, x)
        assert cudnn.arguments[-1]["bias"].dtype == torch.float32


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight": lambda m: m.conv.weight.mul_(1.5),
    "bias": lambda m: m.conv.bias.add_(1.0),
    "bn.weight": lambda m: m.bn.weight.mul_(2.0),
    "bn.bias": lambda m: m.bn.bias.add_(1.0),
    "running_mean": lambda m: m.bn.running_mean.add_(1.0),
    "running_var": lambda m: m.bn.running_var.mul_(2.0),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "load_state_dict, assigned": lambda m: m.load_state_dict(
        {k: v * 2 for k, v in m.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_changes_are_seen(cudnn: Cudnn, name: str, activation: str) -> None:
    """And nothing is timed again, as values have no influence on that."""
    model = module(activation=activation)
    x = image()
    before = check(model, x)
    cudnn.take()
    CHANGES[name](model)
    after = check(model, x)
    assert not torch.allclose(before, after)
    assert cudnn.take() == ["fused" if activation == "relu" else "apart"]
    check(model, x)
    assert cudnn.synchronized == 2


@pytest.mark.parametrize("fused", [False, True])
def test_train_drops_what_is_folded(cudnn: Cudnn, fused: bool) -> None:
    model = module()
    if fused:
        model = braze.fuse(nn.Sequential(model.conv, model.bn))
    model(image())
    conv = model[0] if fused else model.conv
    assert "_braze_folded" in conv.__dict__
    model.eval()
    assert "_braze_folded" in conv.__dict__
    model.train()
    assert "_braze_folded" not in conv.__dict__


def test_copies_start_afresh(cudnn: Cudnn) -> None:
    model = module()
    check(model, image())
    cudnn.take()
    check(copy.deepcopy(model), image())
    assert cudnn.take() == [*MEASURING, "fused"]
