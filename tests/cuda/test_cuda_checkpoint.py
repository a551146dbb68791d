"""Where the step counts of a CUDA step are, and checkpoints between torch, braze, the CPU and the device."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from braze import optim
from devices import CPU, Device, EmulatedDevice, assert_same, everything, same_on_both, values
from torch import Tensor
from torch.nn import Parameter

SHAPES = ((5,), (3, 4), (), (300,))
FLAGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "fused capturable": {"fused": True, "capturable": True},
}
EACH = pytest.mark.parametrize("name", ["Adam", "AdamW"])
EACH_FLAGS = pytest.mark.parametrize("flags", FLAGS)


def make(library: Any, name: str, flags: str, where: torch.device) -> Any:
    params = [Parameter(values(s, i).to(where)) for i, s in enumerate(SHAPES)]
    return getattr(library, name)(params, lr=0.1, **FLAGS[flags])


def params_of(optimizer: Any) -> list[Parameter]:
    return list(optimizer.param_groups[0]["params"])


def train(optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        for i, p in enumerate(params_of(optimizer)):
            p.grad = values(p.shape, 100 * seed + i).to(p.device)
        optimizer.step()


def uninterrupted(name: str, steps: int) -> list[Tensor]:
    optimizer = make(optim, name, "plain", CPU)
    train(optimizer, range(steps))
    return everything(optimizer)


def counts_on_device(device: Device, optimizer: Any) -> bool:
    """Seen in one more step: the CPU's count advances at once, the device's when the kernel runs."""
    p = params_of(optimizer)[0]
    if not isinstance(device, EmulatedDevice):
        return bool(optimizer.state[p]["step"].is_cuda)
    before = float(optimizer.state[p]["step"])
    with device.stream():
        device.module.set_deferred(True)
        try:
            optimizer.step()
            return float(optimizer.state[p]["step"]) == before
        finally:
            device.synchronize()
            device.module.set_deferred(False)


@EACH
@EACH_FLAGS
def test_where_the_counts_are(device: Device, name: str, flags: str) -> None:
    with device.on():
        optimizer = make(optim, name, flags, device.place)
        train(optimizer, range(2))
        assert counts_on_device(device, optimizer) is (flags != "plain")
        for entry in optimizer.state.values():
            assert entry["step"].dtype is torch.float32
            assert entry["step"].shape == ()


@EACH
@EACH_FLAGS
def test_keys_are_torchs(device: Device, name: str, flags: str) -> None:
    with device.on():
        mine = make(optim, name, flags, device.place)
        theirs = make(torch.optim, name, flags, device.place)
        train(mine, range(1))
        theirs_runs = device.place.type == "cuda" or "capturable" not in flags
        if theirs_runs:
            train(theirs, range(1))
    a, b = mine.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert [list(g) for g in a["param_groups"]] == [list(g) for g in b["param_groups"]]
    assert a["state"].keys() == (b["state"].keys() if theirs_runs else set(range(len(SHAPES))))
    for key, entry in b["state"].items():
        assert list(a["state"][key]) == list(entry)
        for name_, value in entry.items():
            got = a["state"][key][name_]
            assert (got.dtype, got.shape, got.device) == (value.dtype, value.shape, value.device)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@EACH
@pytest.mark.parametrize("target", FLAGS)
@pytest.mark.parametrize("source", FLAGS)
@pytest.mark.parametrize("moved", ["stays", "from CPU", "to CPU"])
def test_resumes_bit_for_bit(
    device: Device, name: str, source: str, target: str, moved: str
) -> None:
    """Whatever kept the counts before and keeps them now, on the device or the CPU."""
    first = CPU if moved == "from CPU" else device.place
    second = CPU if moved == "to CPU" else device.place
    with device.off() if moved == "from CPU" else device.on():
        before = make(optim, name, source, first)
        train(before, range(3))
        device.synchronize()
        saved = through_a_file(before.state_dict())
        kept = copy.deepcopy(saved)
    with device.off() if moved == "to CPU" else device.on():
        after = make(optim, name, target, second)
        with torch.no_grad():
            for p, q in zip(params_of(after), params_of(before), strict=True):
                p.copy_(q)
        after.load_state_dict(saved)
        train(after, range(3, 6))
        device.synchronize()
    assert_same(everything(after), uninterrupted(name, 6))
    for key, entry in saved["state"].items():  # the caller's tensors were copied
        assert_same(list(entry.values()), list(kept["state"][key].values()))


@EACH
@pytest.mark.parametrize("direction", ["torch to braze", "braze to torch"])
@EACH_FLAGS
def test_torchs_checkpoints(device: Device, name: str, flags: str, direction: str) -> None:
    if "capturable" in flags and device.place == CPU:
        pytest.skip("torch's capturable step needs a real device")
    libraries = (torch.optim, optim) if direction.startswith("torch") else (optim, torch.optim)
    with device.on():
        first = make(libraries[0], name, flags, device.place)
        train(first, range(3))
        second = make(libraries[1], name, flags, device.place)
        with torch.no_grad():
            for p, q in zip(params_of(second), params_of(first), strict=True):
                p.copy_(q)
        second.load_state_dict(first.state_dict())
        train(second, range(3, 6))
        device.synchronize()
        assert {float(e["step"]) for e in second.state.values()} == {6.0}
    want = uninterrupted(name, 6)
    # torch's capturable step corrects the bias in fp32.
    atol = 1e-5 if "capturable" in flags else 1e-6
    for a, b in zip(everything(second), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


@EACH
def test_flags_change_between_steps(device: Device, name: str) -> None:
    """The counts stay where they are; a checkpoint's flags say where new ones go, as in torch."""
    with device.on():
        optimizer = make(optim, name, "plain", device.place)
        train(optimizer, range(2))
        for seed, capturable in ((2, True), (3, False), (4, True)):
            optimizer.param_groups[0]["capturable"] = capturable
            train(optimizer, range(seed, seed + 1))
        device.synchronize()
        assert_same(everything(optimizer), uninterrupted(name, 5))


