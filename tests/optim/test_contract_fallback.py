"""The drop-in contract where torch's own code takes over, and with what else works on parameters."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from typing import Any

import braze.optim as optim
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map

NAMES = ("SGD", "Adam", "AdamW")
EACH = pytest.mark.parametrize("name", NAMES)
MOMENTUM: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {}}


@pytest.fixture
def torch_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functional forms of torch that were called, with the implementation they chose."""
    calls: list[str] = []
    for module_name in ("sgd", "adam"):
        module = importlib.import_module(f"torch.optim.{module_name}")
        for kind in ("single_tensor", "multi_tensor", "fused"):
            function = f"_{kind}_{module_name}" if kind != "fused" else f"_fused_{module_name}"
            original = getattr(module, function)

            def spy(*args: Any, _f: Any = original, _kind: str = kind, **kwargs: Any) -> Any:
                calls.append(_kind)
                return _f(*args, **kwargs)

            monkeypatch.setattr(module, function, spy)
    return calls


def pair(name: str, make: Callable[[], Tensor], **kwargs: Any) -> list[Any]:
    result = []
    for module in (optim, torch.optim):
        p = nn.Parameter(make())
        result.append((p, getattr(module, name)([p], lr=0.1, **kwargs)))
    return result


def assert_close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------ torch's code


@EACH
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []),
        ({"fused": True}, []),
        ({"foreach": False}, []),
        ({"foreach": True}, ["multi_tensor"]),
        ({"fused": False}, ["single_tensor"]),
        ({"foreach": True, "fused": False}, ["multi_tensor"]),
        # torch's SGD prefers its foreach code on a GPU, although it is not differentiable.
        ({"differentiable": True, "foreach": False}, ["single_tensor"]),
    ],
    ids=str,
)
def test_which_flags_run_torchs_code(
    name: str, flags: dict[str, bool], expected: list[str], torch_steps: list[str]
) -> None:
    p = nn.Parameter(torch.ones(20, dtype=torch.float64))
    p.requires_grad_(not flags.get("differentiable"))
    p.grad = torch.full_like(p, 2.0)
    optimizer = getattr(optim, name)([p], lr=0.1, **flags)
    optimizer.step()
    assert torch_steps == expected
    decay = {"SGD": 0.0, "Adam": 0.0, "AdamW": 0.1 * 1e-2}[name]
    expected_value = 1 - 0.1 * (2.0 if name == "SGD" else 2.0 / (2.0 + 1e-8)) - decay
    # torch's differentiable Adam corrects the bias in fp32
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected_value), rtol=0, atol=1e-6)
    assert optimizer.updated


