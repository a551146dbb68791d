"""Dropout on a device against the CPU: the same masks and bits, one launch, graphs, streams, other devices."""

from __future__ import annotations

from collections.abc import Callable

import devices
import pytest
import torch
from braze._native import _C
from braze.nn import _dropout_functional as functional
from devices import CPU, Device, assert_same, values
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE = [-12345678901234, 8]


def outputs(place: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """With the mask of one seed and offset: generators differ between devices."""
    state = torch.tensor(STATE, device=place)
    found = []

    def apply(x: Tensor, alpha: bool = False, feature: bool = False) -> None:
        for gradient in (False, True):
            found.append(_C.dropout_apply(x, state, 0.3, alpha, feature, gradient))

    for numel in (1, 7, 8, 9, 255, 256, 257, 2047, 8191, 8192, 8193, 20001):
        long = values((numel + 3,), numel, dtype).to(place)
        for offset in (0, 1, 3):  # off 16 bytes, in every dtype
            apply(long[offset : offset + numel])
            apply(long[offset : offset + numel], alpha=True)
    for shape in (
        (3, 5, 7, 9),
        (2, 3, 64, 64),
        (1, 17, 1, 3),
        (4, 1, 5, 5),
        (5, 3, 1, 1),
        (2, 600, 3, 3),
    ):
        x = values(shape, 1, dtype).to(place)
        for t in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3)):
            apply(t)
            apply(t, feature=True)
            apply(t, alpha=True, feature=True)
    saved, grad = values((3001,), 2, dtype).to(place), values((3001,), 3, dtype).to(place)
    for name in functional.ACTIVATIONS:
        # Functions of double are each machine's own.
        if dtype != torch.float64 or name in (
            "identity",
            "relu",
            "relu6",
            "leaky_relu",
            "hardswish",
            "hardsigmoid",
        ):
            found.append(torch.ops.braze.act_dropout_backward(grad, saved, state, 0.3, name, 0.5))
    return [t.cpu() for t in found]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_cpu(device: Device, dtype: torch.dtype) -> None:
    devices.same_on_both(device, lambda place: outputs(place, dtype))


def test_forward_uses_the_mask_that_it_reports(device: Device) -> None:
    with device.on():
        x = values((3000,), 4).to(device.place)
        for call in (
            lambda: _C.dropout(x, 0.4, False, False, None, None),
            lambda: _C.dropout(x, 0.4, True, False, None, None),
            lambda: _C.dropout_add(x, torch.zeros_like(x), 0.4, None, None),
            lambda: _C.act_dropout(x, 0.4, "identity", 0.0, None, None),
        ):
            y, state = call()
            seed, offset = state.tolist()
            mask = functional.dropout_mask(3000, 0.4, seed, offset, device.place)
            again = _C.dropout_apply(x, state, 0.4, False, False, False)
            if call.__code__.co_names[:2] != ("_C", "dropout"):
                assert_same([y.cpu() + 0.0], [again.cpu() + 0.0])
            assert torch.equal(mask, again != 0)
        before = x.clone()
        state = _C.dropout_(x, 0.4, False, False, None)
        assert_same([x.cpu()], [_C.dropout_apply(before, state, 0.4, False, False, False).cpu()])
    with device.off():
        want = functional.dropout_mask(3000, 0.4, seed, offset, CPU)
    assert torch.equal(mask.cpu(), want)


def test_seeds_and_calls(device: Device) -> None:
    with device.on():
        x = torch.ones(4096, device=device.place)
        torch.manual_seed(1)
        first, second = functional.dropout(x, 0.5), functional.dropout(x, 0.5)
        torch.manual_seed(1)
        assert torch.equal(first, functional.dropout(x, 0.5))
        assert not torch.equal(first, second)


@pytest.mark.emulated_only("counts the emulator's launches")
def test_one_launch_per_call(device: Device) -> None:
    with device.on():
        x = values((50_000,), 5).to(device.place).requires_grad_()
        results: list[Tensor] = []
        calls: list[Callable[[], object]] = [
            lambda: results.append(functional.dropout(x, 0.5)),
            lambda: results[-1].backward(torch.ones_like(x)),
            lambda: functional.act_dropout(x, "gelu", 0.5),
            lambda: functional.dropout_add(x, x, 0.5),
            lambda: functional.dropout(x.detach(), 0.5, inplace=True),
        ]
        assert [device.launches(call) for call in calls] == [1] * len(calls)


def test_captured_graph_draws_anew(device: Device) -> None:
    with device.on():
        x = torch.ones(20_000, device=device.place)
        kept: list[Tensor] = []  # alive as long as the graph

        def work() -> None:
            for _ in range(2):
                out, state = _C.dropout(x, 0.5, False, False, None, None)
                kept.extend((out, state, _C.dropout_apply(x, state, 0.5, False, False, True)))

        torch.manual_seed(0)
        work()  # warm-up
        kept.clear()
        graph = device.capture(work)
        masks = []
        for _ in range(3):
            graph.replay()
            device.synchronize()
            for out, state, grad in (kept[:3], kept[3:]):
                assert torch.equal(out, grad)
                seed, offset = state.tolist()
                mask = functional.dropout_mask(20_000, 0.5, seed, offset, device.place)
                assert torch.equal(out != 0, mask)
                masks.append(mask.cpu())
        assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.emulated_only("puts memory on a second device")
def test_second_device(device: Device) -> None:
    assert isinstance(device, devices.EmulatedDevice)
    x = values((5000,), 6)
    with device.on():
        device.module.place(x.data_ptr(), x.numel() * 4, 1)
        before = [device.module.launch_count(i) for i in range(2)]
        functional.dropout(x, 0.5)
        after = [device.module.launch_count(i) for i in range(2)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 1]


@pytest.mark.emulated_only("steers the emulator's schedule")
@pytest.mark.parametrize("order", ("reverse", "random", "pct"))
def test_schedules(device: Device, order: str) -> None:
    assert isinstance(device, devices.EmulatedDevice)
    with device.off():
        want = outputs(CPU, torch.bfloat16)
    with device.on(), device.schedule(order, 3):
        assert_same(outputs(CPU, torch.bfloat16), want)
