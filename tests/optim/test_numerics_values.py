"""Rounding to 16 bits, special values, and hyper-parameters at their limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from braze import optim
from braze._native import _C
from reference import Flags, magnitudes, optimizer_step, same_bits, ulp_distance
from test_numerics import CASES, DTYPES, case_id, make_optimizer
from torch import Tensor
from torch.nn import Parameter

SHORT = (torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.available_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.instruction_set()
    assert _C.set_instruction_set(request.param)
    yield request.param
    assert _C.set_instruction_set(before)


def every_short(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def around_ties(dtype: torch.dtype) -> Tensor:
    """fp32 values at, next to and between all 16-bit values and their midpoints, and beyond."""
    if dtype == torch.bfloat16:
        upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
        lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        patterns = (upper[:, None] | lower[None, :]).reshape(-1)
    else:
        # An fp16 midpoint has one bit more than fp16, so it and its neighbours are exact in fp32.
        exact = every_short(dtype)
        exact = exact[exact.isfinite() & (exact >= 0)].float().sort().values
        beyond = torch.tensor([65519.0, 65520.0, 65521.0, 65536.0, 1e6, 3e38])
        points = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, beyond])
        points = torch.cat([points, -points])
        neighbours = torch.tensor([-1, 0, 1], dtype=torch.int32)
        patterns = (points.view(torch.int32)[:, None] + neighbours[None, :]).reshape(-1)
    generator = torch.Generator().manual_seed(5)
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    return torch.cat([patterns, random]).view(torch.float32)


@pytest.mark.parametrize("dtype", SHORT, ids=case_id)
def test_stores_round_to_nearest_even(dtype: torch.dtype, instruction_set: str) -> None:
    """0 - 1 * (-x) is x exactly in fp32, so what is stored is the kernel's rounding of x."""
    x = around_ties(dtype)
    p = Parameter(torch.zeros(x.numel(), dtype=dtype))
    p.grad_dtype = torch.float32
    p.grad = -x
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5, maximize=False)
    optimizer.step()
    want = x.to(dtype)
    # 0 - 0 is +0, whatever the sign of x.
    want_param = torch.where(x == 0, torch.zeros_like(want), want)
    assert same_bits(p.detach(), want_param)
    assert same_bits(optimizer.state[p]["momentum_buffer"], -want)
    assert bool((want.isinf() & x.isfinite()).any())
    assert bool(((want != 0) & (want.abs() < torch.finfo(dtype).tiny)).any())


@pytest.mark.parametrize("dtype", SHORT, ids=case_id)
def test_stores_of_short_operands_round_to_nearest_even(
    dtype: torch.dtype, instruction_set: str
) -> None:
    """The loop for operands that are all 16-bit: p - g is rounded once in fp32 and once more in storing."""
    generator = torch.Generator().manual_seed(6)
    patterns = every_short(dtype)
    a = patterns[torch.randperm(patterns.numel(), generator=generator)].repeat(4)
    # Half of the pairs have close exponents: their difference has bits to round away.
    near = (a.view(torch.int16).to(torch.int32) + torch.arange(a.numel()) % 1500 - 750) % 2**16
    near = torch.where(near >= 2**15, near - 2**16, near).to(torch.int16).view(dtype)
    far = patterns[torch.randint(0, patterns.numel(), (a.numel(),), generator=generator)]
    b = torch.where(torch.arange(a.numel()) % 2 == 0, near, far)
    p = Parameter(a.clone())
    p.grad = b
    optim.SGD([p], lr=1.0).step()
    assert same_bits(p.detach(), (a.float() - b.float()).to(dtype))


@pytest.mark.parametrize("dtype", SHORT, ids=case_id)
def test_loads_are_exact(dtype: torch.dtype, instruction_set: str) -> None:
    x = every_short(dtype)
    p = Parameter(torch.zeros(x.numel()))
    p.grad_dtype = dtype
    p.grad = x
    optim.SGD([p], lr=1.0, maximize=True).step()
    assert same_bits(p.detach(), x.float() + 0.0)


def test_same_bits_can_tell() -> None:
    a = torch.tensor([0.0, float("nan")])
    assert same_bits(a, torch.tensor([0.0, -float("nan")]))
    assert not same_bits(a, torch.tensor([-0.0, float("nan")]))
    assert not same_bits(a, a.double())


