"""Memory, live tensors and file descriptors stay flat over many steps and constructions."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from braze import optim
from torch import Tensor
from torch.nn import Parameter

REPEATS = 1000
# Larger than allocator noise, and far below what 1000 leaks of even one small object would add.
RSS_BOUND = 3 << 20
PAYLOAD = 1 << 12

pytestmark = [
    pytest.mark.emulated_only("measures this process's memory"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def resident() -> int:
    # Else freed memory that malloc keeps for later would hide what leaks into it.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    return sum(1 for x in gc.get_objects() if issubclass(type(x), Tensor))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def settle() -> None:
    """What other tests left behind may take several collections: finalizers free more."""
    for _ in range(10):
        if gc.collect() == 0:
            return


def growth(action: Callable[[], Any], repeats: int = REPEATS) -> dict[str, int]:
    """What ``repeats`` calls left behind, once the first ones have filled all caches."""
    for _ in range(repeats // 4):
        action()
    settle()
    before = (resident(), live_tensors(), descriptors())
    for _ in range(repeats):
        action()
    settle()
    after = (resident(), live_tensors(), descriptors())
    names = ("rss", "tensors", "descriptors")
    return {name: b - a for name, a, b in zip(names, before, after, strict=True)}


def assert_flat(action: Callable[[], Any]) -> None:
    grown = growth(action)
    assert grown["rss"] < RSS_BOUND, grown
    assert grown["tensors"] == 0, grown
    assert grown["descriptors"] == 0, grown


def make(kind: str, **options: Any) -> tuple[list[Parameter], Any]:
    params = [Parameter(torch.ones(PAYLOAD // 4)) for _ in range(3)]
    params.append(Parameter(torch.ones(8, 9).t()))
    for p in params:
        p.grad = torch.ones(p.shape)
    return params, getattr(optim, kind)(params, lr=1e-3, **options)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9}),
    ("AdamW", {"amsgrad": True}),
    ("CAG", {"momentum": 0.9, "accumulation_steps": 2}),
]


def renew_gradients(params: list[Parameter]) -> None:
    for p in params:
        p.grad = torch.ones(p.shape)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda v: v if isinstance(v, str) else "")
def test_steps(kind: str, options: dict[str, Any]) -> None:
    params, optimizer = make(kind, **options)

    def step() -> None:
        renew_gradients(params)
        optimizer.step()

    assert_flat(step)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda v: v if isinstance(v, str) else "")
def test_constructions(kind: str, options: dict[str, Any]) -> None:
    def construct() -> None:
        _, optimizer = make(kind, **options)
        optimizer.step()

    assert_flat(construct)


def test_rebuilds() -> None:
    params, optimizer = make("AdamW")

    def rebuild() -> None:
        params[0].data = params[0].data.clone()
        optimizer.state[params[1]]["exp_avg"] = torch.zeros_like(params[1])
        optimizer.step()

    assert_flat(rebuild)
    assert optimizer._plan.rebuilds > REPEATS


def test_checkpoints() -> None:
    _, optimizer = make("SGD", momentum=0.9)
    optimizer.step()

    def reload() -> None:
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()

    assert_flat(reload)


def test_accumulation_in_pieces() -> None:
    params, optimizer = make("AdamW")

    def window() -> None:
        for _ in range(2):
            optimizer.accumulate(2.0)
            renew_gradients(params)
        optimizer.step()

    assert_flat(window)


def test_errors() -> None:
    """An exception holds no tensor, no lock and no reference."""
    params, optimizer = make("SGD")
    optimizer.step()
    good = params[0].data

    def fail() -> None:
        params[0].data = torch.ones(3)
        with pytest.raises(ValueError, match="the gradient of"):
            optimizer.step()
        params[0].data = good
        optimizer.param_groups[0]["lr"] = "x"
        with pytest.raises(TypeError, match="must be a number"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1

    assert_flat(fail)


def test_detector_sees_leaks() -> None:
    kept: list[Any] = []
    grown = growth(lambda: kept.append(torch.ones(PAYLOAD)), repeats=400)
    assert grown["tensors"] == 400
    assert grown["rss"] > RSS_BOUND
    read, write = os.pipe()
    try:
        grown = growth(lambda: kept.append(os.dup(read)), repeats=20)
        assert grown["descriptors"] == 20
    finally:
        for fd in (read, write, *(x for x in kept if isinstance(x, int))):
            os.close(fd)


def test_detector_sees_a_leaked_optimizer() -> None:
    kept: list[Any] = []
    grown = growth(lambda: kept.append(make("AdamW")[1]), repeats=40)
    assert grown["tensors"] >= 40 * 4
