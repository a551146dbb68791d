"""Dropout's modules and functions in the place of torch's: constructors, errors, state, generators."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from braze._native import _C
from braze.nn import _dropout_functional as functional
from braze.nn import dropout as modules
from reference import same_bits
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
FUNCTIONS = (
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split()
)  # fmt: skip
SHAPES = {"Dropout1d": (2, 3, 8), "Dropout2d": (2, 3, 8, 8), "Dropout3d": (2, 3, 4, 4, 4)}


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_torchs(name: str) -> None:
    ours, theirs = getattr(modules, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for arguments in ((), (0.3,), (0.3, True), (1,)):
        module = ours(*arguments)
        assert repr(module) == repr(theirs(*arguments))
        assert module.state_dict() == {} and not list(module.parameters())
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(again) is ours and (again.p, again.inplace) == (module.p, module.inplace)
    for p in (-0.1, 1.1):
        messages = []
        for module in (ours, theirs):
            with pytest.raises(ValueError) as caught:
                module(p)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    x = torch.randn(SHAPES.get(name, (2, 3, 8)))
    module, function = ours(0.5), getattr(functional, FUNCTIONS[NAMES.index(name)])
    torch.manual_seed(0)
    y = module(x)
    torch.manual_seed(0)
    assert same_bits(y, function(x, 0.5, True)) and not same_bits(y, x)
    assert module.eval()(x) is x and theirs(0.5).eval()(x) is x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_torchs_signature(name: str) -> None:
    ours = list(inspect.signature(getattr(functional, name)).parameters.values())
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[:-1]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert ours[-1].name == "generator" and ours[-1].kind == inspect.Parameter.KEYWORD_ONLY


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_number_of_dimensions(name: str) -> None:
    """The same outcome as torch's for 0 to 6 dimensions: shape, or error and its text, or warning."""
    ours, theirs = getattr(functional, name), getattr(F, name)
    for training in (True, False):
        for ndim in range(7):
            outcomes: list[Any] = []
            for function in (ours, theirs):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        outcome: Any = function(torch.ones((2,) * ndim), 0.5, training).shape
                    except RuntimeError as error:
                        outcome = (type(error), str(error))
                outcomes.append((outcome, [str(w.message) for w in caught]))
            assert outcomes[0] == outcomes[1], (ndim, training)


@pytest.mark.parametrize("dtype", (torch.complex64, torch.int32, torch.bool, torch.float8_e4m3fn))
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, 4).to(dtype)
    for training in (True, False):
        outcomes: list[Any] = []
        for function in (functional.dropout, F.dropout):
            try:
                outcomes.append(function(x, 0.5, training).dtype)
            except (RuntimeError, NotImplementedError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]
    with pytest.raises(ValueError, match="generator: torch's own dropout takes none"):
        functional.dropout(x, 0.5, generator=torch.Generator(x.device))


class Tagged(Tensor):
    """A subclass with torch's default behaviour."""


def test_subclasses_meta_and_sparse_tensors() -> None:
    x = torch.randn(100).as_subclass(Tagged)
    y = functional.dropout(x, 0.5)
    assert type(y) is Tagged
    assert type(functional.act_dropout(x, "relu", 0.5)) is Tagged
    assert type(functional.dropout_add(x, x, 0.5)) is Tagged
    assert functional.dropout(torch.empty(3, device="meta"), 0.5).is_meta
    with pytest.raises(NotImplementedError):
        functional.dropout(torch.eye(3, device="cpu").to_sparse(), 0.5)


def test_parameters_and_inference_tensors() -> None:
    p = nn.Parameter(torch.randn(64))
    functional.dropout(p, 0.5).sum().backward()
    assert p.grad is not None and set(p.grad.tolist()) == {0.0, 2.0}
    with torch.inference_mode():
        x = torch.randn(64)
        assert functional.dropout(x, 0.5).is_inference()
        functional.dropout(x, 0.5, inplace=True)
        assert bool((x == 0).any())


def test_autocast_passes_through() -> None:
    device = torch.ones(1).device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert functional.dropout(torch.ones(9, dtype=dtype), 0.5).dtype == dtype


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert functional.dropout(torch.ones(9), 0.5).shape == (9,)
    finally:
        torch.use_deterministic_algorithms(False)


def test_seeds_and_generators() -> None:
    x = torch.randn(1000)
    torch.manual_seed(3)
    first, second = functional.dropout(x, 0.5), functional.dropout(x, 0.5)
    assert not same_bits(first, second)
    torch.manual_seed(3)
    assert same_bits(first, functional.dropout(x, 0.5))
    with torch.random.fork_rng():
        functional.dropout(x, 0.5)
    assert same_bits(second, functional.dropout(x, 0.5))
    generator = torch.Generator(x.device).manual_seed(3)
    state = torch.get_rng_state()
    for name in FUNCTIONS:
        shape = {"dropout1d": (2, 4, 8), "dropout3d": (2, 4, 2, 2, 2)}.get(name, (2, 4, 4, 4))
        batch = torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu")
        batch = batch.to(x.device)
        results = []
        for _ in range(2):
            generator.manual_seed(7)
            results.append(getattr(functional, name)(batch, 0.5, True, generator=generator))
        assert same_bits(*results)
    functional.act_dropout(x, "relu", generator=generator)
    functional.dropout_add(x, x, generator=generator)
    assert torch.equal(state, torch.get_rng_state())
    generator.manual_seed(3)
    assert same_bits(first, functional.dropout(x, 0.5, generator=generator))


