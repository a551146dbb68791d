"""The drop-in contract: checkpoints both ways with torch, hooks around them, pickle and deepcopy."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import braze.optim as optim
import pytest
import torch
from braze.optim._extras import DEFAULTS
from torch import Tensor, nn

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.02}),
    ("Adam", {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.02}),
]
EACH = pytest.mark.parametrize(("name", "kwargs"), CONFIGS, ids=str)
Pair = tuple[nn.Module, torch.optim.Optimizer]


def make(module: Any, name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Pair:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    return model, getattr(module, name)(model.parameters(), **kwargs)


def train(pair: Pair, steps: int, first: int = 0) -> None:
    model, optimizer = pair
    dtype = next(model.parameters()).dtype
    for seed in range(first, first + steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()


def weights(pair: Pair) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pair[0].state_dict().items()}


def assert_close(a: Pair, b: Pair, exact: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(weights(a), weights(b), **tolerance)


def calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the steps that run torch's own implementation."""
    calls: list[str] = []
    for name in ("sgd", "adam"):
        module = importlib.import_module(f"torch.optim.{name}")
        original = getattr(module, name)

        def spy(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            calls.append(_original.__name__)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    return calls


@EACH
@pytest.mark.parametrize("direction", ["torch to braze", "braze to torch"])
def test_switching_in_the_middle_of_training(
    name: str, kwargs: dict[str, Any], direction: str
) -> None:
    whole = make(torch.optim, name, foreach=False, **kwargs)
    train(whole, 6)
    modules = (torch.optim, optim) if direction == "torch to braze" else (optim, torch.optim)
    first, second = (make(module, name, **kwargs) for module in modules)
    train(first, 3)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    train(second, 3, first=3)
    assert_close(second, whole)


@EACH
@pytest.mark.parametrize("saved", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_a_checkpoints_flags_do_not_choose_the_path(
    name: str, kwargs: dict[str, Any], saved: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(torch.optim, name, **kwargs, **saved)
    train(source, 2)
    mine, torchs = make(optim, name, **kwargs), make(optim, name, foreach=True, **kwargs)
    for model, optimizer in (mine, torchs):
        model.load_state_dict(source[0].state_dict())
        optimizer.load_state_dict(copy.deepcopy(source[1].state_dict()))
    assert mine[1]._step_supports_amp_scaling is False  # type: ignore[attr-defined]
    calls = calls_of_torch(monkeypatch)
    train(mine, 2, first=2)
    assert calls == []
    train(torchs, 2, first=2)
    assert len(calls) == 2
    train(source, 2, first=2)
    assert_close(mine, source)
    assert_close(torchs, source)


def saved_and_loaded(pair: Pair) -> Pair:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    loaded: Pair = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[Pair], Pair]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": saved_and_loaded,
}


@EACH
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_copies_continue_bit_for_bit(
    name: str, kwargs: dict[str, Any], how: str, flags: dict[str, bool]
) -> None:
    pair = make(optim, name, **kwargs, **flags)
    train(pair, 2)
    twin = COPIES[how](pair)
    lost = set(vars(pair[1])) ^ set(vars(twin[1]))
    # which torch's copies lose, too
    assert lost <= {"_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused"}
    assert type(twin[1]) is type(pair[1])
    scaled = [getattr(o, "_step_supports_amp_scaling", None) for _, o in (pair, twin)]
    assert scaled == [flags.get("fused", False)] * 2
    shared = {t.data_ptr() for e in pair[1].state.values() for t in e.values()}
    assert not shared & {t.data_ptr() for e in twin[1].state.values() for t in e.values()}
    train(pair, 2, first=2)
    train(twin, 2, first=2)
    assert_close(twin, pair, exact=True)
    twin[1].param_groups[0]["lr"] = 0.5
    assert pair[1].param_groups[0]["lr"] == kwargs["lr"]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps_before", [2, 3])
def test_copies_keep_the_accumulation(how: str, steps_before: int) -> None:
    pair = make(optim, "AdamW", accumulation_steps=2, accumulation="sum", l1=0.01)
    train(pair, steps_before)  # 3: within a window
    twin = COPIES[how](pair)
    assert twin[1].accumulation_steps == 2  # type: ignore[attr-defined]
    assert twin[1].accumulation == "sum"  # type: ignore[attr-defined]
    assert twin[1].param_groups[0]["l1"] == 0.01
    start = weights(pair)
    for step in range(3):
        train(pair, 1, first=5 + step)
        train(twin, 1, first=5 + step)
        assert twin[1].updated is pair[1].updated  # type: ignore[attr-defined]
        assert_close(twin, pair, exact=True)
    assert not torch.equal(weights(pair)["0.weight"], start["0.weight"])


def test_copies_remember_that_a_window_holds_scaled_gradients() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([p], accumulation_steps=2)
    p.grad = torch.ones(3)
    optimizer.accumulate()
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        each.param_groups[0]["params"][0].grad = torch.ones(3)
        each.grad_scale = torch.tensor(8.0)
        with pytest.raises(RuntimeError, match="still carry"):
            each.step()


def test_plans_are_not_pickled() -> None:
    pair = make(optim, "Adam")
    train(pair, 1)
    kept = {"defaults", "state", "param_groups", *(set(DEFAULTS) - {"l1"})}
    assert set(pair[1].__getstate__()) == kept
    assert b"StepPlan" not in pickle.dumps(pair[1])


@EACH
@pytest.mark.parametrize("flags", [{}, {"foreach": True}], ids=str)
def test_loading_does_not_alias_the_callers_tensors(
    name: str, kwargs: dict[str, Any], flags: dict[str, bool]
) -> None:
    pair = make(optim, name, **kwargs, **flags)
    train(pair, 2)
    saved = copy.deepcopy(pair[1].state_dict())
    kept = copy.deepcopy(saved)
    other = make(optim, name, **kwargs, **flags)
    other[1].load_state_dict(saved)
    train(other, 2)
    for key, entry in saved["state"].items():
        torch.testing.assert_close(dict(entry), dict(kept["state"][key]), rtol=0, atol=0)
    assert saved["param_groups"] == kept["param_groups"]


INTEGER_TENSOR = torch.tensor(3)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0), INTEGER_TENSOR, torch.tensor([3.0])])
def test_the_step_count_may_be_saved_as_any_number(step: Any) -> None:
    results = []
    for module in (optim, torch.optim):
        # torch's foreach code, which it prefers on a GPU, takes no integer.
        model, optimizer = pair = make(module, "Adam", lr=0.1, foreach=False)
        train(pair, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            entry["step"] = copy.deepcopy(step)
        optimizer.load_state_dict(saved)
        train(pair, 1, first=1)
        counts = [float(entry["step"]) for entry in optimizer.state.values()]
        results.append((counts, dict(model.state_dict())))
    assert results[0][0] == [4.0] * 4
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_state_is_cast_as_torch_does(dtype: torch.dtype) -> None:
    source = make(torch.optim, "Adam", lr=0.1)
    train(source, 1)
    loaded = []
    for module in (optim, torch.optim):
        _, optimizer = make(module, "Adam", dtype=dtype)
        optimizer.load_state_dict(source[1].state_dict())
        loaded.append([{k: v.dtype for k, v in e.items()} for e in optimizer.state.values()])
    assert loaded[0] == loaded[1]
    assert loaded[0][0]["exp_avg"] is dtype
    assert loaded[0][0]["step"] is torch.float32


@pytest.mark.parametrize("change", ["groups", "sizes"])
def test_mismatched_state_dicts_raise_torchs_error_and_change_nothing(change: str) -> None:
    pair = make(optim, "Adam")
    train(pair, 1)
    saved, kept = copy.deepcopy(pair[1].state_dict()), copy.deepcopy(pair[1].state_dict())
    if change == "groups":
        saved["param_groups"].append(saved["param_groups"][0])
    else:
        saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="loaded state dict"):
        pair[1].load_state_dict(saved)
    torch.testing.assert_close(pair[1].state_dict()["state"], kept["state"], rtol=0, atol=0)


