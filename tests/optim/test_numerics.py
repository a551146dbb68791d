"""Every flag and dtype, at the sizes where kernels change their way, against the formulas.

Each step is judged by itself, from the values that the optimizer really stored before it, so
rounding errors do not add up and the bounds stay tight.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from braze import optim
from reference import Flags, State, magnitudes, optimizer_step, ulp_distance
from torch import Tensor
from torch.nn import Parameter

SIZES = (0, 1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097)
SIZES += (16383, 16384, 16385, 65535, 65536, 65537)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STEPS = 3
# A step has at most 8 roundings on the way to any one result (two penalties, scaling, two products
# and sums, root, division, update), each half an epsilon of the sum of the terms' absolute values.
# The fp64 reference rounds too.
ROUNDINGS = {torch.float64: 8.0, torch.float32: 4.0}

SGD_FLAGS: list[Flags] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"weight_decay": 0.01, "maximize": True},
    {"momentum": 0.9, "maximize": True, "l1": 0.01},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True, "l1": 0.02},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "l1": 0.02},
]
ADAM_FLAGS: list[Flags] = [
    {},
    {"amsgrad": True, "weight_decay": 0.01},
    {"maximize": True, "l1": 0.01},
    {"decoupled": True, "weight_decay": 0.1},
    {"decoupled": True, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    {"weight_decay": 0.01, "l1": 0.02, "eps": 1e-3},
    {"decoupled": True, "weight_decay": 0.1, "l1": 0.01, "maximize": True, "amsgrad": True},
    {"amsgrad": True, "l1": 0.01, "weight_decay": 0.01, "maximize": True},
    {"betas": (0.0, 0.9)},
    {"betas": (0.5, 0.0), "eps": 1e-2},
]
CASES = [("sgd", dict(flags, lr=0.1)) for flags in SGD_FLAGS]
CASES += [("adam", dict(flags, lr=0.01)) for flags in ADAM_FLAGS]


def case_id(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items() if k != "lr") or "plain"
    return str(value).removeprefix("torch.")


def make_optimizer(kind: str, params: Any, flags: Flags) -> Any:
    if kind == "sgd":
        return optim.SGD(params, **flags)
    renamed = {k: v for k, v in flags.items() if k != "decoupled"}
    if flags.get("decoupled"):
        return optim.AdamW(params, **renamed)
    return optim.Adam(params, **renamed)


def make_parameters(
    dtype: torch.dtype, generator: torch.Generator, sizes: tuple[int, ...] = SIZES
) -> list[Parameter]:
    params = []
    for size in sizes:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        # sign(0) is 0, and kernels must not take it for positive.
        values[::7] = 0.0
        params.append(Parameter(values.to(dtype)))
    return params


def set_gradients(params: list[Parameter], generator: torch.Generator) -> None:
    for p in params:
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = values.to(p.grad_dtype or p.dtype)


def flat_state(optimizer: Any, params: list[Parameter]) -> State:
    entries = [optimizer.state[p] for p in params if p in optimizer.state]
    keys = [k for k in (entries[0] if entries else {}) if k != "step"]
    return {key: torch.cat([entry[key].reshape(-1) for entry in entries]) for key in keys}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def assert_close(
    got: Tensor, want: Tensor, scale: Tensor, what: str, arithmetic: torch.dtype | None = None
) -> None:
    """``scale`` is the sum of the absolute values of the terms of this element; ``arithmetic`` what
    the kernel computes in, by default the tensors' dtype."""
    if got.dtype in ROUNDINGS:
        precision = max(arithmetic or got.dtype, got.dtype, key=lambda d: torch.finfo(d).eps)
        good = (got.double() - want.double()).abs() <= (
            ROUNDINGS[precision] * torch.finfo(precision).eps * scale
        )
    else:
        # The last rounding may fall to the other side; where terms cancel, fp32's own error shows.
        slack = 4.0 * torch.finfo(torch.float32).eps * scale
        good = (ulp_distance(got, want) <= 1) | ((got.double() - want.double()).abs() <= slack)
    if not bool(good.all()):
        i = int((~good).nonzero()[0])
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} wrong, first at {i}: "
            f"got {got[i].item()!r}, want {want[i].item()!r}, scale {scale[i].item()!r}"
        )


def check_step(kind: str, flags: Flags, optimizer: Any, params: list[Parameter], step: int) -> None:
    """One step of ``optimizer`` on parameters of one dtype against the formula."""
    before, grads = flat(params), flat(p.grad for p in params)
    state = flat_state(optimizer, params)
    kept_grads = grads.clone()
    optimizer.step()
    dtype = before.dtype
    arithmetic = torch.float64 if dtype in ROUNDINGS else torch.float32
    kernel = torch.float64 if dtype == torch.float64 else torch.float32
    want, want_state = optimizer_step(kind, before, grads, state, arithmetic, step, flags)
    scale, state_scales = magnitudes(kind, before, grads, state, step, flags)
    assert_close(flat(params), want, scale, f"parameter, step {step}")
    got_state = flat_state(optimizer, params)
    assert got_state.keys() == want_state.keys()
    for key, value in got_state.items():
        assert_close(value, want_state[key], state_scales[key], f"{key}, step {step}", kernel)
    assert torch.equal(flat(p.grad for p in params), kept_grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("kind", "flags"), CASES, ids=case_id)
