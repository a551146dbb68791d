"""braze's batch norm under functorch, forward AD, gradients of gradients, autocast, compilers and traces."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import braze.nn as bnn
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from nn_cases import assert_near, make_input, pair
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode


class Block(nn.Module):
    """Every kind of call that a model makes."""

    def __init__(self, module: Any = bnn) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = module is bnn
        self.conv = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        if self.fused:
            self.bn1 = bnn.BatchNormAct2d(5, activation="silu")
            self.bn2 = bnn.BatchNormAct2d(5)
        else:
            self.bn1, self.bn2 = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.bn3 = module.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            y = self.bn2(self.conv(self.bn1(x)), x)
        else:
            y = torch.relu(self.bn2(self.conv(F.silu(self.bn1(x)))) + x)
        result: Tensor = self.bn3(y)
        return result


def results(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    y = call(x)
    y.sin().sum().backward()  # a sum of squares would be the same whatever the input
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_results(found: list[Tensor], wanted: list[Tensor], factor: float = 10) -> None:
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert_near(a, b.double(), f"result {i}", factor)


# ------------------------------------------------------------------------ functorch


@pytest.mark.parametrize("training", [True, False])
def test_gradients_by_functorch(training: bool) -> None:
    gradients = []
    for model in (Block(nn), Block()):
        model.train(training)
        for bn in (model.bn1, model.bn2, model.bn3):
            bn.track_running_stats = False
        params = dict(model.named_parameters())
        x = make_input("NCHW").detach()

        def loss(p: dict[str, Tensor], model: nn.Module = model, x: Tensor = x) -> Tensor:
            return functional_call(model, p, (x,)).square().sum()

        gradients.append(grad(loss)(params))
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_vmap_over_an_ensemble() -> None:
    models = [Block().eval() for _ in range(3)]
    params, buffers = stack_module_state(models)
    x = make_input("NCHW").detach()
    base = copy.deepcopy(models[0]).to("meta")

    def call(p: Any, b: Any) -> Tensor:
        return functional_call(base, (p, b), (x,))

    y = vmap(call)(params, buffers)
    assert_near(y[2], models[2](x).double(), "output", 4)


def test_vmap_over_samples() -> None:
    module = bnn.BatchNormAct2d(5).eval()
    x = torch.randn(4, 2, 5, 3, 3)
    expected = torch.stack([module(t) for t in x])
    assert_near(vmap(module)(x), expected.double(), "output", 4)


def test_forward_mode() -> None:
    theirs, ours = pair(2)
    for module in (theirs, ours):
        module.double().train()
        module.track_running_stats = False
    x, t = make_input("NCHW", 0, torch.float64), make_input("NCHW", 1, torch.float64)
    for call in (
        lambda module: jvp(module, (x.detach(),), (t.detach(),))[1],
        lambda module: dual(module, x.detach(), t.detach()),
    ):
        torch.testing.assert_close(call(ours), call(theirs))


def dual(module: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(module(forward_ad.make_dual(x, t)))
        assert y.tangent is not None
        return y.tangent


# ------------------------------------------------------------ gradients of gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu", "hardswish"])
@pytest.mark.parametrize("joined", [False, True])
def test_gradgradcheck(joined: bool, activation: str, training: bool) -> None:
    module = bnn.BatchNormAct2d(3, activation=activation, dtype=torch.float64)
    module.train(training)
    module.momentum = 0.0  # the same function at every call
    torch.manual_seed(0)
    x, r = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, r) if joined else (x,)
    assert torch.autograd.gradcheck(module, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(module, inputs, fast_mode=True)

    def penalty(m: nn.Module) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradients[0].square().sum(), [*m.parameters()])

    plain = nn.BatchNorm2d(3, dtype=torch.float64).train(training)
    if activation == "identity":
        torch.testing.assert_close(penalty(module), penalty(plain))


# ----------------------------------------------------------------- compilers, traces


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_a_break(backend: str, training: bool) -> None:
    torch._dynamo.reset()
    model, twin = Block().train(training), Block(nn).train(training)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        found = results(model, compiled, make_input("NHWC"))
        wanted = results(twin, twin, make_input("NHWC"))
        assert_results(found, wanted)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_compiled_graph_has_the_kernels() -> None:
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(Block(), backend=backend, fullgraph=True)(make_input("NCHW"))
    (graph,) = graphs
    assert graph.code.count("braze.batch_norm_act") == 3
    assert "torch.nn.functional.batch_norm" not in graph.code


def test_compile_in_functions() -> None:
    torch._dynamo.reset()
    module = bnn.BatchNormAct2d(5, momentum=None)

    def fork(x: Tensor) -> Tensor:
        a, b = bnn.functional.batch_norm_act(x, None, None, training=True, fork=True)
        return a * 2 + b.sin()

    def join(x: Tensor) -> Tensor:
        state = (module.running_mean, module.running_var, module.weight, module.bias)
        return bnn.functional.batch_norm_add_act(x, *state, x * 2, *state, True)

    def both(x: Tensor) -> Tensor:
        return module(fork(x) + join(x))

    before = copy.deepcopy(module.state_dict())
    wanted = results(module, both, make_input("NCHW"))
    module.zero_grad()
    after = copy.deepcopy(module.state_dict())
    module.load_state_dict(before)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert_results(results(module, compiled, make_input("NCHW")), wanted)
    torch.testing.assert_close(module.state_dict(), after, rtol=1e-5, atol=1e-6)


def test_compile_conv_with_absorbed_bias() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = bnn.ConvBNAct2d(5, 4, 3, bias=True)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = results(model, compiled, make_input("NCHW"))
    wanted = results(twin, twin, make_input("NCHW"))
    assert_results(found, wanted)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    model = bnn.BatchNormAct2d(5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (2, 3, 7):
        x = torch.randn(n, 5, 3, 3 + n)
        expected = torch.relu(F.batch_norm(x, None, None, training=True))
        assert_near(compiled(x), expected.double(), "output")


def test_export_needs_no_braze() -> None:
    model = Block().eval()
    x = make_input("NCHW").detach()
    program = torch.export.export(model, (x,))
    assert "braze" not in program.graph_module.code
    assert_near(program.module()(x), model(x).double(), "output", 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace_needs_no_braze() -> None:
    model = Block().eval()
    x = make_input("NCHW").detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    assert b"braze::" not in file.getvalue() and "braze::" not in str(traced.inlined_graph)
    assert_near(traced(x), model(x).double(), "output", 4)


def test_symbolic_trace_takes_them_for_leaves() -> None:
    model = Block().eval()
    traced = fx.symbolic_trace(model)
    called = {n.target for n in traced.graph.nodes if n.op == "call_module"}
    assert called == {"conv", "bn1", "bn2", "bn3"}
    x = make_input("NCHW").detach()
    assert torch.equal(traced(x), model(x))
    conv = fx.symbolic_trace(bnn.ConvBNAct2d(5, 4, 3, bias=True).eval())
    assert {n.target for n in conv.graph.nodes if n.op == "call_module"} == {"conv", "bn"}


@pytest.mark.fake_lacks("has no cuDNN, whose convolutions keep channels last")
def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        model = Block()
        for layout in ("NCHW", "NHWC"):
            x = mode.from_tensor(make_input(layout))
            y = model(x)
            assert y.shape == x.shape and y.stride() == x.stride()
            y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_dispatch_modes() -> None:
    counter = FlopCounterMode(display=False)
    with counter:
        Block()(make_input("NCHW"))
    assert counter.get_total_flops() > 0


def test_default_device_context() -> None:
    with torch.device("cpu"):
        model = Block()
        y = model(make_input("NCHW"))
    assert y.shape == (3, 5, 4, 6)


class Tagged(Tensor):
    """A subclass that only wants to be asked."""


def test_tensor_subclass() -> None:
    model = bnn.BatchNormAct2d(5)
    x = make_input("NCHW").detach()
    y = model(x.as_subclass(Tagged))
    assert type(y) is Tagged
    assert_near(y.as_subclass(Tensor), bnn.BatchNormAct2d(5)(x).double(), "output", 4)


@pytest.mark.cpu_only("autocast on the CPU")
def test_autocast() -> None:
    ours, theirs = Block(), Block(nn)
    for dtype in (torch.float32, torch.bfloat16):
        outputs = []
        for model in (ours, theirs):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(model(make_input("NCHW", 0, dtype)))
        assert outputs[0].dtype == outputs[1].dtype
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0.05, atol=0.05)