# ------------------------------------------------------------------ hooks

CLASSES = pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])


@CLASSES
@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks(name: str, prepend: bool) -> None:
    _, optimizer = make(optim, name)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("a"))
    handle = optimizer.register_state_dict_pre_hook(lambda o: calls.append("b"), prepend=prepend)

    def post(label: str) -> Callable[[Any, Any], dict[str, Any]]:
        def hook(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            calls.append(label)
            return {**given, "last": label}

        return hook

    optimizer.register_state_dict_post_hook(post("c"))
    optimizer.register_state_dict_post_hook(post("d"), prepend=prepend)
    result = optimizer.state_dict()
    assert calls == (["b", "a", "d", "c"] if prepend else ["a", "b", "c", "d"])
    assert result["last"] == calls[-1]
    handle.remove()
    optimizer.state_dict()
    assert calls[4:] == [c for c in calls[:4] if c != "b"]


@CLASSES
@pytest.mark.parametrize("prepend", [False, True])
def test_load_state_dict_hooks(name: str, prepend: bool) -> None:
    _, optimizer = make(optim, name)
    calls: list[Any] = []

    def pre(factor: float) -> Callable[[Any, dict[str, Any]], None]:
        def hook(_: Any, given: dict[str, Any]) -> None:  # in place, in the hook's own copy
            calls.append(factor)
            given["param_groups"][0]["lr"] += factor

        return hook

    optimizer.register_load_state_dict_pre_hook(pre(1.0))
    optimizer.register_load_state_dict_pre_hook(pre(2.0), prepend=prepend)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("last"), prepend=prepend)
    optimizer.load_state_dict(optimizer.state_dict())
    tail = ["last", 3.001] if prepend else [3.001, "last"]
    assert calls == ([2.0, 1.0] if prepend else [1.0, 2.0]) + tail


@EACH
def test_load_state_dict_pre_hook_may_return_another_dict(
    name: str, kwargs: dict[str, Any]
) -> None:
    pair = make(optim, name, **kwargs)
    train(pair, 2)
    other = make(optim, name, **kwargs)
    other[0].load_state_dict(pair[0].state_dict())
    other[1].register_load_state_dict_pre_hook(lambda _, given: given["nested"])
    saved = {"nested": copy.deepcopy(pair[1].state_dict())}
    kept = copy.deepcopy(saved)
    other[1].load_state_dict(saved)
    train(pair, 2, first=2)
    train(other, 2, first=2)
    assert_close(pair, other, exact=True)
    for key, entry in saved["nested"]["state"].items():
        torch.testing.assert_close(dict(entry), dict(kept["nested"]["state"][key]))
