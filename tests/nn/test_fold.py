"""Convolution + batch norm in eval() without gradients: one convolution, from weights that are never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import braze
import braze.nn as bnn
import pytest
import torch
from activations import MODULES
from braze._native import _C
from fuse_cases import Residual, bn, conv, image
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()
pytestmark = [
    pytest.mark.cpu_only("is about convolutions of the CPU"),
    pytest.mark.skipif(not ONEDNN, reason="torch was built without oneDNN"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def _supported(dtype: torch.dtype) -> bool:
    mkldnn = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32 or bool(mkldnn._is_mkldnn_fp16_supported())


class Join(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(), bn(), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)) + x)
        return y


def _folded(model: nn.Module) -> int:
    return sum("_braze_folded" in module.__dict__ for module in model.modules())


def _same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    scale = float(theirs.abs().max())
    assert float((ours.double() - theirs.double()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_values(name: str, join: bool, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Against fp64, with the layout that torch gives."""
    torch.manual_seed(0)
    act = MODULES[name]
    plain = (Join(act) if join else nn.Sequential(conv(bias=True), bn(), act)).eval()
    x = image().to(dtype).contiguous(memory_format=layout)
    expected = copy.deepcopy(plain).double()(x.double())
    plain.to(dtype).to(memory_format=layout)
    fused = braze.fuse(copy.deepcopy(plain))
    if dtype is torch.float16 and not _supported(dtype):
        with torch.no_grad():
            fused(x)
        assert not _folded(fused)
        return
    with torch.no_grad():
        ours, theirs = fused(x), plain(x)
    assert ours.stride() == theirs.stride() and ours.dtype == dtype
    # A join of contiguous tensors is one pass of the batch norm's kernel.
    assert _folded(fused) == (layout is torch.channels_last or not join)
    _same(ours.double(), expected.detach(), TOLERANCE[dtype])


GEOMETRIES: dict[str, dict[str, Any]] = {
    "pointwise": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": (1, 2)},
    "dilated": {"kernel_size": 3, "dilation": (2, 1)},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_geometry(name: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    kwargs = GEOMETRIES[name]
    plain = nn.Sequential(nn.Conv2d(4, 8, **kwargs), bn(8), nn.ReLU()).eval()
    fused = braze.fuse(copy.deepcopy(plain), channels_last=channels_last)
    for shape in ((3, 4, 8, 7), (1, 4, 9, 9), (2, 4, 5, 30)):
        x = image(*shape).float()
        with torch.no_grad():
            _same(fused(x), plain(x))
    assert _folded(fused) == (name not in ("same", "circular"))


def test_empty_and_unbatched() -> None:
    plain = nn.Sequential(conv(), bn(), nn.ReLU()).eval()
    fused = braze.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        assert fused(torch.empty(0, 4, 5, 5)).shape == (0, 4, 5, 5)
        for model in (fused, plain):
            with pytest.raises(ValueError, match="expected 4D input"):
                model(torch.randn(4, 5, 5))
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 3, 5, 5))
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 4, 5, 5, dtype=torch.float64))


# Every way to change what was folded.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "conv.weight in place": lambda m: m[0].weight.mul_(1.5),
    "conv.weight, one element": lambda m: m[0].weight[1, 2, 0, 1].add_(1.0),
    "conv.bias": lambda m: m[0].bias.add_(1.0),
    "bn.weight": lambda m: m[1].weight.mul_(2.0),
    "bn.bias": lambda m: m[1].bias.add_(1.0),
    "running_mean": lambda m: m[1].running_mean.add_(1.0),
    "running_var": lambda m: m[1].running_var.mul_(2.0),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "weight.data in place": lambda m: m[0].weight.data.mul_(1.5),
    "weight.data": lambda m: setattr(m[0].weight, "data", m[0].weight.data * 1.5),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight * 1.5)),
    "copy_ from numpy": lambda m: m[0].weight.detach().numpy().__imul__(1.5),
    "another bias": lambda m: setattr(m[0], "bias", None),
    "another buffer": lambda m: setattr(m[1], "running_mean", m[1].running_mean + 1),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "load_state_dict, assigned": lambda m: m.load_state_dict(
        {k: v * 2 for k, v in m.state_dict().items()}, assign=True
    ),
    "an optimizer": lambda m: _optimize(m, torch.optim.SGD),
    "braze's optimizer": lambda m: _optimize(m, braze.optim.SGD),
    "a training step": lambda m: (m.train(), m(image().float()), m.eval()),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "stride": lambda m: setattr(m[0], "stride", (2, 2)),
    "double and back": lambda m: (m.double(), m[0].weight.mul_(1.5), m.float()),
}


