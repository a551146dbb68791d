"""braze's BatchNorm modules against torch's: values, gradients, running statistics, layouts and errors."""

from __future__ import annotations

import copy
from typing import Any

import braze.nn as bnn
import pytest
import torch
import torch.nn.functional as F
from nn_cases import (
    CONFIGS,
    DTYPES,
    INPUTS,
    assert_near,
    assert_same_state,
    gradients,
    in_double,
    make_input,
    pair,
)
from torch import Tensor, nn

MODES = ("train", "eval")


def check(ours: nn.Module, truth: nn.Module, layout: str, dtype: torch.dtype, seed: int) -> None:
    """One forward and backward; ``truth`` is torch's module in double."""
    x = make_input(layout, seed, dtype)
    wide = x.detach().double().requires_grad_()
    y, expected = ours(x), truth(wide)
    assert y.dtype == x.dtype
    assert_near(y, expected, "output")
    wanted = gradients(truth, wide, expected)
    found = gradients(ours, x, y)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        own = x.dtype if name == "input" else ours.get_parameter(name).dtype
        assert gradient.dtype == own
        assert_near(gradient, wanted[name], f"gradient of {name}", 4)
    assert_same_state(ours, truth)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations(config: dict[str, Any], layout: str, mode: str) -> None:
    theirs, ours = pair(INPUTS[layout][0], **config)
    truth = in_double(theirs)
    for module in (truth, ours):
        module.train(mode == "train")
    for step in range(3):
        check(ours, truth, layout, torch.float32, step)
    for module in (truth, ours):
        module.train(mode != "train")
    check(ours, truth, layout, torch.float32, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "params"), DTYPES, ids=str)
@pytest.mark.parametrize("layout", INPUTS)
def test_layouts_and_dtypes(
    layout: str, dtype: torch.dtype, params: torch.dtype, mode: str
) -> None:
    theirs, ours = pair(INPUTS[layout][0], params=params)
    truth = in_double(theirs)
    for module in (truth, ours):
        module.train(mode == "train")
    check(ours, truth, layout, dtype, 0)


@pytest.mark.parametrize("layout", ["NC", "NCL", "NCHW", "NHWC", "NCDHW", "NDHWC"])
def test_memory_format_is_kept(layout: str) -> None:
    theirs, ours = pair(INPUTS[layout][0])
    x = make_input(layout)
    y = ours(x)
    assert y.stride() == theirs(x).stride() == x.stride()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.stride() == x.stride()


def test_tracking_switched_off_later() -> None:
    theirs, ours = pair(2)
    for module in (theirs, ours):
        module.track_running_stats = False
        module(make_input("NCHW"))
        assert int(module.num_batches_tracked) == 0
    assert_same_state(ours, in_double(theirs))


def test_buffers_removed_later() -> None:
    theirs, ours = pair(2)
    for module in (theirs, ours):
        module.running_mean = module.running_var = None
        y = module(make_input("NCHW"))
        assert int(module.num_batches_tracked) == 1
        module.eval()
        torch.testing.assert_close(module(make_input("NCHW")), y)