def test_all_sizes(kind: str, flags: Flags, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    params = make_parameters(dtype, generator)
    optimizer = make_optimizer(kind, params, flags)
    for step in range(1, STEPS + 1):
        set_gradients(params, generator)
        check_step(kind, flags, optimizer, params, step)
    if kind == "adam":
        assert {float(optimizer.state[p]["step"]) for p in params} == {float(STEPS)}


@pytest.mark.parametrize(("kind", "flags"), [CASES[2], CASES[12]], ids=case_id)
def test_dtypes_mixed_in_one_group(kind: str, flags: Flags) -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = (3, 17, 100, 40000)
    by_dtype = {dtype: make_parameters(dtype, generator, sizes) for dtype in DTYPES}
    interleaved = [p for row in zip(*by_dtype.values(), strict=True) for p in row]
    optimizer = make_optimizer(kind, interleaved, flags)
    for step in range(1, STEPS + 1):
        set_gradients(interleaved, generator)
        inputs = {
            dtype: (flat(ps), flat(p.grad for p in ps), flat_state(optimizer, ps))
            for dtype, ps in by_dtype.items()
        }
        optimizer.step()
        for dtype, params in by_dtype.items():
            arithmetic = torch.float64 if dtype in ROUNDINGS else torch.float32
            want, _ = optimizer_step(kind, *inputs[dtype], arithmetic, step, flags)
            scale, _ = magnitudes(kind, *inputs[dtype], step, flags)
            assert_close(flat(params), want, scale, f"{dtype}, step {step}")


OTHER_DTYPES = [
    # parameter, gradient, state
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64),
    (torch.bfloat16, torch.float16, torch.bfloat16),
    (torch.float16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.float16, torch.float16),
    (torch.float32, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float64),
    (torch.float64, torch.bfloat16, torch.float32),
    (torch.float64, torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize(("dtype", "grad_dtype", "state_dtype"), OTHER_DTYPES, ids=case_id)
@pytest.mark.parametrize(("kind", "flags"), [CASES[2], CASES[11], CASES[12]], ids=case_id)
def test_gradient_and_state_of_another_dtype(
    kind: str,
    flags: Flags,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_dtype: torch.dtype,
    strided: bool,
) -> None:
    generator = torch.Generator().manual_seed(3)
    # 600: more than one tile of the converting loops.
    params = make_parameters(dtype, generator, (0, 1, 15, 17, 600, 5000))
    if strided:
        params = [Parameter(p.detach().repeat_interleave(2)[::2]) for p in params]
    for p in params:
        p.grad_dtype = grad_dtype
    optimizer = make_optimizer(kind, params, flags)
    for step in range(1, STEPS + 1):
        set_gradients(params, generator)
        assert all(p.grad is not None and p.grad.dtype == grad_dtype for p in params)
        check_step(kind, flags, optimizer, params, step)
        if step == 1:
            for entry in optimizer.state.values():
                for key in entry.keys() - {"step"}:
                    entry[key] = entry[key].to(state_dtype)
    assert all(
        value.dtype == state_dtype
        for entry in optimizer.state.values()
        for key, value in entry.items()
        if key != "step"
    )


COMPLEX_CASES: list[tuple[str, Flags]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=case_id)
@pytest.mark.parametrize(("name", "flags"), COMPLEX_CASES, ids=case_id)
def test_complex_equals_torch(name: str, flags: Flags, dtype: torch.dtype) -> None:
    """torch's for-loop in double precision; a lazily conjugated gradient is among the gradients."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((), (1,), (7,), (33, 5), (4, 1, 6))
    start = [torch.randn(s, generator=generator, dtype=torch.complex128) for s in shapes]
    ours = [Parameter(t.to(dtype)) for t in start]
    theirs = [Parameter(p.detach().to(torch.complex128, copy=True)) for p in ours]
    mine = getattr(optim, name)(ours, **flags)
    model = getattr(torch.optim, name)(theirs, **flags, foreach=False)
    for _ in range(STEPS):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.complex128).to(dtype)
            p.grad = grad.conj() if i % 2 else grad
            q.grad = p.grad.resolve_conj().to(torch.complex128)
        mine.step()
        model.step()
    assert mine._plan.rebuilds == 1
    tolerance = 64 * torch.finfo(dtype).eps
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            p.detach().to(torch.complex128), q.detach(), rtol=tolerance, atol=tolerance
        )
        for key, value in model.state[q].items():
            torch.testing.assert_close(
                mine.state[p][key].to(value.dtype), value, rtol=tolerance, atol=tolerance
            )


def test_complex_l1_acts_on_each_part() -> None:
    start = torch.tensor([1 + 0j, -2 + 3j, 0 - 1j, 0j], dtype=torch.complex128)
    p = Parameter(start.clone())
    p.grad = torch.zeros_like(start)
    optim.SGD([p], lr=1.0, l1=0.25).step()
    want = torch.tensor([0.75 + 0j, -1.75 + 2.75j, 0 - 0.75j, 0j], dtype=torch.complex128)
    assert torch.equal(p.detach(), want)


def test_comparison_sees_a_wrong_step() -> None:
    """The bounds reject one 16-bit unit too many and an fp32 error in the sixth digit."""
    p = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    scale = p.double()
    assert_close(p, torch.tensor([1.0078125, 2.0], dtype=torch.bfloat16), scale, "one unit")
    with pytest.raises(AssertionError, match="1 of 2 wrong, first at 0"):
        assert_close(p, torch.tensor([1.015625, 2.0], dtype=torch.bfloat16), scale, "two units")
    with pytest.raises(AssertionError, match="first at 1"):
        assert_close(p.float(), torch.tensor([1.0, 2.000003]), scale, "fp32")
    with pytest.raises(AssertionError):
        assert_close(p, torch.tensor([float("nan"), 2.0], dtype=torch.bfloat16), scale, "NaN")
