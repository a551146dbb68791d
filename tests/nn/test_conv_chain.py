"""Convolutions between batch norms by braze's kernels (on the CPU: their reference) against torch's modules."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import braze
import braze.nn as bnn
import devices
import op_checks as checks
import pytest
import torch
from braze.nn import _conv_chain, _conv_choice
from braze.nn._conv_bn import conv_chain
from conv_cases import (
    BF16,
    KERNELS,
    KINKS,
    LEAKY,
    SMOOTH,
    Chain,
    assert_no_worse,
    counted,
    image,
    in_double,
    outcome,
)
from fuse_cases import block, bn, conv
from op_table import Sample, values
from ops_conv import CONV_OPS, Problem, forward_args, input_grad_args, weight_grad_args
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def braze_computes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BRAZE_CONV", "braze")
    _conv_choice.forget()
    yield
    _conv_choice.forget()


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[bool, ...]], None]:
    """Who computes the convolutions, in their order."""

    def set_pattern(own: tuple[bool, ...]) -> None:
        pattern = itertools.cycle(own)
        monkeypatch.setattr(_conv_choice, "prefers_own", lambda problem, measure: next(pattern))

    return set_pattern


# --------------------------------------------------------------- operators

GEOMETRIES = [
    Problem(h=h, w=w, n=n, c=16, k=8, kernel=kernel, stride=stride, padding=padding)
    for kernel, padding in ((1, 0), (1, 1), (3, 0), (3, 1), (3, 2))
    for stride in (1, 2)
    for n, h, w in ((1, 3, 5), (2, 6, 4))
]
MAKERS = (forward_args, input_grad_args, weight_grad_args)


@pytest.mark.parametrize("problem", GEOMETRIES, ids=lambda p: p.name)
def test_geometries(problem: Problem) -> None:
    """Windows that begin outside, end outside, leave pixels out."""
    for op, make in zip(CONV_OPS, MAKERS, strict=True):
        for p in (problem, Problem(**{**vars(problem), "activation": "relu", "implicit": True})):
            sample = Sample(p.name, lambda dtype, p=p, make=make: make(p, dtype))
            checks.check_values(op, sample, BF16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("normalised", [False, True])
def test_what_is_not_finite_stays_in_its_windows(
    value: float, kernel: int, normalised: bool
) -> None:
    p = Problem(n=1, h=6, w=7, kernel=kernel, padding=kernel // 2, activation="relu" * normalised)
    args = forward_args(p, BF16)
    args[0][0, 3, 2, 4] = value
    if normalised:
        args[1][3].abs_()  # a scale that keeps the infinity above relu's corner
    y = torch.ops.braze.conv_norm_forward(*args)[0]
    reached = torch.zeros(6, 7, dtype=torch.bool)
    reached[2 - kernel // 2 : 3 + kernel // 2, 4 - kernel // 2 : 5 + kernel // 2] = True
    assert torch.equal(y[0].isfinite().all(0), ~reached)
    dx = torch.ops.braze.conv_norm_input_grad(
        *(y, None, None, None, args[4], None, None, None, 0, 0.0, [p.h, p.w], 1, p.padding)
    )[0]
    again = torch.nn.functional.max_pool2d(reached.float()[None, None], kernel, 1, kernel // 2)[
        0, 0
    ]
    assert torch.equal(dx[0].isfinite().all(0), again == 0)


def test_running_statistics_of_an_empty_batch() -> None:
    p = Problem(n=0, activation="relu")
    args = forward_args(p, BF16)
    before = [args[9].clone(), args[10].clone(), int(args[11])]
    y, stats = torch.ops.braze.conv_norm_forward(*args)
    assert y.shape == p.output and stats.shape == (5, p.k)
    devices.assert_same([args[9], args[10]], before[:2])
    assert int(args[11]) == before[2] + 1


# ------------------------------------------------------------------ chains

CHAINS: dict[str, tuple[tuple[int, int, int, str], ...]] = {
    "1": ((16, 3, 2, "silu"),),
    "smooth": ((16, 3, 1, "identity"), (8, 3, 1, "silu")),
    "3": ((16, 1, 1, "leaky_relu"), (16, 3, 1, "leaky_relu"), (8, 1, 1, "identity")),
    "relu": ((16, 1, 1, "relu"), (16, 3, 1, "relu6"), (8, 1, 1, "relu")),
    "4": ((8, 1, 1, "leaky_relu"), (16, 3, 2, "identity"), (8, 3, 1, "silu"), (16, 1, 1, "relu")),
}
TOLERANCES = {"1": SMOOTH, "smooth": SMOOTH, "3": LEAKY}
PATTERNS = [
    (name, own)
    for name, rows in CHAINS.items()
    for own in itertools.product((True, False), repeat=len(rows))
    if any(own) and (len(rows) < 4 or sum(own) > 2)
]


@pytest.mark.parametrize(("name", "own"), PATTERNS, ids=str)
def test_chain(name: str, own: tuple[bool, ...], choose: Any) -> None:
    choose(own)
    model = Chain(8, *CHAINS[name]).to(BF16)
    x = image(2, 8, 5, 6)
    residual = image(*model(x).shape, seed=7)
    models = [copy.deepcopy(model), copy.deepcopy(model), in_double(model)]
    with counted() as counter:
        ours = outcome(models[0], models[0].fused, x, residual)
    assert [counter.count(kernel) for kernel in KERNELS] == [sum(own)] * 3
    theirs = outcome(models[1], models[1], x, residual)
    wide = (x.double(), residual.double())
    exact = outcome(models[2], models[2], *wide)
    assert_no_worse(ours, theirs, exact, TOLERANCES.get(name, KINKS))


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "silu"])
@pytest.mark.parametrize("joined", [False, True])
def test_fork(activation: str, joined: bool) -> None:
    """Both results have gradients, which meet before the last batch norm."""
    model = Chain(8, (16, 1, 1, "leaky_relu"), (8, 3, 1, activation)).to(BF16)
    x = image(2, 8, 4, 5)
    inputs = (x, image(2, 8, 4, 5, seed=3) if joined else None)
    models = [copy.deepcopy(model), copy.deepcopy(model), in_double(model)]
    ours = outcome(models[0], models[0].fused, *inputs, fork=True)
    theirs = outcome(models[1], models[1], *inputs, fork=True)
    wide = [None if t is None else t.double() for t in inputs]
    assert_no_worse(ours, theirs, outcome(models[2], models[2], *wide, fork=True))
    one, two = models[0].fused(*(None if t is None else t * 1 for t in inputs), fork=True)
    assert one.data_ptr() == two.data_ptr()


@pytest.mark.parametrize(
    "frozen", [("convs.0",), ("convs.1", "norms.1"), ("norms.0", "convs.0"), ("convs", "norms")]
)
@pytest.mark.parametrize("wants_input", [True, False])
def test_only_wanted_gradients(frozen: tuple[str, ...], wants_input: bool) -> None:
    model = Chain(8, (16, 3, 1, "relu"), (8, 1, 1, "relu"), (16, 1, 1, "relu")).to(BF16)
    whole = copy.deepcopy(model)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    x = image(2, 8, 3, 4)
    expected = outcome(whole, whole.fused, x)
    leaf = x.clone().requires_grad_(wants_input)
    y = model.fused(leaf)
    assert y.requires_grad == (wants_input or any(p.requires_grad for p in model.parameters()))
    if not y.requires_grad:
        return
    y.backward(values(y.shape, 90).to(y))
    found = {"input 0": leaf.grad} | {n: p.grad for n, p in model.named_parameters()}
    for name, gradient in found.items():
        wanted = wants_input if name == "input 0" else model.get_parameter(name).requires_grad
        assert (gradient is not None) == wanted, name
        if gradient is not None:
            devices.assert_same([gradient], [expected[f"gradient of {name}"]])


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("own", [(True, True), (False, True)])
@pytest.mark.parametrize("fork", [False, True])
def test_second_derivatives(
    activation: str, joined: bool, own: tuple[bool, ...], fork: bool, choose: Any
) -> None:
    choose(own)
    model = Chain(8, (16, 1, 1, "leaky_relu"), (8, 3, 1, activation)).to(BF16)
    inputs = (image(2, 8, 3, 4), image(2, 8, 3, 4, seed=3) if joined else None)

    def second(model: nn.Module, run: Any, dtype: torch.dtype) -> dict[str, Tensor | None]:
        state = [b.clone() for b in model.buffers()]
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
        y = run(*(None if t is None else t * 1 for t in leaves), fork=fork)
        results = y if fork else (y,)
        once = [b.clone() for b in model.buffers()]
        given = [t for t in (*leaves, *model.parameters()) if t is not None]
        upstream = [values(r.shape, 5 + i).to(r) for i, r in enumerate(results)]
        first = torch.autograd.grad(results, given, upstream, create_graph=True)
        loss = sum(
            (g.double() * values(g.shape, 20 + i).to(g.device)).sum() for i, g in enumerate(first)
        )
        found = torch.autograd.grad(loss, given, allow_unused=True)
        devices.assert_same(list(model.buffers()), once)  # not taken twice
        assert any(not torch.equal(a, b) for a, b in zip(state, once, strict=True))
        return {str(i): g for i, g in enumerate((*first, *found))}

    models = [copy.deepcopy(model), copy.deepcopy(model), in_double(model)]
    with counted() as counter:
        ours = second(models[0], models[0].fused, BF16)
    assert counter.count("conv_norm_forward") == sum(own)
    assert counter.count("conv_norm_input_grad") == 0
    theirs = second(models[1], models[1], BF16)
    exact = second(models[2], models[2], torch.float64)
    assert_no_worse(ours, theirs, exact, KINKS if activation == "relu" else LEAKY)


@pytest.mark.fake_lacks("has no autocast")
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Weights stay fp32, and so do their gradients, which are rounded once less than torch's."""
    model = Chain(8, (16, 3, 1, "leaky_relu"), (8, 1, 1, "leaky_relu"))
    x = image(2, 8, 4, 5, dtype=torch.float32)
    models = [copy.deepcopy(model), copy.deepcopy(model), in_double(model)]

    def cast(run: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype):
                return run(x)

        return call

    with counted() as counter:
        ours = outcome(models[0], cast(models[0].fused), x)
    assert [counter.count(kernel) for kernel in KERNELS] == [2, 2, 2]
    gradient: Any = ours["gradient of convs.0.weight"]
    assert not torch.equal(gradient.to(dtype).float(), gradient)
    theirs = outcome(models[1], cast(models[1]), x)
    assert_no_worse(ours, theirs, outcome(models[2], models[2], x.double()))


