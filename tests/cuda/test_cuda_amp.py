"""A GradScaler's numbers in the CUDA step: read on the device where they can be, waited for elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from braze import optim
from devices import CPU, Device, assert_same, everything, same_on_both, values
from torch import Tensor
from torch.nn import Parameter

SHAPES = ((5,), (3, 4), (), (300,))
# Those whose step reads the scaler's tensors on the device from the first step on; SGD with dampening does
# from the second.
DEFERRED: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "Adam, fused": ("Adam", {"lr": 0.1, "fused": True}),
    "AdamW, capturable": ("AdamW", {"lr": 0.1, "capturable": True, "amsgrad": True}),
}
WAITING: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD, dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "AdamW": ("AdamW", {"lr": 0.1}),
}
ALL = {**DEFERRED, **WAITING}
EACH = pytest.mark.parametrize("kind", ALL)
EACH_DEFERRED = pytest.mark.parametrize("kind", DEFERRED)


def make(where: torch.device, kind: str, dtype: torch.dtype = torch.float32, **flags: Any) -> Any:
    name, options = ALL[kind]
    params = [Parameter(values(s, i, dtype).to(where)) for i, s in enumerate(SHAPES)]
    return getattr(optim, name)(params, **{**options, **flags})


def params_of(optimizer: Any) -> list[Parameter]:
    return list(optimizer.param_groups[0]["params"])


def scaled_step(optimizer: Any, seed: int, scale: float, found: float) -> None:
    """As GradScaler.step does it for an optimizer that scales by itself."""
    params = params_of(optimizer)
    for i, p in enumerate(params):
        p.grad = (values(p.shape, 100 * seed + i).to(p.dtype) * scale).to(p.device)
    where = params[0].device
    optimizer.grad_scale = torch.full((), scale, device=where)
    optimizer.found_inf = torch.full((), found, device=where)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@EACH
def test_same_bits_as_on_the_cpu(device: Device, kind: str, dtype: torch.dtype) -> None:
    def scenario(where: torch.device) -> list[Tensor]:
        optimizer = make(where, kind, dtype)
        found = []
        for seed, overflow in enumerate((0, 0, 1, 0, 1, 0)):
            scaled_step(optimizer, seed, 1024.0 / 2**seed, float(overflow))
            found.append(torch.tensor(optimizer.updated, device="cpu"))
        return [*everything(optimizer), *found]

    same_on_both(device, scenario)


@EACH
def test_an_overflow_changes_nothing(device: Device, kind: str) -> None:
    with device.on():
        optimizer = make(device.place, kind)
        scaled_step(optimizer, 0, 8.0, 0.0)
        assert optimizer.updated is True
        before = everything(optimizer)
        for seed in range(1, 4):
            scaled_step(optimizer, seed, 8.0, 1.0)
            assert optimizer.updated is False
            assert_same(everything(optimizer), before)
        scaled_step(optimizer, 4, 8.0, 0.0)
        assert optimizer.updated is True
        if "Adam" in kind:
            counts = {float(optimizer.state[p]["step"]) for p in params_of(optimizer)}
            assert counts == {2.0}


@EACH
def test_an_overflow_in_the_first_step(device: Device, kind: str) -> None:
    """Then everything is as if that step had not been, a momentum buffer included."""
    with device.on():
        optimizer, plain = make(device.place, kind), make(device.place, kind)
        scaled_step(optimizer, 9, 8.0, 1.0)
        if kind == "SGD, dampening":
            assert not optimizer.state
        for seed in range(3):
            scaled_step(optimizer, seed, 8.0, 0.0)
            scaled_step(plain, seed, 8.0, 0.0)
    assert_same(everything(optimizer), everything(plain))


@pytest.mark.emulated_only("holds work back in the emulator")
@EACH_DEFERRED
def test_nothing_is_waited_for(device: Device, kind: str) -> None:
    """The step is queued and returns; `updated` is what asks the device."""
    assert device.emulated
    with device.on():
        optimizer = make(CPU, kind)
        scaled_step(optimizer, 0, 8.0, 0.0)
        before = everything(optimizer)
        with device.stream():
            device.module.set_deferred(True)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
            optimizer.step()
            assert device.module.pending_work() > 0
            assert_same(everything(optimizer), before)
            # Read when it runs, not when it was launched.
            optimizer.found_inf.fill_(1.0)
            device.synchronize()
            assert device.module.pending_work() == 0
        assert_same(everything(optimizer), before)
        assert optimizer.updated is False


@pytest.mark.parametrize("scale", [2.0**k for k in (-3, 0, 1, 16)] + [3.0, 65537.0])
@EACH
def test_the_scale_is_divided_out_exactly(device: Device, kind: str, scale: float) -> None:
    """A power of two leaves no trace; any other leaves what it leaves on the CPU."""
    with device.on():
        scaled, plain = make(device.place, kind), make(device.place, kind)
        for seed in range(3):
            scaled_step(scaled, seed, scale, 0.0)
            scaled_step(plain, seed, 1.0, 0.0)
    close = {"rtol": 0.0, "atol": 0.0} if scale.hex().startswith("0x1.0000000000000p") else {}
    for a, b in zip(everything(scaled), everything(plain), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EACH
def test_scalars_of_any_shape_and_dtype(
    device: Device, kind: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Kernels read float32; anything else is waited for, with the same result."""
    results = []
    with device.on():
        for odd in (True, False):
            optimizer = make(device.place, kind)
            for seed in range(3):
                for i, p in enumerate(params_of(optimizer)):
                    p.grad = (values(p.shape, 100 * seed + i) * 4).to(device.place)
                kwargs = {"dtype": dtype if odd else torch.float32, "device": device.place}
                size = shape if odd else ()
                optimizer.grad_scale = torch.full(size, 4.0, **kwargs)
                optimizer.found_inf = torch.full(size, float(seed == 1), **kwargs)
                optimizer.step()
                assert optimizer.updated is (seed != 1)
            results.append(everything(optimizer))
    assert_same(*results)


