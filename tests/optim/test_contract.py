"""The drop-in contract: classes, names, param_groups, state, hooks, closures, learning rates."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import braze.optim as optim
import pytest
import torch
from braze.optim import lr_scheduler
from braze.optim._extras import DEFAULTS, Extras
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.optim import swa_utils

NAMES = ("SGD", "Adam", "AdamW")
EACH = pytest.mark.parametrize("name", NAMES)
# Native, and the three ways in which torch's own code takes over.
PATHS: dict[str, dict[str, bool]] = {
    "native": {},
    "foreach": {"foreach": True},
    "differentiable": {"differentiable": True},
    "fused=False": {"fused": False},
}
ON_EACH_PATH = pytest.mark.parametrize("flags", PATHS.values(), ids=PATHS)


def ours(name: str, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    result: torch.optim.Optimizer = getattr(optim, name)(params, **kwargs)
    return result


def parameter(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    p = nn.Parameter(torch.linspace(-1, 1, 21, dtype=dtype))
    p.grad = torch.linspace(3, -2, 21, dtype=dtype)
    return p


def twins(name: str, **kwargs: Any) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """The same model twice, with braze's optimizer and with torch's for-loop."""
    result: list[tuple[nn.Module, torch.optim.Optimizer]] = []
    for module, extra in ((optim, {}), (torch.optim, {"foreach": False})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        result.append((model, getattr(module, name)(model.parameters(), **kwargs, **extra)))
    return result


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).pow(2).sum().backward()
    optimizer.step()


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------ classes and names


@EACH
def test_classes_stand_in_for_torchs(name: str) -> None:
    mine, theirs = getattr(optim, name), getattr(torch.optim, name)
    assert issubclass(mine, theirs)
    assert mine is not theirs
    assert mine.__name__ == mine.__qualname__ == name
    optimizer = ours(name, [parameter()])
    assert isinstance(optimizer, theirs)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert issubclass(optim.AdamW, optim.Adam)
    assert not issubclass(optim.SGD, torch.optim.Adam)


@EACH
def test_signature_is_torchs_plus_keyword_only_extras(name: str) -> None:
    mine = inspect.signature(getattr(optim, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    shared = [p for p in mine.values() if p.name in theirs]
    described = [(p.name, p.kind, p.default) for p in shared]
    assert described == [(p.name, p.kind, p.default) for p in theirs.values()]
    extras = [p for p in mine.values() if p.name not in theirs]
    assert [p.name for p in extras] == [*(["capturable"] if name == "SGD" else []), "extras"]
    assert extras[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert set(Extras.__annotations__) == set(DEFAULTS)
    made = getattr(optim, name)([parameter()])
    assert all(getattr(made, extra) == DEFAULTS[extra] for extra in set(DEFAULTS) - {"l1"})
    with pytest.raises(TypeError, match="no_such_extra"):
        getattr(optim, name)([parameter()], no_such_extra=1)
    step = inspect.signature(getattr(optim, name)([parameter()]).step)
    assert list(step.parameters) == ["closure"]  # GradScaler looks for a parameter "grad_scaler"


def test_every_public_name_is_torchs_but_ours() -> None:
    for name in (n for n in dir(torch.optim) if not n.startswith("_")):
        same = getattr(optim, name) is getattr(torch.optim, name)
        assert same is (name not in (*NAMES, "RMSprop")), name
    assert set(optim.__all__) == {*torch.optim.__all__, "CAG", "GradientMonitor", "Lion"}
    assert not hasattr(torch.optim, "CAG")


def test_importing_braze_leaves_torch_alone() -> None:
    code = (
        "import torch; before = {n: getattr(torch.optim, n) for n in dir(torch.optim)}\n"
        "import braze.optim\n"
        "import braze.optim.lr_scheduler, braze.optim.adagrad\n"
        "from braze.optim.lr_scheduler import StepLR\n"
        "from braze.optim.optimizer import Optimizer, register_optimizer_step_pre_hook\n"
        "assert StepLR is torch.optim.lr_scheduler.StepLR\n"
        "assert braze.optim.lr_scheduler is torch.optim.lr_scheduler\n"
        "assert before == {n: getattr(torch.optim, n) for n in dir(torch.optim)}\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("module", ["sgd", "adam", "adamw", "rmsprop"])
def test_functional_forms_are_torchs(module: str) -> None:
    mine = importlib.import_module(f"braze.optim.{module}")
    theirs = importlib.import_module(f"torch.optim.{module}")
    assert getattr(mine, module) is getattr(theirs, module)
    assert set(mine.__all__) >= set(theirs.__all__)
    assert lr_scheduler is torch.optim.lr_scheduler
    assert optim.swa_utils is swa_utils


@EACH
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"differentiable": True, "fused": True}, "`fused` does not support `differentiable`"),
    ],
)
def test_flags_that_exclude_each_other(name: str, flags: dict[str, bool], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ours(name, [parameter()], **flags)


# ------------------------------------------------------------------ groups and state


@EACH
@ON_EACH_PATH
def test_param_groups_have_exactly_torchs_keys(name: str, flags: dict[str, bool]) -> None:
    mine = ours(name, [parameter()], **flags).param_groups
    theirs = getattr(torch.optim, name)([parameter()], **flags).param_groups
    for group in (mine[0], theirs[0]):
        del group["params"]
    assert list(mine[0].items()) == list(theirs[0].items())


CONFIGS = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
]


@pytest.mark.parametrize(("name", "kwargs"), CONFIGS)
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_state_is_torchs(
    name: str, kwargs: dict[str, Any], default: torch.dtype, dtype: torch.dtype
) -> None:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        states = []
        for module in (optim, torch.optim):
            p, idle = (nn.Parameter(torch.ones(2, 3, dtype=dtype).t()) for _ in range(2))
            p.grad = torch.full_like(p, 2.0)
            optimizer = getattr(module, name)([p, idle], lr=0.1, **kwargs)
            assert not optimizer.state  # lazily
            optimizer.step()
            assert list(optimizer.state) == ([p] if name != "SGD" or kwargs else [])
            states.append(dict(optimizer.state.get(p, {})))
    finally:
        torch.set_default_dtype(previous)
    mine, theirs = states
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].dtype is value.dtype, key
        assert mine[key].stride() == value.stride(), key
        assert mine[key].device == value.device
        assert not mine[key].requires_grad
        torch.testing.assert_close(mine[key], value)


# ------------------------------------------------------------------ closures and hooks


@EACH
@ON_EACH_PATH
@pytest.mark.parametrize("surrounding_grad_mode", [True, False])
def test_closure(name: str, flags: dict[str, bool], surrounding_grad_mode: bool) -> None:
    # torch's differentiable step cannot write to a leaf that requires grad
    p = nn.Parameter(torch.ones(3), requires_grad=not flags.get("differentiable"))
    optimizer = ours(name, [p], lr=0.1, **flags)
    modes = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        loss = (p.detach().requires_grad_() ** 2).sum()
        p.grad = torch.full_like(p, 2.0)
        return loss

    with torch.set_grad_enabled(surrounding_grad_mode):
        loss = optimizer.step(closure)
    assert modes == [True]
    assert loss.requires_grad
    assert loss.item() == 3.0
    assert (p < 1.0).all()
    assert torch.is_grad_enabled()
    assert optimizer.step() is None


@contextmanager
def removed(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@EACH
@ON_EACH_PATH
def test_hooks_run_once_per_step_in_torchs_order(name: str, flags: dict[str, bool]) -> None:
    calls: list[str] = []

    def record(label: str) -> Callable[..., None]:
        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            assert isinstance(optimizer, getattr(optim, name))
            calls.append(label)

        return hook

    # Constructing torch's class wraps its step: the native class must not add that to its own.
    getattr(torch.optim, name)([parameter()])
    p = parameter(torch.float32)
    with removed(
        torch_optimizer.register_optimizer_step_pre_hook(record("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(record("global post")),
    ):
        optimizer = ours(name, [p], **flags)
        optimizer.register_step_pre_hook(record("pre"))
        post = optimizer.register_step_post_hook(record("post"))
        if flags.get("differentiable"):
            p.requires_grad_(False)
        optimizer.step()
        assert calls == ["global pre", "pre", "post", "global post"]
        post.remove()
        optimizer.step()
        assert calls[4:] == ["global pre", "pre", "global post"]


def test_hooks_run_once_with_sparse_gradients() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = optim.SGD(embedding.parameters(), lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert calls == ["pre", "post"]


@EACH
def test_pre_hook_may_replace_the_arguments(name: str) -> None:
    p = parameter()
    optimizer = ours(name, [p])
    optimizer.register_step_pre_hook(lambda _o, _args, kwargs: ((optimizer, lambda: 42.0), kwargs))
    assert optimizer.step() == 42.0
    optimizer.register_step_pre_hook(lambda *_: "neither")  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@EACH
@ON_EACH_PATH
def test_profiler_label_appears_once_per_step(name: str, flags: dict[str, bool]) -> None:
    p = parameter(torch.float32).requires_grad_(not flags.get("differentiable"))
    optimizer = ours(name, [p], **flags)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    labels = [e.name for e in profile.events() if e.name.startswith("Optimizer.step#")]
    assert labels == [f"Optimizer.step#{name}.step"]


@EACH
@pytest.mark.parametrize("flags", [{}, {"foreach": True}], ids=str)
def test_versions_tell_autograd_what_was_written(name: str, flags: dict[str, bool]) -> None:
    p = parameter()
    assert p.grad is not None
    optimizer = ours(name, [p], **flags)
    loss = (p * p).sum()  # saves p for its backward
    before, grad_before = p._version, p.grad._version
    optimizer.step()
    assert p._version > before
    assert p.grad._version == grad_before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------ learning rates

S = lr_scheduler
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], S.LRScheduler]] = {
    "StepLR": lambda o: S.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [1, 3], 0.5),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda t: 0.9),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.3, 2),
    "LinearLR": lambda o: S.LinearLR(o, 0.2, total_iters=4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 3, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum="momentum" in o.defaults),
    "OneCycleLR": lambda o: S.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.ConstantLR(o, 0.1, 2), S.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler(
        [S.ConstantLR(o, 0.1, 2), S.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("name", "kwargs"), [("SGD", {"momentum": 0.9}), ("AdamW", {})])
def test_schedulers(scheduler: str, name: str, kwargs: dict[str, float]) -> None:
    """Some of them also move the momentum or betas; none may see a step out of order."""
    pair = twins(name, lr=0.05, **kwargs)
    changed: set[float] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = [SCHEDULERS[scheduler](optimizer) for _, optimizer in pair]
        for seed in range(7):
            for (model, optimizer), schedule in zip(pair, schedules, strict=True):
                train(model, optimizer, seed)
                schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            changed.add(pair[0][1].param_groups[0]["lr"])
    assert len(changed) > 1
    groups = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for _, o in pair]
    assert groups[0] == {**groups[1], "foreach": None}
    assert_same_model(pair[0][0], pair[1][0])


@EACH
def test_scheduler_warns_of_the_wrong_order(name: str) -> None:
    optimizer = ours(name, [parameter()])
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()


@EACH
def test_lr_may_become_a_float_a_tensor_or_an_int_at_any_time(name: str) -> None:
    (model, mine), (reference, theirs) = twins(name, lr=0.1)
    rates = [0.1, torch.tensor(0.03, dtype=torch.float64), 1, torch.tensor([0.25]), 0.5, 0, 0.125]
    for seed, rate in enumerate(rates):
        mine.param_groups[0]["lr"] = rate
        theirs.param_groups[0]["lr"] = float(rate)
        train(model, mine, seed)
        train(reference, theirs, seed)
        assert_same_model(model, reference)
    tensor = torch.tensor(0.5)
    mine.param_groups[0]["lr"] = tensor
    for seed, value in enumerate((0.5, 0.25)):  # the same object with another value
        tensor.fill_(value)
        theirs.param_groups[0]["lr"] = value
        train(model, mine, seed)
        train(reference, theirs, seed)
    assert_same_model(model, reference)


@EACH
def test_every_group_option_may_change_at_any_time(name: str) -> None:
    (model, mine), (reference, theirs) = twins(name, lr=0.1)
    changes: list[dict[str, Any]] = [{"weight_decay": 0.1}, {"maximize": True}, {"lr": 0.01}]
    if name == "SGD":
        changes += [{"momentum": 0.9}, {"dampening": 0.3}, {"dampening": 0, "nesterov": True}]
    else:
        changes += [{"betas": (0.5, 0.6)}, {"betas": [0.8, 0.7]}, {"eps": 0.1}]
    for seed, change in enumerate(changes):
        mine.param_groups[0].update(change)
        theirs.param_groups[0].update(change)
        train(model, mine, seed)
        train(reference, theirs, seed)
        assert_same_model(model, reference)