def test_without_gradients() -> None:
    model = Chain(8, (16, 3, 1, "relu"), (8, 1, 1, "relu")).to(BF16)
    again, x = copy.deepcopy(model), image(2, 8, 4, 5)
    with torch.no_grad():
        y = model.fused(x)
    devices.assert_same([y, *model.buffers()], [again.fused(x).detach(), *again.buffers()])


class Bottleneck(nn.Module):
    """As torchvision's."""

    def __init__(self, width: int = 8, channels: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x
        return self.relu(out)


class BasicBlock(nn.Module):
    """As torchvision's."""

    def __init__(self, inputs: int = 16, channels: int = 16, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != channels:
            short = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(short, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def made(*blocks: nn.Module) -> nn.Module:
    model = blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks)
    return model.to(memory_format=torch.channels_last)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of images, and of masks: what autograd keeps beside parameters and vectors, each memory once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 or tensor.dtype is torch.uint8:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    del y
    return sum(kept.values())


def test_bytes_that_a_bottleneck_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each pixel and channel of the narrow part: 2 bytes of 4 channels of the input, 2 narrow images and 4
    channels before the last batch norm, half a byte of mask; and 2 bytes of 2 activations that are written."""
    torch.manual_seed(0)
    width = 8
    model = braze.fuse(made(Bottleneck(width, 4 * width)).to(BF16))
    x = image(2, 4 * width, 6, 6).requires_grad_()
    elements = 2 * 6 * 6 * width
    assert saved_bytes(model, x) == 20.5 * elements
    monkeypatch.setenv("BRAZE_CONV", "cudnn")
    _conv_choice.forget()
    assert saved_bytes(model, x) == 24.5 * elements


# --------------------------------------------------------- modules and fuse


def steps(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Results of three steps of SGD, and how the state changes."""
    before = {n: t.double() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found: dict[str, Tensor | None] = {}
    for i in range(3):
        optimizer.zero_grad()
        y = model(x)
        (y.to(x.dtype) * image(*y.shape, seed=30 + i).to(x.dtype)).mean().backward()
        optimizer.step()
        found[f"result {i}"] = y.detach()
    after = model.state_dict()
    return found | {n: after[n].to(t) - t for n, t in before.items() if t.is_floating_point()}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # and how often each of the kernels, and the pass before a 3x3, runs in a step, whose input has no gradient
    "basic": (lambda: made(BasicBlock(), BasicBlock(), BasicBlock(16, 24, 2)), (5, 4, 5, 2)),
    "bottleneck": (lambda: made(Bottleneck(), Bottleneck()), (6, 5, 6, 2)),
    "module": (
        lambda: made(
            bnn.ConvBNAct2d(16, 24, 3, padding=1, activation="silu"), bnn.ConvBNReLU2d(24, 16, 1)
        ),
        (2, 1, 2, 0),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train(name: str) -> None:
    make, launches = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(BF16)
    channels = next(p for p in model.parameters() if p.dim() == 4).shape[1]
    x = image(4, channels, 6, 5)
    ours, theirs, exact = copy.deepcopy(model), copy.deepcopy(model), in_double(model)
    if name != "module":
        ours = braze.fuse(ours)
    with counted() as counter:
        found = steps(ours, x)
    counts = [counter.count(name) / 3 for name in (*KERNELS, "batch_norm_input_grad")]
    assert tuple(counts) == launches
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRAZE_CONV", "cudnn")
        _conv_choice.forget()
        assert_no_worse(found, steps(theirs, x), steps(exact, x.double()), KINKS)


def _unit(self: Any, i: int, x: Tensor) -> Tensor:
    return self.bns[i](self.convs[i](x))


def _twice(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    a = torch.relu(_unit(self, 0, x))
    return a, torch.relu(_unit(self, 1, a))


def _own_residual(self: Any, x: Tensor) -> Tensor:
    a = torch.relu(_unit(self, 0, x))
    return torch.relu(_unit(self, 1, a) + a)


def _residual_first(self: Any, x: Tensor) -> Tensor:
    return torch.relu(_unit(self, 1, torch.relu(_unit(self, 0, x) + x)))


def _between(self: Any, x: Tensor) -> Tensor:
    a = torch.relu(_unit(self, 0, x))
    b = torch.relu(_unit(self, 2, x))
    return torch.relu(_unit(self, 1, a)) + b


def _stored(self: Any, x: Tensor) -> Tensor:
    y = x.half() * 1
    y += _unit(self, 1, torch.relu(_unit(self, 0, x)))
    return torch.relu(y)


# forward, and the calls for how many convolutions
PATTERNS_OF_BLOCKS: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "in a row": (lambda self, x: torch.relu(_unit(self, 1, torch.relu(_unit(self, 0, x)))), (1, 2)),
    "with the input": (
        lambda self, x: torch.relu(_unit(self, 1, torch.relu(_unit(self, 0, x))) + x),
        (1, 2),
    ),
    "no activation": (lambda self, x: _unit(self, 2, _unit(self, 1, _unit(self, 0, x))), (1, 3)),
    "used twice": (_twice, (2, 2)),
    "its residual, too": (_own_residual, (2, 2)),
    "a sum between": (_residual_first, (2, 2)),
    "another between": (_between, (3, 3)),
    "stored in another dtype": (_stored, (2, 2)),
}


@pytest.mark.parametrize("name", PATTERNS_OF_BLOCKS)
def test_blocks(name: str) -> None:
    forward, (calls, convolutions) = PATTERNS_OF_BLOCKS[name]
    torch.manual_seed(0)
    convs = nn.ModuleList(conv(16, 16) for _ in range(3))
    model = made(block(forward, convs=convs, bns=nn.ModuleList(bn(16) for _ in range(3)))).to(BF16)
    x = image(2, 16, 5, 4)
    ours, theirs, exact = copy.deepcopy(model), copy.deepcopy(model), in_double(model)
    ours = braze.fuse(ours)
    with counted() as counter:
        found = outcome(ours, ours, x)
    assert counter.count("conv_norm_forward") == convolutions
    assert counter.count("batch_norm_apply") == calls
    expected = outcome(theirs, theirs, x)
    assert_no_worse(found, expected, outcome(exact, exact, x.double()), KINKS)


@pytest.mark.cpu_only("is about the graph, which is the same on every device")
def test_blocks_in_a_row_add_no_gradients() -> None:
    """A chain that has the block's input twice is given it as two."""

    def additions(model: nn.Module) -> int:
        x = image(2, 32, 4, 4).requires_grad_()
        loss = model(x * 1).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss.backward()
        return sum(event.name in ("aten::add", "aten::add_") for event in profile.events())

    torch.manual_seed(0)
    plain = nn.Sequential(made(Bottleneck(), Bottleneck(), Bottleneck()).to(BF16))
    fused = braze.fuse(copy.deepcopy(plain))
    assert (additions(plain), additions(fused)) == (3, 1)


def test_report_says_who_computes() -> None:
    torch.manual_seed(0)
    model = braze.fuse(made(Bottleneck()).to(BF16))
    assert braze.fusion_report(model).blocks[0].convolutions == {}
    model(image(2, 32, 4, 4))
    report = braze.fusion_report(model)
    who = "braze, which BRAZE_CONV says"
    assert report.blocks[0].convolutions == dict.fromkeys(("conv1", "conv2", "conv3"), who)
    assert f"    conv   conv2: {who}" in str(report)


@pytest.mark.parametrize("known", [True, False])
def test_report_has_times(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chain(8, (16, 3, 1, "relu")).to(BF16)
    model.fused(image(2, 8, 4, 4))
    conv = model.convs[0]
    problem = _conv_chain._asked[conv]
    choices = {problem: _conv_choice.Choice(0.25, 0.5, "braze")} if known else {}
    monkeypatch.setenv("BRAZE_CONV", "")
    _conv_choice.forget()
    monkeypatch.setattr(_conv_choice, "choices", lambda: choices)
    text = "braze: 0.250 ms with braze's kernels, 0.500 ms with cuDNN"
    assert _conv_chain.verdict(conv) == (text if known else "cudnn, as nothing was timed")


# ------------------------------------------------------------ what is taken


def _changed(**changes: Any) -> Callable[[Chain], None]:
    def change(model: Chain) -> None:
        for name, value in changes.items():
            setattr(model.convs[0], name, value)

    return change


def _conv(*args: Any, **kwargs: Any) -> Callable[[Chain], None]:
    def change(model: Chain) -> None:
        model.convs[0] = nn.Conv2d(*args, **{"bias": False, "dtype": BF16, **kwargs}).to(
            memory_format=torch.channels_last
        )

    return change


def _no_statistics(model: Chain) -> None:
    model.norms[0].eval()


def _hook(model: Chain) -> None:
    model.convs[0].register_forward_hook(lambda *_: None)


# What the first convolution of two is, and how many of them braze computes then.
REFUSED: dict[str, tuple[Callable[[Chain], Any], int]] = {
    "nothing": (lambda model: None, 2),
    "groups": (_conv(16, 16, 3, padding=1, groups=2), 1),
    "dilation": (_conv(16, 16, 3, padding=2, dilation=2), 1),
    "5x5": (_conv(16, 16, 5, padding=2), 1),
    "oblong": (_conv(16, 16, (3, 1), padding=(1, 0)), 1),
    "strides": (_conv(16, 16, 3, padding=1, stride=(1, 2)), 1),
    "stride 3": (_conv(16, 16, 3, padding=1, stride=3), 1),
    "a number": (_changed(stride=1), 0),
    "a new weight": (_changed(weight=nn.Parameter(torch.ones(16, 16, 1, 1, dtype=BF16))), 2),
    "reflect": (_conv(16, 16, 3, padding=1, padding_mode="reflect"), 1),
    "wide padding": (_conv(16, 16, 1, padding=2), 1),
    "same": (_conv(16, 16, 3, padding="same"), 0),
    "bias": (_conv(16, 16, 3, padding=1, bias=True), 0),
    "a hook": (_hook, 0),
    "running statistics": (_no_statistics, 1),
    "another class": (
        lambda model: setattr(model.convs[0], "__class__", type("C", (nn.Conv2d,), {})),
        0,
    ),
    "a parametrization": (
        lambda model: nn.utils.parametrizations.weight_norm(model.convs[0]),
        0,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_braze_computes(name: str) -> None:
    change, own = REFUSED[name]
    model = Chain(16, (16, 3, 1, "leaky_relu"), (8, 1, 1, "leaky_relu")).to(BF16)
    change(model)
    x = image(2, 16, 6, 5)
    models = [copy.deepcopy(model), copy.deepcopy(model), in_double(model)]
    with counted() as counter:
        ours = outcome(models[0], models[0].fused, x)
    assert counter.count("conv_norm_forward") == own
    assert_no_worse(
        ours, outcome(models[1], models[1], x), outcome(models[2], models[2], x.double())
    )


@pytest.mark.parametrize(
    "name",
    ["fp32", "contiguous", "12 channels", "silu", "cudnn", "empty", "wide residual", "one value"],
)
def test_calls_that_are_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what they are where braze computes no convolution."""
    activation = "silu" if name == "silu" else "relu"
    channels = 12 if name == "12 channels" else 16
    model = Chain(16, (channels, 3, 1, activation), (16, 1, 1, "relu")).to(BF16)
    x, residual, own = image(2, 16, 6, 5), None, 0
    if name == "fp32":
        model, x = model.float(), x.float()
    elif name == "contiguous":
        model, x = model.to(memory_format=torch.contiguous_format), x.contiguous()
    elif name == "silu":  # each convolution alone
        own = 2
    elif name == "empty":
        x = x[:0]
    elif name == "wide residual":  # of the last
        residual, own = image(2, 16, 6, 5, dtype=torch.float32), 1
    elif name == "one value":
        x = x[:1, :, :1, :1]
    elif name == "cudnn":
        monkeypatch.setenv("BRAZE_CONV", "cudnn")
        _conv_choice.forget()
    with counted() as counter:
        try:
            result = model.fused(x, residual)
        except ValueError as error:
            assert name in ("one value", "empty") and "more than 1 value" in str(error)
        else:
            assert name != "one value" and result.shape == (len(x), 16, 6, 5)
    assert counter.count("conv_norm_forward") == own
    assert all(part.head is False for part in _conv_chain.parts(model.links(), x, None, False))


def test_residual_in_place() -> None:
    """Of another dtype, which the sum does not take over."""
    model = Chain(16, (16, 3, 1, "leaky_relu"), (16, 1, 1, "relu")).to(BF16)
    x, residual = image(2, 16, 4, 5), image(2, 16, 4, 5, seed=3, dtype=torch.float32)
    with counted() as counter:
        found = conv_chain(x, model.links(), residual, True)
        expected = conv_chain(x, model.links(), residual.to(BF16))
    assert counter.count("batch_norm_apply") == 2
    devices.assert_same([found], [expected])


@pytest.mark.cpu_only("is about CPU tensors, which are no device's")
@pytest.mark.parametrize("mode", ["", "auto", "cudnn"])
def test_cpu_has_no_choice(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a look at the file, whatever it is: who has no GPU has no use for a warning about it."""
    monkeypatch.setenv("BRAZE_CONV", mode)
    _conv_choice.forget()
    monkeypatch.setattr(_conv_choice, "_Known", None)
    model = Chain(8, (16, 3, 1, "relu"), (8, 1, 1, "relu")).to(BF16)
    with counted() as counter:
        model.fused(image(2, 8, 4, 4))
    assert counter.calls == []


def test_dtypes_that_do_not_fit_are_torchs_error() -> None:
    model = Chain(8, (16, 3, 1, "relu"))
    with pytest.raises(RuntimeError, match=r"type|dtype"):
        model.fused(image(2, 8, 4, 4))


def test_modes_that_watch_see_torchs_operators() -> None:
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.add(func)
            return func(*args, **(kwargs or {}))

    seen: set[Any] = set()
    model = Chain(8, (16, 3, 1, "relu")).to(BF16)
    with counted() as counter, Mode():
        model.fused(image(2, 8, 4, 4))
    assert counter.calls == [] and torch.ops.aten.convolution.default in seen


@pytest.mark.parametrize("normalised", [False, True])
def test_timing_runs_both_ways(normalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes no random number of the program's."""
    called = []

    def milliseconds(action: Callable[[], None]) -> float:
        action()
        called.append(action)
        return float(len(called))

    monkeypatch.setattr(_conv_chain, "milliseconds", milliseconds)
    place = image(1, 8, 1, 1).device
    problem = _conv_choice.Problem("cpu", BF16, 2, 5, 4, 8, 16, 3, 2, 1, normalised)
    state = torch.get_rng_state()
    assert _conv_chain._measure(problem, place) == (1.0, 2.0)
    assert torch.equal(torch.get_rng_state(), state)