def _optimize(model: nn.Module, optim: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim(model.parameters(), lr=0.5).step()
    for parameter in model.parameters():
        parameter.grad = None


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_are_seen(name: str, mode: Any) -> None:
    torch.manual_seed(0)
    fused = braze.fuse(nn.Sequential(conv(bias=True), bn(), nn.ReLU())).eval()
    x = image().float()
    with mode():
        before = fused(x)
        assert _folded(fused) == 1
    with torch.no_grad():
        CHANGES[name](fused)
    plain = braze.unfuse(copy.deepcopy(fused))
    with mode():
        ours = fused(x)
        _same(ours, plain(x))
    assert name == "channels last" or ours.shape != before.shape or not torch.equal(ours, before)


@pytest.mark.cpu_only("a device's memory is not read at each call")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_write_through_data_is_missed(layout: Any) -> None:
    """One element anywhere, one bit of it, and changes that leave sums as they are."""
    fused = braze.fuse(nn.Sequential(conv(bias=True), bn(), nn.ReLU())).eval()
    fused.to(memory_format=layout)
    seen = {_fingerprint(fused)}
    for tensor in [*fused.parameters(), *fused.buffers()][:-1]:
        memory = tensor.data.as_strided((tensor.numel(),), (1,)).view(torch.int32)
        for i in range(len(memory)):
            for bit in (0, 23, 31):
                memory[i] ^= 1 << bit if bit < 31 else -(1 << 31)
                seen.add(_fingerprint(fused))
    count = 1 + 3 * sum(t.numel() for t in [*fused.parameters(), *fused.buffers()][:-1])
    weight = fused[0].weight.data
    for change in (lambda: weight.copy_(weight.roll(1, 0)), lambda: weight.neg_()):
        change()
        seen.add(_fingerprint(fused))
    assert len(seen) == count + 2


def _fingerprint(fused: Any) -> int:
    norm = fused[1]
    return _C.fingerprint(
        (
            fused[0].weight,
            fused[0].bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
        )
    )


@pytest.mark.parametrize(
    "make", [lambda: bnn.ConvBNReLU2d(4, 4, 3), lambda: braze.fuse(Residual(4, 4))]
)
def test_eval_folds_anew_what_only_a_device_could_tell(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    x = image().float()
    with torch.no_grad():
        model(x)
    (folded, *_) = kept = [
        m.__dict__["_braze_folded"] for m in model.modules() if "_braze_folded" in m.__dict__
    ]
    on_cpu = all(t is None or t.is_cpu for t in folded.sources)
    folded.faster["shape"] = True
    model.eval()
    assert (folded.key != ()) is on_cpu
    for f in kept:
        f.sources = (*f.sources, torch.empty(1, device="meta"))
    model.eval()
    assert all(f.key == () and (f is not folded or f.faster) for f in kept)


@pytest.mark.parametrize(("size", "folds"), [(3, False), (30, True)])
def test_a_weight_larger_than_the_result_is_folded_for_channels_last_only(
    size: int, folds: bool
) -> None:
    """Where nothing is packed, to read the weight, and see whether it has changed, would cost too much."""
    for layout in (torch.contiguous_format, torch.channels_last):
        fused = braze.fuse(nn.Sequential(conv(16, 32), bn(32), nn.ReLU())).eval()
        fused.to(memory_format=layout)
        x = torch.randn(1, 16, size, size).contiguous(memory_format=layout)
        with torch.no_grad():
            _same(fused(x), braze.unfuse(copy.deepcopy(fused))(x))
        assert _folded(fused) == (folds or layout is torch.channels_last)


def test_memory_of_many_chunks_is_read_to_the_end() -> None:
    weight = torch.zeros(100_003, device="cpu")
    found = set()
    for i in range(-1, len(weight), 997):
        if i >= 0:
            weight.data[i] = 1
        found.add(_C.fingerprint((weight,)))
    weight.data[-1] = 1
    assert _C.fingerprint((weight,)) not in found and len(found) == 1 + len(
        range(996, len(weight), 997)
    )


def test_the_check_of_changes_is_what_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control: without the fingerprint a change is not seen."""
    monkeypatch.setattr("braze.nn._folded._fingerprint", lambda tensors: 0)
    fused = braze.fuse(nn.Sequential(conv(bias=True), bn(), nn.ReLU())).eval()
    x = image().float()
    with torch.no_grad():
        before = fused(x)
        fused[0].weight.mul_(1.5)
        assert torch.equal(fused(x), before)


def test_folding_happens_once_and_is_dropped() -> None:
    fused = braze.fuse(Residual(4, 6), channels_last=True).eval()
    x = image().float()
    with torch.no_grad():
        fused(x)
        kept = [
            m.__dict__["_braze_folded"] for m in fused.modules() if "_braze_folded" in m.__dict__
        ]
        fused(x)
        fused(x[:1])
        again = [
            m.__dict__["_braze_folded"] for m in fused.modules() if "_braze_folded" in m.__dict__
        ]
    assert len(kept) == 3 and all(a is b for a, b in zip(kept, again, strict=True))
    for drop in (fused.train, fused.double, lambda: braze.unfuse(fused)):
        with torch.no_grad():
            fused.eval().float()(x)
        assert _folded(fused) == 3
        drop()
        assert _folded(fused) == 0


def test_many_shapes_share_one_weight() -> None:
    """Two are packed for their shape; from the third on, one weight serves all."""
    torch.manual_seed(0)
    plain = nn.Sequential(conv(), bn(), nn.ReLU()).eval()
    fused = braze.fuse(copy.deepcopy(plain), channels_last=True)
    held = []
    for size in (5, 6, 7, 8, 5):
        x = image(2, 4, size, size).float()
        with torch.no_grad():
            _same(fused(x), plain(x))
        folded = fused[0].__dict__["_braze_folded"]
        held.append((len(folded.packed), folded.plain is not None))
    assert held == [(1, False), (2, False), (0, True), (0, True), (0, True)]


def test_gradients_are_not_folded_away() -> None:
    """In eval() with gradients enabled, the batch norm is computed, and so are all gradients."""
    torch.manual_seed(0)
    plain = nn.Sequential(conv(bias=True), bn(), nn.ReLU()).eval()
    fused = braze.fuse(copy.deepcopy(plain))
    x = image().float()
    with torch.no_grad():
        fused(x)
    for model in (fused, plain):
        model(x).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_follows_torch(weights: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(conv(bias=True), bn(), nn.ReLU()).eval().to(weights)
    plain = plain.to(memory_format=torch.channels_last)
    fused = braze.fuse(copy.deepcopy(plain))
    x = image().to(weights)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            _same(fused(x), plain(x), 4e-2)
        _same(fused(x), plain(x), 1e-5 if weights is torch.float32 else 4e-2)
        with torch.autocast("cpu", torch.bfloat16):
            _same(fused(x.float()), plain(x.float()), 4e-2)
            _same(fused(x.bfloat16()), plain(x.bfloat16()), 4e-2)


def test_inference_tensors() -> None:
    """Parameters made in inference mode have no version."""
    torch.manual_seed(0)
    with torch.inference_mode():
        fused = braze.fuse(nn.Sequential(conv(bias=True), bn(), nn.ReLU())).eval()
        x = image().float()
        before = fused(x)
        fused[0].weight.mul_(2)
        plain = braze.unfuse(copy.deepcopy(fused))
        _same(fused(x), plain(x))
        assert not torch.equal(fused(x), before)


def test_modules_of_braze_fold_too() -> None:
    torch.manual_seed(0)
    ours = braze.nn.ConvBNAct2d(4, 4, 3, padding=1, bias=True, activation="silu").eval()
    x = image().float()
    with torch.no_grad():
        folded = ours(x)
        with_residual = ours(x, x)
    assert _folded(ours) == 1
    _same(folded, ours(x).detach())
    _same(with_residual, ours(x, x).detach())
    assert copy.deepcopy(ours).conv.__dict__["_braze_folded"].plain is None
    ours.train()
    ours(x)
    ours.eval()
    with torch.no_grad():
        _same(ours(x), ours.bn(ours.conv(x)))


def test_hooks_on_the_convolution_run() -> None:
    fused = braze.fuse(nn.Sequential(conv(), bn(), nn.ReLU())).eval()
    fused[0].register_forward_hook(lambda module, args, output: output * 0)
    with torch.no_grad():
        y = fused(image().float())
    torch.testing.assert_close(y, torch.relu(fused[1](torch.zeros_like(y))))


def test_frozen_batch_norm_in_a_training_model() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(conv(), bn(), nn.ReLU())
    plain[1].eval()
    fused = braze.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        _same(fused(image().float()), plain(image().float()))
    plain[1].train()
    fused[1].train()
    with torch.no_grad():
        _same(fused(image().float()), plain(image().float()), 1e-4)