def test_counter_removed_later() -> None:
    for momentum in (0.3, None):
        theirs, ours = pair(2, momentum=momentum)
        for module in (theirs, ours):
            module.num_batches_tracked = None
            module(make_input("NCHW"))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_frozen_in_a_training_model() -> None:
    """bn.eval() inside model.train(): running statistics are used and stay, the input gets its gradient."""
    models = []
    for bn in pair(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 5, 3), bn, nn.ReLU()).double().train()
        bn.eval().requires_grad_(False)
        before = copy.deepcopy(bn.state_dict())
        x = torch.ones(2, 2, 5, 5, dtype=torch.float64).cumsum(-1).requires_grad_()
        model(x).square().sum().backward()
        torch.testing.assert_close(bn.state_dict(), before, rtol=0, atol=0)
        assert all(p.grad is None for p in bn.parameters())
        models.append((x.grad, model[0].weight.grad))
    torch.testing.assert_close(models[1], models[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", [[], ["weight"], ["bias"], ["input"], ["input", "bias"]])
def test_some_gradients_only(trained: list[str]) -> None:
    results = []
    for module in pair(2):
        x = make_input("NHWC").detach().requires_grad_("input" in trained)
        for name, p in module.named_parameters():
            p.requires_grad_(name in trained)
        y = module(x)
        assert y.requires_grad == bool(trained)
        if trained:
            y.sin().sum().backward()
        results.append([x.grad, module.weight.grad, module.bias.grad])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(mode: str) -> None:
    theirs, ours = pair(2)
    for module in (theirs, ours):
        module.train(mode == "train")
        x = torch.empty(0, 5, 4, 4, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        for p in module.parameters():
            assert p.grad is not None and not p.grad.any()
    assert_same_state(ours, in_double(theirs))


# ------------------------------------------------------------------------- errors


def outcome(module: nn.Module, *inputs: Tensor) -> tuple[type, str]:
    try:
        module(*inputs)
    except Exception as error:
        return type(error), str(error)
    return type(None), ""


ERRORS: dict[str, tuple[int, dict[str, Any], Tensor]] = {
    "channels": (2, {}, torch.ones(2, 4, 3, 3)),
    "channels, no statistics": (2, {"track_running_stats": False}, torch.ones(2, 4, 3, 3)),
    "1d of 1": (1, {}, torch.ones(5)),
    "1d of 4": (1, {}, torch.ones(2, 5, 3, 3)),
    "2d of 3": (2, {}, torch.ones(5, 3, 3)),
    "3d of 4": (3, {}, torch.ones(2, 5, 3, 3)),
    "one value": (2, {}, torch.ones(1, 5, 1, 1)),
    "one value, 1d": (1, {}, torch.ones(1, 5)),
    "eps 0": (2, {"eps": 0.0}, torch.ones(2, 5, 3, 3)),
    "eps negative": (2, {"eps": -1.0}, torch.ones(2, 5, 3, 3)),
    "integers": (2, {}, torch.ones(2, 5, 3, 3, dtype=torch.int32)),
    "booleans": (2, {}, torch.ones(2, 5, 3, 3, dtype=torch.bool)),
    "complex": (2, {}, torch.ones(2, 5, 3, 3, dtype=torch.complex64)),
    "fp64 input, fp32 parameters": (2, {}, torch.ones(2, 5, 3, 3, dtype=torch.float64)),
    "fp32 input, bf16 parameters": (2, {"params": torch.bfloat16}, torch.ones(2, 5, 3, 3)),
    "sparse": (2, {}, torch.ones(2, 5, 3, 3).to_sparse()),
    "no channels": (2, {}, torch.ones(2, 0, 3, 3)),
    "no pixels": (2, {}, torch.ones(2, 5, 0, 3)),
}


@pytest.mark.cpu_only("what torch refuses differs between devices")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_torchs(case: str, mode: str) -> None:
    dims, kwargs, x = ERRORS[case]
    theirs, ours = pair(dims, **kwargs)
    outcomes = [outcome(m.train(mode == "train"), x) for m in (theirs, ours)]
    assert outcomes[1] == outcomes[0]
    assert_same_state(ours, in_double(theirs))


@pytest.mark.cpu_only("what torch refuses differs between devices")
def test_functions_errors_are_torchs() -> None:
    import braze.nn.functional as ours

    x, ones = torch.ones(2, 5, 3, 3), torch.ones(5)
    calls: list[tuple[Any, ...]] = [
        (x, None, None),
        (x, ones, None),
        (x, None, ones),
        (x, ones, torch.ones(4)),
        (x, ones, ones, torch.ones(5, 1)),
        (x, ones, ones, ones.double()),
        (x, ones, ones, ones.to("meta")),
        (x, ones, ones, None, None, False, 0.1, -1.0),
        (x, ones, ones, None, None, True, None),
        (x[0, 0, 0], ones, ones),
    ]
    for arguments in calls:
        results = []
        for function in (F.batch_norm, ours.batch_norm):
            try:
                results.append(function(*arguments))
            except Exception as error:
                results.append((type(error), str(error)))
        if isinstance(results[0], Tensor):
            torch.testing.assert_close(results[1], results[0])
        else:
            assert results[1] == results[0], arguments


def test_the_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests compare is not torch with torch."""
    monkeypatch.setattr(F, "batch_norm", None)
    for layout, (dims, _) in INPUTS.items():
        for dtype, params in DTYPES:
            module = getattr(bnn, f"BatchNorm{dims}d")(5, dtype=params)
            for training in (True, False):
                assert module.train(training)(make_input(layout, 0, dtype)).dtype == dtype
