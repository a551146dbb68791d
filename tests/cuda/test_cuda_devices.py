"""Several devices and streams, launches that fail, and the test device itself."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from braze import _native, optim
from devices import (
    APART,
    CPU,
    MODE,
    Device,
    EmulatedDevice,
    OnDevice,
    assert_same,
    everything,
    same_on_both,
    values,
)
from torch import Tensor
from torch.nn import Parameter

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("AdamW", {"lr": 0.1}),
    ("AdamW", {"lr": 0.1, "fused": True}),
    ("CAG", {"lr": 0.1, "accumulation_steps": 2}),
]
EACH = pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
NEEDS_CUDA = pytest.mark.skipif(MODE not in APART, reason="mixes CPU and CUDA tensors")


@pytest.fixture
def emulator(device: Device) -> EmulatedDevice:
    if not isinstance(device, EmulatedDevice):
        pytest.skip("steers the emulator")
    return device


def make(name: str, options: dict[str, Any], shapes: list[tuple[int, ...]]) -> Any:
    params = [Parameter(values(shape, i)) for i, shape in enumerate(shapes)]
    return getattr(optim, name)(params, **options)


def set_gradients(optimizer: Any, seed: int) -> None:
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = values(p.shape, 1000 * seed + i).to(p.device)


def put(device: EmulatedDevice, tensor: Tensor, index: int) -> None:
    storage = tensor.untyped_storage()
    device.module.place(storage.data_ptr(), storage.nbytes(), index)


# ------------------------------------------------------------------ several devices


@EACH
def test_one_launch_on_each_device(
    emulator: EmulatedDevice, name: str, options: dict[str, Any]
) -> None:
    """In any order of the parameters; the emulator refuses a launch while another device is current."""

    def scenario(where: torch.device) -> list[Tensor]:
        optimizer = make(name, options, [(5,), (3, 4), (300,), (), (7,)])
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            put(emulator, p, (0, 1, 1, 0, 1)[i])
        for seed in range(4):
            set_gradients(optimizer, seed)
            before = [emulator.module.launch_count(i) for i in range(2)]
            optimizer.step()
            after = [emulator.module.launch_count(i) for i in range(2)]
            assert [b - a for a, b in zip(before, after, strict=True)] == expected
        return everything(optimizer)

    expected = [1, 1]
    with emulator.on():
        got = scenario(CPU)
    emulator.module.clear_places()
    expected = [0, 0]
    with emulator.off():
        want = scenario(CPU)
    assert_same(got, want)


@EACH
def test_a_parameter_moves_to_another_device(
    emulator: EmulatedDevice, name: str, options: dict[str, Any]
) -> None:
    with emulator.on():
        optimizer = make(name, options, [(5,), (6,)])
        second = optimizer.param_groups[0]["params"][1]
        for seed in range(6):
            if seed == 3:
                second.data = second.data.clone()
                put(emulator, second, 1)
            set_gradients(optimizer, seed)
            assert emulator.launches(optimizer.step, 1) == int(seed >= 3)
    with emulator.off():
        want = make(name, options, [(5,), (6,)])
        for seed in range(6):
            set_gradients(want, seed)
            want.step()
    assert_same(everything(optimizer), everything(want))


@NEEDS_CUDA
@EACH
def test_two_cuda_devices(device: Device, name: str, options: dict[str, Any]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")

    def scenario(where: torch.device) -> list[Tensor]:
        places = [where, where] if where == CPU else [torch.device("cuda", i) for i in (1, 0)]
        params = [Parameter(values((300,), i).to(place)) for i, place in enumerate(places)]
        optimizer = getattr(optim, name)(params, **options)
        for seed in range(4):
            set_gradients(optimizer, seed)
            optimizer.step()
        return everything(optimizer)

    same_on_both(device, scenario)


@NEEDS_CUDA
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_parameters_on_cuda_and_cpu_and_numbers_on_the_other(
    device: Device, options: dict[str, bool]
) -> None:
    """The learning rate and the scaler's numbers stand on the CPU; so does one of the parameters."""

    def scenario(where: torch.device) -> list[Tensor]:
        params = [Parameter(values((30,), 0).to(where)), Parameter(values((40,), 1))]
        rate = torch.tensor(0.1, dtype=torch.float64, device="cpu")
        optimizer = optim.AdamW(params, lr=rate, **options)
        for seed in range(4):
            set_gradients(optimizer, seed)
            rate.fill_(0.1 / (1 + seed))
            optimizer.grad_scale = torch.tensor(4.0, device="cpu")  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(float(seed == 2), device="cpu")  # type: ignore[attr-defined]
            optimizer.step()
            assert optimizer.updated is (seed != 2)
        return everything(optimizer)

    same_on_both(device, scenario)


# ------------------------------------------------------------------ streams


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_streams_alternate_between_steps(emulator: EmulatedDevice, name: str, seed: int) -> None:
    """Steps on two streams touch different tensors, and only the optimizer's own table is shared: it must
    not be written while the other stream may still read it."""
    module, count, turns = emulator.module, 800, 8

    def scenario(streams: list[int]) -> list[Tensor]:
        optimizer = make(name, {"lr": 0.1}, [(1 + i % 3,) for i in range(count)])
        params = optimizer.param_groups[0]["params"]
        set_gradients(optimizer, 0)
        optimizer.step()
        grads = [[values(p.shape, 31 * t + i) for i, p in enumerate(params)] for t in range(turns)]
        if streams:
            module.set_deferred(True)
        for turn in range(turns):
            for i, p in enumerate(params):
                p.grad = grads[turn][i] if i % 2 == turn % 2 else None
            if streams:
                module.use_stream(0, streams[turn % 2])
            optimizer.step()
        if streams:
            assert module.pending_work() > 0
            module.synchronize()
        return everything(optimizer)

    streams = [module.new_stream(0) for _ in range(2)]
    try:
        with emulator.on(), emulator.schedule("random", seed):
            got = scenario(streams)
    finally:
        module.set_deferred(False)
        module.use_stream(0, 0)
        for stream in streams:
            module.destroy_stream(stream)
    with emulator.off():
        want = scenario([])
    assert_same(got, want)