@pytest.mark.parametrize("flags", ["plain", "fused"])
@EACH
def test_counts_as_float64(device: Device, name: str, flags: str) -> None:
    """As they are under a default dtype of float64."""

    def scenario(where: torch.device) -> list[Tensor]:
        optimizer = make(optim, name, flags, where)
        train(optimizer, range(1))
        for entry in optimizer.state.values():
            entry["step"] = entry["step"].double()
        train(optimizer, range(1, 4))
        return everything(optimizer)

    same_on_both(device, scenario)


@pytest.mark.parametrize("count", [2.0**24 - 2, 1e7])
@EACH_FLAGS
def test_large_counts(device: Device, flags: str, count: float) -> None:
    def scenario(where: torch.device) -> list[Tensor]:
        optimizer = make(optim, "AdamW", flags, where)
        train(optimizer, range(1))
        for entry in optimizer.state.values():
            entry["step"].fill_(count)
        train(optimizer, range(1, 4))
        return everything(optimizer)

    same_on_both(device, scenario)


@EACH
def test_counts_that_differ(device: Device, name: str) -> None:
    """Some on the device and some on the CPU, of different ages, in one launch."""

    def scenario(where: torch.device) -> list[Tensor]:
        params = [Parameter(values((4,), i).to(where)) for i in range(6)]
        groups = [{"params": params[:3]}, {"params": params[3:], "fused": True}]
        optimizer = getattr(optim, name)(groups, lr=0.1)
        for seed in range(6):
            for i, p in enumerate(params):
                p.grad = values(p.shape, 10 * seed + i).to(where) if seed >= i else None
            if where == CPU and not device.emulated:
                optimizer.step()
            else:
                assert device.launches(optimizer.step) in (expected, None)
        return everything(optimizer)

    expected = 1
    with device.on():
        got = scenario(device.place)
    expected = 0
    with device.off():
        want = scenario(CPU)
    assert_same(got, want)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_copies_go_on_alone(device: Device, kind: str) -> None:
    with device.on():
        options = {"momentum": 0.9} if kind == "SGD" else {"fused": True}
        params = [Parameter(values(s, i).to(device.place)) for i, s in enumerate(SHAPES)]
        optimizer = getattr(optim, kind)(params, lr=0.1, **options)
        train(optimizer, range(2))
        twin = copy.deepcopy(optimizer)
        kept = everything(twin)
        train(optimizer, range(2, 4))
        assert_same(everything(twin), kept)
        train(twin, range(2, 4))
        assert_same(everything(twin), everything(optimizer))
