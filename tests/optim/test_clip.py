"""max_grad_norm: torch's clip_grad_norm_ before the step, within it; and what grad_stats() tells."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import braze.optim as optim
import pytest
import torch
from braze._native import _C
from devices import MODE
from torch import Tensor, nn
from torch.nn import Parameter

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "l1": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
    ("Lion", {"lr": 0.01}),
    ("CAG", {"lr": 0.01, "momentum": 0.9, "accumulation_steps": 1}),
]
EACH = pytest.mark.parametrize(("name", "kwargs"), CONFIGS, ids=str)


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Of every kind: strided, empty, without dimensions, and one that never has a gradient."""
    torch.manual_seed(0)
    made = [torch.randn(s) for s in ((), (0,), (5,), (17, 33), (2, 300), (16390,))]
    made += [torch.randn(40, 30).t(), torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)]
    return [Parameter(p.to(dtype)) for p in (*made, torch.randn(3))]


def give_gradients(params: list[Parameter], seed: int, scale: float = 3.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params[:-1]:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        p.grad = torch.empty_like(p).copy_(grad)


def norm_of(params: list[Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in params if p.grad is not None))


def make(name: str, params: Any, **kwargs: Any) -> Any:
    return getattr(optim, name)(params, **kwargs)


def assert_close(a: list[Parameter], b: list[Parameter], **tolerance: float) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [False, True])
def test_equals_clipping_before_the_step(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype, groups: bool
) -> None:
    mine, expected = parameters(dtype), parameters(dtype)

    def grouped(params: list[Parameter]) -> Any:
        return [{"params": params[:4]}, {"params": params[4:], "lr": 0.02}] if groups else params

    a = make(name, grouped(mine), max_grad_norm=1.0, **kwargs)
    b = make(name, grouped(expected), **kwargs)
    for seed in range(3):
        give_gradients(mine, seed)
        give_gradients(expected, seed)
        exact = norm_of(mine)
        a.step()
        torch.nn.utils.clip_grad_norm_(expected, 1.0)
        b.step()
        assert norm_of(mine) == exact  # .grad stays as it is
        assert a.grad_norm.dtype == torch.float32 and a.grad_norm.shape == ()
        assert float(a.grad_norm) == pytest.approx(exact, rel=1e-6)
        assert b.grad_norm is None and not bool(a.skipped)
    tolerance = 1e-10 if dtype == torch.float64 and MODE == "cpu" else 1e-6
    assert_close(mine, expected, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_have_an_exact_norm(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    give_gradients(params, 0)
    optimizer = optim.SGD(params, lr=0.0, max_grad_norm=1.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(norm_of(params), rel=1e-6)


@pytest.mark.parametrize("accumulation", ["mean", "sum"])
@pytest.mark.parametrize("name", ["AdamW", "CAG"])
def test_the_accumulated_gradient_is_clipped(name: str, accumulation: str) -> None:
    options = {"CAG": {"momentum": 0.9}, "AdamW": {"accumulation_steps": 4}}[name]
    mine, expected = parameters(), parameters()
    a = make(name, mine, lr=0.1, accumulation=accumulation, max_grad_norm=0.5, **options)
    b = make(name, expected, lr=0.1, **{**options, "accumulation_steps": 1})
    for window in range(2):
        sums: list[Any] = [None] * len(mine)
        for j in range(4):
            give_gradients(mine, 10 * window + j)
            sums = [
                s if p.grad is None else p.grad.clone() if s is None else s + p.grad
                for s, p in zip(sums, mine, strict=True)
            ]
            a.step()
            assert (a.grad_norm is None) == (j < 3)
        for p, total in zip(expected, sums, strict=True):
            p.grad = total if total is None or accumulation == "sum" else total / 4
        assert float(a.grad_norm) == pytest.approx(norm_of(expected), rel=1e-5)
        torch.nn.utils.clip_grad_norm_(expected, 0.5)
        b.step()
    assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_norm_that_is_not_finite(bad: float, flags: dict[str, bool]) -> None:
    mine, expected = parameters(), parameters()
    before = copy.deepcopy(mine)
    strict = optim.SGD(mine, momentum=0.9, max_grad_norm=1.0, error_if_nonfinite=True, **flags)
    usual = optim.SGD(mine, momentum=0.9, max_grad_norm=1.0, **flags)
    reference = torch.optim.SGD(expected, momentum=0.9)
    for params in (mine, expected):
        give_gradients(params, 0)
        params[5].grad[16000] = bad  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"not finite|non-finite"):
        strict.step()
    assert not strict.state and strict.updated is False
    assert_close(mine, before, rtol=0, atol=0)
    usual.step()
    assert not bool(usual.skipped)
    torch.nn.utils.clip_grad_norm_(expected, 1.0)
    reference.step()
    for p, q in zip(mine, expected, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


def test_squares_beyond_fp32_have_a_norm() -> None:
    params = parameters()
    give_gradients(params, 0, scale=1e30)
    before = [p.detach().clone() for p in params]
    optimizer = optim.SGD(params, lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(norm_of(params), rel=1e-6)
    moved = math.sqrt(
        sum(float((p - b).double().pow(2).sum()) for p, b in zip(params, before, strict=True))
    )
    assert moved == pytest.approx(1.0, rel=1e-4)


def test_the_norm_is_written_into_the_same_tensor() -> None:
    params = parameters()
    optimizer = optim.AdamW(params, max_grad_norm=math.inf)
    seen = []
    for seed in range(2):
        give_gradients(params, seed)
        optimizer.step()
        seen.append(optimizer.grad_norm)
    assert seen[0] is not None and seen[1] is not None
    assert seen[0].data_ptr() == seen[1].data_ptr()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm is None  # there was nothing to measure


@pytest.mark.cpu_only("instruction sets are the CPU's")
def test_same_bits_for_any_number_of_threads_and_every_instruction_set() -> None:
    threads, chosen = torch.get_num_threads(), _C.instruction_set()
    found = []
    try:
        for isa, count in itertools.product(_C.available_instruction_sets(), (1, 2, 3)):
            torch.set_num_threads(count)
            _C.set_instruction_set(isa)
            params = [Parameter(torch.ones(50_001)) for _ in range(3)]
            optimizer = optim.AdamW(params, max_grad_norm=1.0, ema_decay=0.9)
            optimizer.collect_grad_stats = True
            for seed in range(3):
                give_gradients([*params, params[0]], seed)
                optimizer.step()
            stats = [tuple(s) for s in optimizer.grad_stats().values()]
            averages = [optimizer.state[p]["ema"] for p in params]
            found.append((stats, [float(optimizer.grad_norm)], [*params, *averages]))
    finally:
        torch.set_num_threads(threads)
        _C.set_instruction_set(chosen)
    for stats, norm, tensors in found[1:]:
        assert (stats, norm) == found[0][:2]
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0][2], strict=True))


def test_sparse_gradients_are_clipped_by_torch() -> None:
    def trained(cls: Any, clips: bool) -> Tensor:
        torch.manual_seed(0)
        table = nn.Embedding(10, 3, sparse=True)
        optimizer = cls(table.parameters(), lr=1.0, **({"max_grad_norm": 0.5} if clips else {}))
        (table(torch.tensor([1, 2, 2])) * 5).sum().backward()
        if not clips:
            grad = table.weight.grad.coalesce()  # type: ignore[union-attr]
            table.weight.grad = grad * (0.5 / (grad.values().norm() + 1e-6))
        else:
            norm = float(table.weight.grad.coalesce().values().norm())  # type: ignore[union-attr]
        optimizer.step()
        if clips:
            assert float(optimizer.grad_norm) == pytest.approx(norm)
        return table.weight.detach()

    torch.testing.assert_close(trained(optim.SGD, True), trained(torch.optim.SGD, False))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm.*-1"),
        ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm.*nan"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm.*str"),
        ({"max_grad_norm": True}, TypeError, "max_grad_norm.*bool"),
        ({"error_if_nonfinite": 1, "max_grad_norm": 1.0}, TypeError, "error_if_nonfinite.*int"),
        ({"error_if_nonfinite": True}, ValueError, "needs max_grad_norm"),
        ({"ema_decay": 1.5}, ValueError, "ema_decay.*1.5"),
        ({"ema_decay": "x"}, TypeError, "ema_decay.*str"),
        ({"ema_warmup": True}, ValueError, "needs ema_decay"),
        ({"ema_warmup": 1, "ema_decay": 0.9}, TypeError, "ema_warmup.*int"),
    ],
)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Lion", "CAG"])
def test_bad_arguments(name: str, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(name, parameters(), **given)


def test_bad_values_that_are_set_later() -> None:
    params = parameters()
    give_gradients(params, 0)
    optimizer = optim.SGD(params, max_grad_norm=1.0)
    before = copy.deepcopy(params)
    optimizer.max_grad_norm = -3.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()
    optimizer.max_grad_norm = None
    optimizer.ema_decay = lambda updates: 2.0
    with pytest.raises(ValueError, match="ema_decay"):
        optimizer.step()
    assert_close(params, before, rtol=0, atol=0)


# ---------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_statistics(dtype: torch.dtype, max_norm: float | None) -> None:
    params = parameters(dtype)
    optimizer = optim.AdamW(params, lr=0.01, max_grad_norm=max_norm)
    give_gradients(params, 0)
    optimizer.step()
    assert optimizer.grad_stats() == {}  # off by default
    optimizer.collect_grad_stats = True
    give_gradients(params, 1)
    params[3].grad[0, :5] = 0.0  # type: ignore[index]
    before = [p.detach().double().clone() for p in params]
    optimizer.step()
    stats = optimizer.grad_stats()
    assert list(stats) == params[:-1]
    for p, old in zip(params[:-1], before, strict=False):
        grad, found = p.grad.double(), stats[p]  # type: ignore[union-attr]
        assert found.norm == pytest.approx(float(grad.norm()), rel=1e-6)
        assert found.largest == pytest.approx(
            float(grad.abs().max()) if p.numel() else 0.0, rel=1e-6
        )
        assert found.zeros == pytest.approx(
            float((grad == 0).double().mean()) if p.numel() else 0.0
        )
        assert found.non_finite == 0
        change = float((p.double() - old).norm()) / float(old.norm()) if p.numel() else math.nan
        assert found.update_ratio == pytest.approx(change, rel=1e-3, nan_ok=True)
    assert stats[params[3]].zeros > 0
    give_gradients(params, 2)
    params[5].grad[[3, 7000, 16389]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)  # type: ignore[index]
    params[7].grad[1, 2, 3, 1] = math.nan  # type: ignore[index]
    optimizer.step()
    stats = optimizer.grad_stats()
    assert stats[params[5]].non_finite == 3 and math.isinf(stats[params[5]].largest)
    assert stats[params[7]].non_finite == 1 and not math.isfinite(stats[params[7]].norm)
    assert stats[params[3]].non_finite == 0 and math.isfinite(stats[params[3]].norm)
    optimizer.collect_grad_stats = False
    give_gradients(params, 3)
    optimizer.step()
    assert optimizer.grad_stats() == {}


def test_statistics_of_a_window_are_of_the_accumulated_gradient() -> None:
    p = Parameter(torch.zeros(20))
    optimizer = optim.CAG([p], lr=1.0, accumulation_steps=2, momentum=0.9)
    optimizer.collect_grad_stats = True
    for value in (1.0, 2.0):
        p.grad = torch.full((20,), value)
        optimizer.step()
    assert optimizer.grad_stats()[p].largest == 3.0
