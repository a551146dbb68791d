"""braze's batch-norm modules as modules: state, copies, hooks, parametrizations, functions."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import braze.nn as bnn
import braze.nn.functional as bF
import pytest
import torch
from nn_cases import assert_near, make_input, pair
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

ACT = {"activation": "leaky_relu", "negative_slope": 0.3}


def make_act(seed: int = 0, **kwargs: Any) -> bnn.BatchNormAct2d:
    module = bnn.BatchNormAct2d(5, **{**ACT, **kwargs})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(5, generator=generator))
    return module


def stepped(module: nn.Module, seed: int = 0) -> Tensor:
    y = module(make_input("NCHW", seed))
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize("ours_is_loaded", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"track_running_stats": False}])
def test_state_dicts_go_both_ways(kwargs: dict[str, Any], ours_is_loaded: bool) -> None:
    made = (nn.BatchNorm2d(5, **kwargs), bnn.BatchNorm2d(5, **kwargs), make_act(**kwargs))
    for source in made:
        for target in made:
            source = copy.deepcopy(source)
            stepped(source)
            state = source.state_dict()
            target = copy.deepcopy(target)
            result = target.load_state_dict(state)
            assert not result.missing_keys and not result.unexpected_keys
            torch.testing.assert_close(target.state_dict(), state, rtol=0, atol=0)
            assert state._metadata == target.state_dict()._metadata


def test_a_checkpoint_from_before_the_counter() -> None:
    state = nn.BatchNorm2d(5).state_dict()
    del state["num_batches_tracked"]
    for version in (None, 1):
        state._metadata[""] = {"version": version}
        module = make_act()
        module.load_state_dict(state)
        assert int(module.num_batches_tracked) == 0
    state._metadata[""] = {"version": 2}
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        make_act().load_state_dict(state)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies(way: str) -> None:
    module = make_act(momentum=None)
    stepped(module)
    if way == "deepcopy":
        other = copy.deepcopy(module)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(module) and repr(other) == repr(module)
    assert torch.equal(stepped(other, 1), stepped(module, 1))
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert other.weight is not module.weight


def test_conversion_of_the_whole_module() -> None:
    module = make_act().double().half().to(memory_format=torch.channels_last).float()
    assert stepped(module).dtype is torch.float32
    module.bfloat16()
    assert module(make_input("NHWC", 0, torch.bfloat16)).dtype is torch.bfloat16
    assert module.num_batches_tracked.dtype is torch.int64
    assert int(module.num_batches_tracked) == 2
    module.reset_parameters()
    assert int(module.num_batches_tracked) == 0 and bool((module.weight == 1).all())


def test_hooks() -> None:
    seen: list[str] = []
    module = make_act()
    module.register_forward_pre_hook(lambda m, args: seen.append(f"pre {len(args)}"))
    module.register_forward_hook(lambda m, args, y: y * 2)
    module.register_full_backward_hook(lambda m, gi, go: seen.append(f"backward {len(gi)}"))
    plain = make_act()
    x, r = make_input("NCHW"), make_input("NCHW", 1)
    y = module(x, r)
    assert_near(y, 2 * plain(x, r).double(), "output")
    y.sum().backward()
    assert seen == ["pre 2", "backward 2"]


def test_parametrized_weight() -> None:
    class Squared(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * w

    for module in (make_act(), nn.Sequential(bnn.BatchNorm2d(5))[0]):
        plain = copy.deepcopy(module)
        with torch.no_grad():
            plain.weight.square_()
        parametrize.register_parametrization(module, "weight", Squared())
        assert isinstance(module, nn.BatchNorm2d)
        y = stepped(module)
        assert_near(y, stepped(plain).double(), "output")
        y.sin().sum().backward()
        assert module.parametrizations.weight.original.grad is not None


def test_weight_norm_on_a_convolution() -> None:
    def model(module: Any) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(5, 5, 3)), module.BatchNorm2d(5)
        )

    x = make_input("NCHW")
    results = [model(module)(x) for module in (nn, bnn)]
    torch.testing.assert_close(results[1], results[0])


def test_backward_twice() -> None:
    module = make_act()
    y = module(make_input("NCHW"), make_input("NHWC", 1)).sin().sum()
    first = torch.autograd.grad(y, [*module.parameters()], retain_graph=True)
    second = torch.autograd.grad(y, [*module.parameters()])
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, [*module.parameters()])


def test_output_changed_in_place() -> None:
    """Nothing that backward needs is in the output."""
    results = []
    for change in (lambda y: y.mul_(2).relu_(), lambda y: (y * 2).relu()):
        module = make_act()
        x = make_input("NCHW")
        change(module(x)).square().sum().backward()
        results.append((x.grad, module.weight.grad, module.bias.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_input_changed_in_place_is_noticed() -> None:
    module = make_act()
    x = make_input("NCHW") * 1
    y = module(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    results = []
    for how in (checkpoint, None):
        module, x, r = make_act(), make_input("NCHW"), make_input("NCHW", 1)
        arguments = (module, x, r)
        y = how(*arguments, use_reentrant=reentrant) if how else module(x, r)
        y.square().sum().backward()
        # As torch's module, a checkpointed one sees each batch twice.
        assert int(module.num_batches_tracked) == (2 if how else 1)
        results.append((y, x.grad, r.grad, module.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        stepped(make_act()).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode() -> None:
    with torch.inference_mode():
        module = make_act()
        y = stepped(module)
        assert y.is_inference() and int(module.num_batches_tracked) == 1
        assert stepped(module.eval()).is_inference()


def test_functional_call() -> None:
    module = make_act()
    state = {n: t.clone() for n, t in module.state_dict().items()}
    state["weight"] = state["weight"] * 2
    y = torch.func.functional_call(module, state, (make_input("NCHW"),))
    assert int(state["num_batches_tracked"]) == 1 and int(module.num_batches_tracked) == 0
    module.load_state_dict(dict(state, num_batches_tracked=torch.tensor(0)))
    with torch.no_grad():
        module.running_mean.zero_()
    torch.testing.assert_close(stepped(module), y)


# ---------------------------------------------------------------------- functions


def test_functions_and_modules_agree() -> None:
    module, twin = make_act(), make_act()
    x, r = make_input("NCHW"), make_input("NHWC", 1)
    y = bF.batch_norm_act(
        x,
        twin.running_mean,
        twin.running_var,
        twin.weight,
        twin.bias,
        training=True,
        residual=r,
        num_batches_tracked=twin.num_batches_tracked,
        **ACT,
    )
    assert torch.equal(y, module(x, r))
    torch.testing.assert_close(twin.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_fork_gives_the_output_twice() -> None:
    for training in (True, False):
        module = make_act()
        x, r = make_input("NCHW"), make_input("NCHW", 1)
        state = (module.running_mean, module.running_var, module.weight, module.bias, training)
        a, b = bF.batch_norm_act(x, *state, residual=r, fork=True, **ACT)
        assert torch.equal(a, b) and a.data_ptr() == b.data_ptr()
        inputs = [x, r, module.weight, module.bias]
        found = torch.autograd.grad((a * a).sum() + b.sin().sum(), inputs)
        y = bF.batch_norm_act(x, *state, residual=r, **ACT)
        wanted = torch.autograd.grad((y * y).sum() + y.sin().sum(), inputs)
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_near(one, other.double(), f"gradient {i}", 4)


def test_join_of_two() -> None:
    for training in (True, False):
        a, b = pair(2), pair(2, momentum=None, eps=0.1)
        with torch.no_grad():
            b[1].weight.mul_(-2), b[0].weight.mul_(-2)
        x, x2 = make_input("NCHW"), make_input("NHWC", 1)
        expected = torch.relu(a[0].train(training)(x) + b[0].train(training)(x2))
        one, two = a[1], b[1]
        y = bF.batch_norm_add_act(
            *(x, one.running_mean, one.running_var, one.weight, one.bias),
            *(x2, two.running_mean, two.running_var, two.weight, two.bias),
            training,
            momentum2=None,
            eps2=0.1,
            num_batches_tracked=one.num_batches_tracked if training else None,
            num_batches_tracked2=two.num_batches_tracked if training else None,
        )
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.state_dict(), a[0].state_dict())
        torch.testing.assert_close(two.state_dict(), b[0].state_dict())
        inputs = [x, x2, *one.parameters(), *two.parameters()]
        theirs = [x, x2, *a[0].parameters(), *b[0].parameters()]
        found = torch.autograd.grad(y.square().sum(), inputs)
        wanted = torch.autograd.grad(expected.square().sum(), theirs)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_residual_as_torch_adds() -> None:
    module = make_act()
    x = make_input("NCHW")
    module.eval()
    plain = copy.deepcopy(module)
    plain.activation = "identity"

    def expected(r: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(plain(x) + r, 0.3)

    for r in (
        torch.ones(5, 4, 6),
        torch.full((), 2.0),
        torch.ones(2, 3, 5, 4, 6),
        torch.ones(x.shape, dtype=torch.int64),
        torch.ones(x.shape, dtype=torch.float64),
        torch.ones(x.shape, dtype=torch.bfloat16),
    ):
        y, wanted = module(x, r), expected(r)
        assert y.dtype == wanted.dtype and y.shape == wanted.shape
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="broadcast"):
        module.train()(x, torch.ones(7))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
