"""Steps from several Python threads, and optimizers that are part of reference cycles."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from braze import optim
from reference import same_bits
from torch.nn import Parameter

pytestmark = pytest.mark.emulated_only(
    "steps in threads, which are on another stream than the test"
)

STEPS = 200


def run_together(*functions: Callable[[], None]) -> None:
    """Each in a thread of its own, started at once; an exception in any is raised here."""
    barrier = threading.Barrier(len(functions))
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]


def make(kind: str, size: int, seed: int, count: int = 5) -> tuple[list[Parameter], Any]:
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(size + i, generator=generator)) for i in range(count)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return params, getattr(optim, kind)(params, lr=1e-3, **options)


def repeat(optimizer: Any, steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            optimizer.step()

    return run


# The larger ones let go of the GIL while they run.
@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_two_optimizers_in_two_threads(kind: str, size: int) -> None:
    steps = STEPS if size < 1000 else STEPS // 10
    expected = [make(kind, size, seed) for seed in (1, 2)]
    for _, optimizer in expected:
        repeat(optimizer, steps)()
    together = [make(kind, size, seed) for seed in (1, 2)]
    run_together(*(repeat(optimizer, steps) for _, optimizer in together))
    for (got, _), (want, _) in zip(together, expected, strict=True):
        for p, q in zip(got, want, strict=True):
            assert same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_one_optimizer_in_two_threads(kind: str, size: int) -> None:
    """Every call is one whole step: the result is that of as many steps in one thread."""
    steps = STEPS if size < 1000 else STEPS // 10
    want, reference = make(kind, size, 3)
    repeat(reference, 2 * steps)()
    got, optimizer = make(kind, size, 3)
    run_together(repeat(optimizer, steps), repeat(optimizer, steps))
    for p, q in zip(got, want, strict=True):
        assert same_bits(p.detach(), q.detach())
    if kind == "AdamW":
        assert {float(optimizer.state[p]["step"]) for p in got} == {2.0 * steps}


def test_steps_while_another_thread_changes_the_optimizer() -> None:
    """Plan rebuilds, resets and checkpoints beside a step neither crash nor lose a step."""
    params, optimizer = make("AdamW", 70_000, 4)

    def disturb() -> None:
        for i in range(STEPS // 4):
            optimizer.param_groups[0]["lr"] = 1e-3 + 1e-6 * i
            optimizer.param_groups[0]["note"] = i
            optimizer.state_dict()
            optimizer._plan.reset()

    run_together(repeat(optimizer, STEPS // 4), disturb)
    assert {float(optimizer.state[p]["step"]) for p in params} == {float(STEPS // 4)}


def test_exception_in_a_thread_is_seen() -> None:
    def fail() -> None:
        raise KeyError("seen")

    with pytest.raises(KeyError, match="seen"):
        run_together(fail, lambda: None)


def test_step_from_inside_a_step_is_refused() -> None:
    """An lr object may run any code when it is read, also another step: no deadlock, no change."""

    class Rate:
        def __float__(self) -> float:
            optimizer.step()
            return 0.1

    params, optimizer = make("SGD", 10, 5)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = Rate()
    with pytest.raises((RuntimeError, TypeError)):
        optimizer.step()
    assert all(same_bits(p.detach(), q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert not any(same_bits(p.detach(), q) for p, q in zip(params, before, strict=True))


def bind_attribute(p: Parameter, optimizer: Any) -> None:
    p.optimizer = optimizer  # type: ignore[attr-defined]


def bind_hook(p: Parameter, optimizer: Any) -> None:
    p.register_hook(lambda grad, bound=optimizer: None)


# torch's collector does not look into a post-accumulate hook, whichever optimizer is in it.
@pytest.mark.parametrize("bind", [bind_attribute, bind_hook])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_optimizer_held_by_its_parameter_is_collected(
    kind: str, bind: Callable[[Parameter, Any], None]
) -> None:
    """Parameter -> optimizer -> plan -> parameter is a cycle through C++."""
    p = Parameter(torch.ones(4))
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(optim, kind)([p], lr=0.1, **options)
    bind(p, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        (p * 2).sum().backward()
        optimizer.step()
    moment = optimizer.state[p]["momentum_buffer" if kind == "SGD" else "exp_avg"]
    seen = [weakref.ref(x) for x in (p, optimizer, moment)]
    del p, optimizer, moment
    assert all(r() is not None for r in seen)
    gc.collect()
    assert [r() for r in seen] == [None, None, None]


def test_step_in_a_hook_during_backward() -> None:
    """The update runs on autograd's thread, as soon as a gradient is there."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    before = [p.detach().clone() for p in layers.parameters()]
    for p in layers.parameters():
        optimizer = optim.AdamW([p], lr=0.1)

        def hook(p: torch.Tensor, bound: Any = optimizer) -> None:
            bound.step()
            bound.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    layers(torch.ones(2, 4)).square().sum().backward()
    for p, q in zip(layers.parameters(), before, strict=True):
        assert p.grad is None
        assert not same_bits(p.detach(), q)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_cycle_through_state_and_groups_is_collected(kind: str) -> None:
    params, optimizer = make(kind, 10, 6)
    optimizer.step()
    optimizer.param_groups[0]["self"] = optimizer
    optimizer.state[params[0]]["self"] = optimizer
    optimizer.step()
    seen = weakref.ref(optimizer)
    data = weakref.ref(params[0])
    del params, optimizer
    gc.collect()
    assert seen() is None
    assert data() is None


def test_dropped_optimizer_frees_without_a_collection() -> None:
    params, optimizer = make("AdamW", 10, 7)
    optimizer.step()
    moment = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    plan = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert plan() is None
        assert moment() is None
    finally:
        gc.enable()


def test_a_used_optimizer_survives_collection() -> None:
    params, optimizer = make("AdamW", 10, 8)
    optimizer.step()
    gc.collect()
    before = params[0].detach().clone()
    optimizer.step()
    assert not same_bits(params[0].detach(), before)
    assert optimizer._plan.rebuilds == 1