def specials(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    denormal = info.smallest_normal / 4
    values = [0.0, denormal, 3 * denormal / 2, info.smallest_normal, 0.5, 1.0, 3.0, info.max]
    values.append(float("inf"))
    return torch.tensor([*values, *(-v for v in values), float("nan")], dtype=dtype)


SPECIAL_CASES = [
    *CASES,
    ("sgd", {"lr": 0.0, "momentum": 0.9}),
    ("adam", {"lr": 0.0}),
    ("adam", {"lr": 0.01, "eps": 0.0}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("kind", "flags"), SPECIAL_CASES, ids=case_id)
def test_special_values(kind: str, flags: Flags, dtype: torch.dtype) -> None:
    """Every special value of the parameter with every one of the first and the second gradient."""
    values = specials(dtype)
    grid = list(itertools.product(values.tolist(), repeat=3))
    start, first, second = torch.tensor(grid, dtype=torch.float64).to(dtype).unbind(1)
    p = Parameter(start.clone())
    optimizer = make_optimizer(kind, [p], flags)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(arithmetic).eps
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for step, grad in ((1, first), (2, second)):
        p.grad = grad.clone()
        before = p.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state.get(p, {}).items() if k != "step"}
        optimizer.step()
        want, want_state = optimizer_step(kind, before, grad, state, arithmetic, step, flags)
        scale, scales = magnitudes(kind, before, grad, state, step, flags)
        results = [("parameter", p.detach(), want, scale)]
        results += [(k, optimizer.state[p][k], want_state[k], scales[k]) for k in want_state]
        for what, got, expected, bound in results:
            error = (got.double() - expected.double()).abs()
            good = ulp_distance(got, expected) <= 2
            good |= error <= 8 * eps * bound.nan_to_num() + 2 * least
            good &= got.isnan() == expected.isnan()
            good &= got.isinf() == expected.isinf()
            if not bool(good.all()):
                i = int((~good).nonzero()[0])
                raise AssertionError(
                    f"{what}, step {step}: {int((~good).sum())} wrong; p {before[i].item()!r}, "
                    f"grads {first[i].item()!r} {second[i].item()!r}, "
                    f"state { {k: v[i].item() for k, v in state.items()} }: "
                    f"got {got[i].item()!r}, want {expected[i].item()!r}"
                )


def test_amsgrad_keeps_nan() -> None:
    """A NaN second moment enters the maximum and stays there, whichever side it is on."""
    p = Parameter(torch.ones(40))
    p.grad = torch.ones(40)
    optimizer = optim.Adam([p], lr=0.1, amsgrad=True)
    optimizer.step()
    entry = optimizer.state[p]
    entry["exp_avg_sq"][3] = float("nan")
    entry["max_exp_avg_sq"][20] = float("nan")
    optimizer.step()
    want = torch.zeros(40, dtype=torch.bool)
    want[[3, 20]] = True
    assert torch.equal(entry["max_exp_avg_sq"].isnan(), want)
    assert torch.equal(p.detach().isnan(), want)


@pytest.mark.parametrize("start", [0.0, 1.0, 1e7, 2.0**24 - 1, 2.0**24, 2.0**24 + 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
def test_step_counts(start: float, dtype: torch.dtype) -> None:
    """Far into training, where an fp32 counter no longer counts, results still equal torch's."""
    ours, theirs = (Parameter(torch.linspace(-1, 1, 50, dtype=dtype)) for _ in range(2))
    mine = optim.Adam([ours], lr=0.01, betas=(0.9, 0.9999999))
    model = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.9999999), foreach=False)
    for step in range(3):
        for p, optimizer in ((ours, mine), (theirs, model)):
            p.grad = torch.linspace(1, 2, 50, dtype=dtype)
            optimizer.step()
            if step == 0:
                optimizer.state[p]["step"].fill_(start)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=4e-6, atol=1e-7)
    assert torch.equal(mine.state[ours]["step"], model.state[theirs]["step"])


def test_float64_step_counter() -> None:
    p = Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = optim.Adam([p])
    optimizer.step()
    optimizer.state[p]["step"] = torch.tensor(2.0**24, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 2.0**24 + 1


def test_lr_zero_leaves_parameters_alone_and_moves_state() -> None:
    generator = torch.Generator().manual_seed(7)
    for kind, flags in CASES:
        p = Parameter(torch.randn(1000, generator=generator))
        start = p.detach().clone()
        p.grad = torch.randn(1000, generator=generator)
        optimizer = make_optimizer(kind, [p], dict(flags, lr=0.0))
        optimizer.step()
        assert torch.equal(p.detach(), start)
        for key, value in optimizer.state.get(p, {}).items():
            assert bool((value != 0).any()), key


def test_sign_of_zero_is_zero() -> None:
    for name in ("SGD", "Adam", "AdamW"):
        p = Parameter(torch.tensor([0.0, -0.0, 2.0, -2.0]))
        p.grad = torch.zeros(4)
        getattr(optim, name)([p], lr=0.1, l1=0.5, weight_decay=0.0).step()
        assert p.detach()[:2].tolist() == [0.0, 0.0]
        assert 0 < float(p.detach()[2]) < 2.0
        assert -2.0 < float(p.detach()[3]) < 0