@pytest.mark.parametrize("count", [3, 800])
def test_an_optimizer_dies_while_its_work_is_queued(emulator: EmulatedDevice, count: int) -> None:
    with emulator.on(), emulator.stream():
        optimizer = make("SGD", {"lr": 0.5}, [(2,)] * count)
        params = list(optimizer.param_groups[0]["params"])
        set_gradients(optimizer, 1)
        want = [p.detach() - 0.5 * p.grad for p in params]
        emulator.module.set_deferred(True)
        optimizer.step()
        del optimizer
        gc.collect()
        emulator.synchronize()
        torch.testing.assert_close([p.detach() for p in params], want)


# ------------------------------------------------------------------ failures


def failing_cases() -> list[Any]:
    result = []
    for name, options in KINDS:
        for trained in (False, True):
            result.append(pytest.param(name, options, trained))
    return result


@pytest.mark.parametrize(("name", "options", "trained"), failing_cases())
def test_a_launch_that_fails(
    emulator: EmulatedDevice, name: str, options: dict[str, Any], trained: bool
) -> None:
    """For the current stream is another device's. No value changes, and later steps are right."""
    before_it = (0, 1) if trained else ()
    foreign = emulator.module.new_stream(1)
    torch.use_deterministic_algorithms(True)  # which fills uninitialized memory with NaN
    try:
        with emulator.on():
            optimizer = make(name, options, [(5,), (3, 4)])
            params = optimizer.param_groups[0]["params"]
            for seed in before_it:
                set_gradients(optimizer, seed)
                optimizer.step()
            set_gradients(optimizer, 5)
            before = [p.detach().clone() for p in params]
            known = [p in optimizer.state for p in params]
            emulator.module.use_stream(0, foreign)
            message = rf"{name}: launching the step on cuda:0 failed: .*cudaError"
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
            emulator.module.use_stream(0, 0)
            assert_same([p.detach() for p in params], before)
            assert not optimizer.updated
            assert [p in optimizer.state for p in params] == known
            if name == "AdamW" and trained:
                counts = {float(optimizer.state[p]["step"]) for p in params}
                assert counts == {float(len(before_it))}
            for seed in (5, 6):
                set_gradients(optimizer, seed)
                optimizer.step()
        with emulator.off():
            want = make(name, options, [(5,), (3, 4)])
            for seed in (*before_it, 5, 6):
                set_gradients(want, seed)
                want.step()
    finally:
        torch.use_deterministic_algorithms(False)
        emulator.module.use_stream(0, 0)
        emulator.module.destroy_stream(foreign)
    assert_same(everything(optimizer), everything(want))


class NoKernels:
    """A plan that meets a CUDA tensor without braze._cuda."""

    def step(self, *_: Any) -> str:
        return "cuda:0"

    fold = step


@pytest.mark.parametrize("steps", [1, 2])
def test_cuda_tensors_without_kernels(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(_native, "CUDA_FILE", None)
    monkeypatch.setattr(_native, "_CUDA_REASON", "the reason")
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = optim.AdamW([p], accumulation_steps=steps)
    optimizer._plan = NoKernels()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    message = str(error.value)
    assert message.startswith("AdamW: a parameter is on cuda:0, but braze has no CUDA kernels here")
    assert _native.cuda_missing() in message and "the reason" in message
    assert "foreach=True" in message
    assert torch.equal(p.detach(), torch.ones(3)) and not optimizer.state
    assert "accumulated_steps" not in optimizer.state_dict()["param_groups"][0]


# ------------------------------------------------------------------ the test device itself


def test_factories_follow_the_device(device: Device) -> None:
    """What BRAZE_TEST_DEVICE=cuda relies on, seen on a device that is everywhere."""
    with device.off(), OnDevice(torch.device("meta")) as factories:
        generator = torch.Generator(device="cpu").manual_seed(0)
        for made in (
            torch.ones(3),
            torch.tensor([1.0]),
            torch.randn(3, generator=generator),
            torch.randn(3, generator=generator, requires_grad=True),
            torch.nn.Linear(2, 3).weight,
        ):
            assert made.is_meta
        assert torch.randn(3, generator=generator, requires_grad=True).requires_grad
        assert torch.zeros(3, device="cpu").device == CPU
        assert torch.as_tensor(torch.zeros(3, device="cpu")).device == CPU
        factories.active = False
        assert torch.ones(3).device == CPU
        factories.active = True
        p = Parameter(torch.ones(3, device="cpu"))
        p.grad = torch.zeros_like(p)
        optimizer = torch.optim.Adam([p], foreach=False)
        optimizer.step()
        assert optimizer.state[p]["step"].device == CPU
        assert torch.ones(3, device="cpu").numpy().sum() == 3
    with device.off():
        assert torch.ones(3).device == CPU


@pytest.mark.emulated_only("is about the emulator")
def test_a_broken_rule_is_an_error_not_a_crash(emulator: EmulatedDevice) -> None:
    with pytest.raises(RuntimeError, match=r"not permitted|unsupported"):
        emulator.module.begin_capture()  # of the default stream
    with pytest.raises(RuntimeError, match="resource handle"):
        emulator.module.destroy_stream(12345)