@pytest.mark.parametrize("given", ["grad_scale", "found_inf"])
@EACH
def test_one_without_the_other(device: Device, kind: str, given: str) -> None:
    def scenario(where: torch.device) -> list[Tensor]:
        optimizer = make(where, kind)
        for seed in range(3):
            for i, p in enumerate(params_of(optimizer)):
                p.grad = values(p.shape, 100 * seed + i).to(where)
            setattr(optimizer, given, torch.full((), float(seed == 1) or 0.0, device=where))
            if given == "grad_scale":
                optimizer.grad_scale = torch.full((), 2.0 + seed, device=where)
            optimizer.step()
        return everything(optimizer)

    same_on_both(device, scenario)


@EACH
def test_accumulation_with_a_scaler(device: Device, kind: str) -> None:
    name, options = ALL[kind]

    def scenario(where: torch.device) -> list[Tensor]:
        params = [Parameter(values(s, i).to(where)) for i, s in enumerate(SHAPES)]
        optimizer = getattr(optim, name)(params, accumulation_steps=2, **options)
        updates = []
        for seed, overflow in enumerate((0, 1, 0, 0, 1, 0, 0)):
            scaled_step(optimizer, seed, 16.0, float(overflow))
            updates.append(optimizer.updated)
        assert updates == [False, False, True, False, False, True, False]
        return everything(optimizer)

    same_on_both(device, scenario)


@pytest.mark.parametrize("fused", [True, None])
@EACH
def test_a_real_scaler(device: Device, kind: str, fused: bool | None) -> None:
    with device.on():
        optimizer = make(device.place, kind, fused=fused)
        scaler = torch.amp.GradScaler(device.place.type, init_scale=2.0**10)
        params = params_of(optimizer)
        for seed in range(4):
            optimizer.zero_grad()
            weights = [values(p.shape, 50 + seed).to(device.place) for p in params]
            loss = sum((p * w).sum() for p, w in zip(params, weights, strict=True))
            scaler.scale(loss * (float("inf") if seed == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert optimizer.updated is (seed != 1 or not fused)
            if seed != 1:
                assert_same([p.grad for p in params], weights)
        assert scaler.get_scale() == 2.0**9