def test_a_default_device_changes_nothing() -> None:
    """It is a mode, which torch's functions are overridden by."""
    x = torch.randn(3, 5, 64)
    for call in (
        lambda: functional.dropout(x, 0.5),
        lambda: functional.alpha_dropout(x, 0.5, True),
        lambda: functional.feature_alpha_dropout(x, 0.5, True),
        lambda: functional.dropout1d(x, 0.5),
        lambda: functional.act_dropout(x, "gelu", 0.5),
        lambda: functional.dropout_add(x, x, 0.5),
    ):
        torch.manual_seed(3)
        want = call()
        with torch.device(x.device):
            torch.manual_seed(3)
            assert same_bits(call(), want)


@pytest.mark.cpu_only("the CPU's generator")
def test_one_draw_of_64_bits() -> None:
    torch.manual_seed(3)
    _, state = _C.dropout(torch.ones(3), 0.5, False, False, None, None)
    torch.manual_seed(3)
    # random_ of the full range takes the same 64 bits.
    bits = torch.empty(1, dtype=torch.int64).random_(-(2**63), None).item()
    assert state.tolist() == [bits, 0]


def test_functorch_and_forward_mode() -> None:
    x = torch.randn(5, 40)
    for call in (
        lambda x: functional.dropout(x, 0.5),
        lambda x: functional.alpha_dropout(x, 0.5, True),
        lambda x: functional.act_dropout(x, "relu", 0.5),
        lambda x: functional.dropout_add(x, x, 0.5),
    ):
        y = torch.vmap(call, randomness="different")(x)
        assert y.shape == x.shape
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(call)(x)
        gradient = torch.func.grad(lambda x, call=call: call(x).sum())(x)
        assert gradient.shape == x.shape
    y, tangent = torch.func.jvp(lambda x: functional.dropout(x, 0.5), (x,), (torch.ones_like(x),))
    assert bool(((tangent == 2) == (y != 0)).all())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        y, tangent = forward_ad.unpack_dual(functional.dropout(dual, 0.5))
        assert bool(((tangent == 2) == (y != 0)).all())
    y = torch.vmap(lambda x: functional.dropout2d(x, 0.5), randomness="different")(
        torch.ones(3, 2, 5, 4, 4)
    )
    assert bool((y.flatten(3).amax(3) == y.flatten(3).amin(3)).all())


def test_fused_modules() -> None:
    module = modules.ActDropout("leaky_relu", 0.25, negative_slope=0.2)
    assert repr(module) == "ActDropout(leaky_relu, negative_slope=0.2, p=0.25, inplace=False)"
    assert repr(modules.ActDropout("gelu")) == "ActDropout(gelu, p=0.5, inplace=False)"
    assert repr(modules.DropoutAdd(0.1)) == "DropoutAdd(p=0.1)"
    x, residual = torch.randn(2, 500)
    torch.manual_seed(0)
    y = module(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], F.leaky_relu(x, 0.2)[kept] / 0.75)
    assert same_bits(module.eval()(x), F.leaky_relu(x, 0.2))
    add = modules.DropoutAdd(0.25)
    y = add(x, residual)
    torch.testing.assert_close(y, torch.where(y != residual, x / 0.75 + residual, residual))
    assert same_bits(add.eval()(x, residual), x + residual)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(again) == repr(module.eval())
    for bad in ({"p": math.nan}, {"p": 2}, {"activation": "rleu"}):
        with pytest.raises(ValueError):
            module = modules.ActDropout(**bad)
            module(x)
    x = torch.randn(9)
    assert modules.ActDropout("relu", 0.5, inplace=True)(x) is x


def test_residuals_that_torch_takes() -> None:
    """Broadcast and promoted as torch does it."""
    x = torch.randn(4, 5)
    for residual in (
        torch.randn(5),
        torch.randn(4, 5, dtype=torch.float64),
        torch.randn(4, 5).T.clone().T,
    ):
        torch.manual_seed(1)
        y = functional.dropout_add(x, residual, 0.5)
        torch.manual_seed(1)
        want = functional.dropout(x, 0.5) + residual
        assert y.dtype == want.dtype
        torch.testing.assert_close(y, want)


def test_many_dimensions_and_size_1() -> None:
    x = torch.randn((1, 2) * 6)
    y = functional.dropout(x, 0.5)
    assert y.shape == x.shape and y.stride() == x.stride()
    y = functional.feature_alpha_dropout(x, 0.5, True)
    assert y.shape == x.shape