@EACH
@pytest.mark.parametrize("flags", [{}, {"foreach": True}])
def test_updated_is_false_without_any_gradient(name: str, flags: dict[str, bool]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([p], **flags)
    optimizer.step()
    assert optimizer.updated is False
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.updated is True


@EACH
def test_differentiable_step_has_a_gradient(name: str) -> None:
    grads = []
    for module in (optim, torch.optim):
        start = torch.ones(3, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        p.grad = torch.full((3,), 2.0, dtype=torch.float64)
        p.retain_grad()
        optimizer = getattr(module, name)([p.detach()], lr=0.1, differentiable=True, foreach=False)
        optimizer.param_groups[0]["params"][0] = p
        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        p.pow(2).sum().backward(inputs=[start, rate])
        grads.append((start.grad, rate.grad))
    assert grads[0][1] is not None
    assert grads[0][1].item() != 0
    assert_close(grads[0], grads[1])


def test_sparse_gradients_run_torchs_sgd(torch_steps: list[str]) -> None:
    results = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 3, sparse=True).double()
        dense = nn.Linear(3, 2).double()
        parameters = [*embedding.parameters(), *dense.parameters()]
        optimizer = module.SGD(parameters, lr=0.1, foreach=None if module is optim else False)
        for _ in range(3):
            optimizer.zero_grad()
            dense(embedding(torch.tensor([1, 4, 4]))).pow(2).sum().backward()
            optimizer.step()
        results.append([p.detach() for p in parameters])
    assert len(torch_steps) == 6
    assert_close(results[0], results[1])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_refuses_sparse_gradients_as_torch_does(name: str) -> None:
    messages = []
    for module in (optim, torch.optim):
        p = nn.Parameter(torch.ones(4, 2))
        p.grad = torch.ones(4, 2).to_sparse()
        with pytest.raises(RuntimeError, match="does not support sparse gradients") as error:
            getattr(module, name)([p]).step()
        assert torch.equal(p.detach(), torch.ones(4, 2))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


class Marked(Tensor):
    """A tensor subclass with __torch_dispatch__ around a plain tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Marked:
        result = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=requires_grad
        )
        result.inner = inner
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Marked) else x

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if func._schema.name.endswith("_") and isinstance(args[0], Marked):
            return args[0]
        return tree_map(lambda x: Marked(x) if isinstance(x, Tensor) else x, out)


@EACH
def test_tensor_subclasses_run_torchs_code(name: str, torch_steps: list[str]) -> None:
    start = torch.linspace(-1, 1, 20, dtype=torch.float64)
    plain = nn.Parameter(start.clone())
    wrapped = Marked(start.clone(), requires_grad=True)
    theirs = getattr(torch.optim, name)([plain], lr=0.1, foreach=False, **MOMENTUM[name])
    mine = getattr(optim, name)([wrapped], lr=0.1, **MOMENTUM[name])
    for step in range(3):
        plain.grad = start + step
        wrapped.grad = Marked(start + step)
        theirs.step()
        torch_steps.clear()
        mine.step()
        assert torch_steps == ["single_tensor"]
    assert_close(wrapped.inner, plain.detach())


@EACH
def test_python_only_subclasses_stay_native(name: str, torch_steps: list[str]) -> None:
    class Named(nn.Parameter):
        pass

    p = Named(torch.ones(5))
    p.grad = torch.ones(5)
    getattr(optim, name)([p], lr=0.1).step()
    assert torch_steps == []
    assert (p < 1.0).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@EACH
def test_compiled_step_equals_torchs_step(name: str, backend: str, torch_steps: list[str]) -> None:
    """torch's is not compiled here: that corrects Adam's bias in fp32."""
    results = []
    for module in (optim, torch.optim):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        optimizer = getattr(module, name)(model.parameters(), lr=0.1, **MOMENTUM[name])
        compiled = torch.compile(optimizer.step, backend=backend)
        step = compiled if module is optim else optimizer.step
        for seed in range(4):
            x = torch.randn(
                5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step() if seed == 2 else step()  # eager in between
        results.append(dict(model.state_dict()))
        assert (torch_steps == []) is (module is optim)
    assert_close(results[0], results[1])


@EACH
def test_conjugated_and_negated_gradients(name: str, torch_steps: list[str]) -> None:
    start = torch.linspace(-1, 1, 20, dtype=torch.float64).view(torch.complex128)
    gradient = torch.linspace(2, -3, 20, dtype=torch.float64).view(torch.complex128)
    (p, mine), (q, theirs) = pair(name, start.clone, **MOMENTUM[name])
    views = [gradient.conj(), torch._neg_view(gradient), torch._neg_view(gradient).conj()]
    assert views[0].is_conj()
    assert views[1].is_neg()
    for view in views:
        p.grad = view
        q.grad = view.resolve_conj().resolve_neg().clone()
        mine.step()
        assert torch_steps == []
        theirs.step()
        torch_steps.clear()
        assert_close(p.detach(), q.detach())


# ------------------------------------------------------------------ around the optimizer


@EACH
def test_swapped_parameters(name: str) -> None:
    start = torch.linspace(-1, 1, 20, dtype=torch.float64)
    (p, mine), (q, theirs) = pair(name, start.clone, **MOMENTUM[name])
    for step in range(4):
        if step == 2:  # another TensorImpl, dtype and shape order behind the same Python object
            for each in (p, q):
                each.grad = None
                torch.utils.swap_tensors(each, nn.Parameter(each.detach() * 2))
        p.grad, q.grad = start + step, start + step
        mine.step()
        theirs.step()
    assert_close(p.detach(), q.detach())


@EACH
@pytest.mark.parametrize("foreach", [None, False])
def test_clipping_and_functional_calls_around_the_step(name: str, foreach: bool | None) -> None:
    results = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3)).double()
        optimizer = getattr(module, name)(model.parameters(), lr=0.1, foreach=foreach)
        for seed in range(4):
            x = torch.randn(
                5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            other = {k: v.detach() * 2 for k, v in model.named_parameters()}
            torch.func.functional_call(model, other, (x,))
            optimizer.zero_grad(set_to_none=seed % 2 == 0)
            torch.func.functional_call(model, dict(model.named_parameters()), (x,)).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            nn.utils.clip_grad_value_(model.parameters(), 0.3)
            optimizer.step()
        results.append(dict(model.state_dict()))
    assert_close(results[0], results[1])


@EACH
def test_averaged_models(name: str) -> None:
    results = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        swa, ema = (
            AveragedModel(model),
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        )
        optimizer = getattr(module, name)(model.parameters(), lr=0.1)
        for seed in range(4):
            x = torch.randn(
                5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
            swa.update_parameters(model)
            ema.update_parameters(model)
        results.append([dict(m.state_dict()) for m in (model, swa, ema)])
    assert_close(results[0], results[1])


@EACH
def test_inference_tensors_are_refused_before_anything_is_written(name: str) -> None:
    with torch.inference_mode():
        frozen, grad = torch.ones(3), torch.ones(3)
    first = nn.Parameter(torch.ones(3))
    first.grad = torch.ones(3)
    frozen.grad = grad
    optimizer = getattr(optim, name)([frozen, first], lr=0.1)
    with pytest.raises(RuntimeError, match=re.escape("Inplace update to inference tensor")):
        optimizer.step()
    assert torch.equal(first.detach(), torch.ones(3))
    assert torch.equal(frozen, torch.ones(3))
    with torch.inference_mode():
        optimizer.step()
    assert (frozen < 1).all()


@EACH
def test_copies_of_model_and_optimizer_train_apart(name: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    kept = twin.weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(twin.weight, kept)
    twin(torch.ones(2, 4)).sum().backward()
    twin_optimizer.step()
    assert torch.equal(twin.weight, model.weight)
