"""Stand-ins, on CPU tensors, for cuDNN's calls and CUDA's clock and stream; a module to fold, its results."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import braze
import pytest
import torch
import torch.nn.functional as F
from braze import _native
from braze._native import _C
from braze.nn import _fold, _fold_cudnn
from fuse_cases import bn
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
NHWC = torch.channels_last
# Two convolutions of every shape: each is warmed up three times and timed three times.
MEASURING = ["fused"] * 6 + ["apart"] * 6
# So unlike one another that no two could be exchanged without notice.
GEOMETRY: dict[str, Any] = {
    "kernel_size": (3, 2),
    "stride": (2, 1),
    "padding": (3, 4),
    "dilation": (1, 5),
}
SAME_SIZE: dict[str, Any] = {"kernel_size": 3, "padding": 1}


class Cudnn:
    """What was called, at what cost on the clock."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.arguments: list[dict[str, Any]] = []
        self.cost = {"fused": 1.0, "apart": 2.0}
        self.now = 0.0
        self.capturing = False
        self.synchronized = 0
        self.error: Exception | None = None

    def note(self, name: str) -> None:
        self.called.append(name)
        self.now += self.cost[name]

    def take(self) -> list[str]:
        called, self.called = self.called, []
        return called

    def relu(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        /,
        z: Tensor | None = None,
    ) -> Tensor:
        if self.error is not None:
            raise self.error
        assert not torch.is_grad_enabled()
        self.note("fused")
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        self.arguments.append({"x": x, "weight": weight, "bias": bias, "z": z, **geometry})
        y = F.conv2d(x.double(), weight.double(), bias.double(), **geometry)
        if z is not None:
            y = y + z.double()
        return y.relu().to(x.dtype)

    def add_relu(
        self, x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any
    ) -> Tensor:
        assert alpha == 1
        return self.relu(x, weight, bias, *geometry, z=z)

    def apply(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.note("apart")
        return _C.batch_norm_apply(*arguments)

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing and not self.capturing
        event = SimpleNamespace(
            synchronize=lambda: event.at, elapsed_time=lambda e: e.at - event.at
        )
        event.record = lambda: setattr(event, "at", self.now)
        return event

    def stream(self) -> Any:
        assert not self.capturing
        return SimpleNamespace(synchronize=self.synchronize)

    def synchronize(self) -> None:
        self.synchronized += 1


def installed(monkeypatch: pytest.MonkeyPatch) -> Cudnn:
    stand_in = Cudnn()
    monkeypatch.setitem(_fold._LIBRARIES, "cpu", _fold_cudnn)
    monkeypatch.setattr(_native, "CUDA_FILE", "here")
    monkeypatch.setattr(torch, "cudnn_convolution_relu", stand_in.relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", stand_in.add_relu)
    monkeypatch.setattr(_fold_cudnn, "_C", SimpleNamespace(batch_norm_apply=stand_in.apply))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stand_in.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", stand_in.stream)
    monkeypatch.setattr(torch.cuda, "Event", stand_in.event)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return stand_in


def module(
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = NHWC,
    inputs: int = 8,
    outputs: int = 8,
    activation: str = "relu",
    **kwargs: Any,
) -> Any:
    made = braze.nn.ConvBNAct2d(
        inputs, outputs, activation=activation, **{"bias": True, **SAME_SIZE, **kwargs}
    )
    made.bn.load_state_dict(bn(outputs).state_dict(), strict=made.bn.track_running_stats)
    return made.eval().to(dtype).to(memory_format=layout)


def image(*shape: int, dtype: torch.dtype = torch.float32, layout: Any = NHWC) -> Tensor:
    return torch.randn(shape or (2, 8, 7, 6)).to(dtype).contiguous(memory_format=layout)


def expected(model: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """In fp64, by torch."""
    conv, norm = copy.deepcopy(model.conv).double(), copy.deepcopy(model.bn).double()
    y = F.batch_norm(
        conv._conv_forward(x.double(), conv.weight, conv.bias),
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        eps=norm.eps,
    )
    y = y if residual is None else y + residual.double()
    function = {"relu": F.relu, "silu": F.silu, "identity": lambda z: z}[norm.activation]
    return function(y)


def check(model: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    ours = model(x, residual)
    theirs = expected(model, x, residual)
    assert ours.shape == theirs.shape and ours.dtype == x.dtype
    error = (ours.double() - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE[x.dtype], float(error)
    return ours


def folded(model: Any) -> Any:
    return model.conv.__dict__.get("_braze_folded")
