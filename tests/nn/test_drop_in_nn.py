"""Where programs could tell braze's modules from torch's: traces, transforms, classes, layouts, scripts."""

from __future__ import annotations

import abc
import io
from collections.abc import Callable
from typing import Any

import braze.nn as bnn
import braze.nn.functional as bF
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from functorch.compile import aot_function, nop
from reference import same_bits
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
NORMS = tuple(f"{lazy}BatchNorm{d}d" for lazy in ("", "Lazy") for d in (1, 2, 3))
SHAPES = {"Dropout1d": (2, 3, 8), "Dropout3d": (2, 3, 4, 4, 4)}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: bF.dropout(x, 0.5),
    "dropout2d": lambda x: bF.dropout2d(x, 0.5),
    "alpha_dropout": lambda x: bF.alpha_dropout(x, 0.5, True),
    "feature_alpha_dropout": lambda x: bF.feature_alpha_dropout(x, 0.5, True),
    "dropout_add": lambda x: bF.dropout_add(x, x * 2, 0.5),
    "act_dropout": lambda x: bF.act_dropout(x, "silu", 0.5),
}


def image(name: str = "", **kwargs: Any) -> Tensor:
    return torch.randn(SHAPES.get(name, (2, 3, 4, 6)), **kwargs)


# ------------------------------------------------------------------------ symbolic traces


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*DROPOUTS, "ActDropout", "DropoutAdd"])
def test_symbolic_traces_read_the_mode_when_they_run(name: str, training: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = getattr(bnn, name)(p=0.5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.drop(x, x) if name == "DropoutAdd" else self.drop(x)
            return result

    x = image(name)
    traced = torch.fx.symbolic_trace(Model().train(training))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["drop"]
    kept = {"ActDropout": x.relu(), "DropoutAdd": x + x}.get(name, x)
    assert torch.equal(traced.eval()(x), kept)
    assert not torch.equal(traced.train()(x), kept)


# ------------------------------------------------------------------- the same seed, the same mask


def traced(function: Callable[[Tensor], Tensor], x: Tensor, mode: str) -> Tensor:
    graph = make_fx(function, tracing_mode=mode)(x)
    torch.manual_seed(1)  # a trace in real mode draws for itself
    result: Tensor = graph(x)
    return result


def by_aot(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result: Tensor = aot_function(function, nop)(x)
    return result


def dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        primal: Tensor = forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).primal
        return primal.clone()


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "make_fx_real": lambda f, x: traced(f, x, "real"),
    "make_fx_fake": lambda f, x: traced(f, x, "fake"),
    "make_fx_symbolic": lambda f, x: traced(f, x, "symbolic"),
    "aot": by_aot,
    "compile": lambda f, x: torch.compile(f, backend="aot_eager")(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "dual": dual,
    "negative_view": lambda f, x: f(torch._neg_view(-x)),
    "requires_grad": lambda f, x: f(x.clone().requires_grad_()),
    "default_device": lambda f, x: in_device_context(f, x),
}


def in_device_context(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with x.device:
        return function(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_seed_gives_one_mask_whoever_runs_it(name: str, way: str) -> None:
    function = FUNCTIONS[name]
    torch._dynamo.reset()
    x = image().to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    expected = function(x)
    torch.manual_seed(1)
    found = WAYS[way](function, x)
    # Where torch's operations stand for the kernel's, alpha's sum and silu round apart.
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found == 0, expected == 0)
    torch.manual_seed(2)
    assert not torch.equal(function(x), expected)  # the seed does matter


@pytest.mark.parametrize("way", ["aot", "vjp"])
def test_gradients_have_the_forwards_mask(way: str) -> None:
    x = image()
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    bF.dropout(leaf, 0.5).sum().backward()
    torch.manual_seed(1)
    if way == "vjp":
        y, pull = torch.func.vjp(FUNCTIONS["dropout"], x)
        (grad,) = pull(torch.ones_like(y))
    else:
        again = x.clone().requires_grad_()
        by_aot(FUNCTIONS["dropout"], again).sum().backward()
        grad = again.grad
    assert leaf.grad is not None and torch.equal(grad, leaf.grad)


# ------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_over_reverse(name: str, before: bool) -> None:
    """Of a dropout whose input has no tangent; also where the forward pass ran before the level began."""
    function = FUNCTIONS[name]
    x = image(dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    scale, tangent = image(dtype=torch.float64), image(dtype=torch.float64)

    def gradient(by: Tensor, y: Tensor | None = None) -> Tensor:
        torch.manual_seed(1)
        y = function(x) if y is None else y
        return torch.autograd.grad(y, x, by)[0]

    y = function(x) if not before else None
    torch.manual_seed(1)
    early = function(x) if before else None
    del y
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(gradient(forward_ad.make_dual(scale, tangent), early))
        assert result.tangent is not None
        found = result.tangent.clone()
    torch.testing.assert_close(found, gradient(tangent))  # it is linear
    assert found.abs().sum() > 1


def test_jvp_of_a_number_keeps_its_dtype() -> None:
    x = torch.tensor(2.0)
    for function in (FUNCTIONS["dropout"], FUNCTIONS["alpha_dropout"]):
        y, tangent = torch.func.jvp(function, (x,), (x,))
        assert y.dtype == tangent.dtype == torch.float32


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_vmap_of_an_input_without_a_batch(randomness: str) -> None:
    x, w = torch.ones(64), torch.ones(3)

    def mapped() -> Tensor:
        f = torch.vmap(lambda w: bF.dropout(x, 0.5) * w, randomness=randomness)
        result: Tensor = f(w)
        return result

    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            mapped()
        return
    y = mapped()
    assert y.shape == (3, 64) and set(y.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(y[0], y[1]) is (randomness == "same")


# ----------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", ["dropout2d", "feature_alpha_dropout"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last)[..., ::2],
        lambda x: x[:, ::2],
        lambda x: x.permute(3, 2, 1, 0),
        lambda x: x.permute(1, 0, 3, 2)[1:],
        lambda x: x[:, :, :1].expand(2, 3, 4, 6),
    ],
)
def test_results_have_torchs_strides(name: str, view: Callable[[Tensor], Tensor]) -> None:
    x = view(image()).requires_grad_()
    assert not x.is_contiguous()
    torch.manual_seed(1)
    y = getattr(bF, name)(x, 0.5, True)
    assert y.stride() == getattr(F, name)(x, 0.5, True).stride()
    with torch._subclasses.FakeTensorMode() as mode:
        assert getattr(bF, name)(mode.from_tensor(x), 0.5, True).stride() == y.stride()
    torch.manual_seed(1)
    assert torch.equal(getattr(bF, name)(x.contiguous(), 0.5, True), y)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(1)
    other = x.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(getattr(bF, name)(other, 0.5, True).sum(), other)
    assert torch.equal(grad, expected) and (grad == 0).any() and (grad != 0).any()


@pytest.mark.cpu_only("nested tensors are made on the CPU")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs() -> None:
    parts = [torch.ones(5), torch.ones(7)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        dropped = bnn.Dropout(0.5)(nested).unbind()
        assert [t.shape for t in dropped] == [t.shape for t in parts]
        assert {v for t in dropped for v in t.tolist()} <= {0.0, 2.0}


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "alpha_dropout", "feature_alpha_dropout"])
@pytest.mark.parametrize(
    "bad", [([1.0], True), (None, True), (torch.ones(2, 3), torch.tensor(True))]
)
@pytest.mark.filterwarnings("ignore:dropout2d")
def test_errors_have_torchs_types(name: str, bad: tuple[Any, Any]) -> None:
    found = []
    for module in (bF, F):
        with pytest.raises((TypeError, AttributeError)) as caught:
            getattr(module, name)(bad[0], 0.5, bad[1])
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


# ----------------------------------------------------------------------------- classes


@pytest.mark.parametrize("name", [*DROPOUTS, *NORMS, "SyncBatchNorm"])
def test_isinstance_holds_for_torchs_modules(name: str) -> None:
    """Programs that changed the import freeze and initialise layers of ready-made models by class."""
    ours, theirs = getattr(bnn, name), getattr(nn, name)
    make = (lambda cls: cls()) if name in DROPOUTS or "Lazy" in name else (lambda cls: cls(3))
    for module in (make(ours), make(theirs)):
        assert isinstance(module, ours) and isinstance(module, theirs)
    assert issubclass(theirs, ours) and issubclass(ours, theirs)
    assert not isinstance(nn.Linear(1, 1), ours) and not isinstance(nn.InstanceNorm2d(3), ours)

    class Mine(ours, abc.ABC):  # type: ignore[misc,valid-type]
        pass

    assert isinstance(make(Mine), Mine) and isinstance(make(Mine), ours)
    assert not isinstance(make(theirs), Mine) and not isinstance(make(ours), Mine)


def test_isinstance_of_one_kind_is_not_that_of_another() -> None:
    assert not isinstance(nn.BatchNorm1d(3), bnn.BatchNorm2d)
    assert not isinstance(nn.BatchNorm2d(3), bnn.BatchNormAct2d)
    assert isinstance(bnn.BatchNormAct2d(3), bnn.BatchNorm2d)
    assert not isinstance(nn.Dropout(), bnn.Dropout2d)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_lazy_norms_become_ours(dims: int) -> None:
    module = getattr(bnn, f"LazyBatchNorm{dims}d")()
    x = torch.randn((4, 3, 2, 2, 2)[: dims + 2])
    module(x)
    assert type(module) is getattr(bnn, f"BatchNorm{dims}d")
    assert same_bits(module(x), getattr(bnn, f"BatchNorm{dims}d")(3)(x))


def test_statistics_that_require_a_gradient_raise() -> None:
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    for bad in (mean, var):
        for training in (True, False):
            bad.requires_grad_()
            with pytest.raises(RuntimeError, match="not differentiable with respect to argument"):
                bF.batch_norm(x, mean, var, training=training)
            bad.requires_grad_(False)
    bF.batch_norm(x, mean, var)


# ------------------------------------------------------------------------- torch.jit


@pytest.mark.parametrize("name", [*DROPOUTS, "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_are_torchs(name: str) -> None:
    shape = {"BatchNorm1d": (4, 3), "BatchNorm3d": (2, 3, 4, 4, 4)}.get(name)
    x = image(name) if shape is None else torch.randn(shape)
    outcomes = []
    for module in (bnn, nn):
        argument = 3 if "Norm" in name else 0.5
        scripted = torch.jit.script(nn.Sequential(getattr(module, name)(argument)))
        assert "braze::" not in str(scripted.graph)
        torch.manual_seed(1)
        outcomes.append((scripted(x), scripted.eval()(x)))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_in_training_need_no_braze() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), bnn.BatchNorm2d(3), bnn.Dropout(0.5), bnn.Dropout2d(0.5),
        bnn.ActDropout("silu", 0.5), bnn.AlphaDropout(0.5),
    )  # fmt: skip
    traced = torch.jit.trace(model, image(), check_trace=False)
    assert "braze::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    assert b"braze::" not in file.getvalue()
    x = image()
    assert not torch.equal(traced(x), traced(x))


def test_a_plain_call_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the tests above do not compare torch's operations with themselves."""
    from braze.nn import _dropout_route

    monkeypatch.setattr(_dropout_route, "_composite", lambda *_: pytest.fail("not the kernel"))
    for function in FUNCTIONS.values():
        function(image())
    with pytest.raises(pytest.fail.Exception, match="not the kernel"):
        WAYS["vjp"](FUNCTIONS["dropout"], image())
