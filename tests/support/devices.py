"""The device that the tests of the CUDA step use: the emulated one, or CUDA's where that is asked for."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import emulated
import fake_cuda
import torch
from reference import same_bits
from torch import Tensor
from torch.overrides import TorchFunctionMode

MODES = ("cpu", "emulated", "fake", "cuda")
MODE = os.environ.get("BRAZE_TEST_DEVICE", "cpu")
# Of which the device has memory of its own, where tensors must be put.
APART = ("fake", "cuda")
VARIANT = os.environ.get("BRAZE_TEST_EMULATOR", "native")
CPU = torch.device("cpu")


class OnDevice(TorchFunctionMode):
    """Tensors that tests make without naming a device are on `device`, with the values they have on
    the CPU; what braze and torch.optim make themselves stays where they put it."""

    # Braze leaves the work to torch under a mode that wants to see it, which torch's own do not.
    __module__ = "torch.testing.devices"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.active = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        if func is torch.Tensor.numpy:
            return func(args[0].cpu(), *args[1:], **kwargs)
        if func not in _FACTORIES or kwargs.get("device") is not None or _from_library():
            return func(*args, **kwargs)
        if func in _KEEP_DEVICE and args and isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is None or generator.device == self.device:
            return func(*args, **{**kwargs, "device": self.device})
        requires_grad = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(requires_grad)


_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "arange as_tensor empty empty_strided eye full linspace ones rand randint randn randperm "
        "scalar_tensor sparse_coo_tensor tensor zeros"
    ).split()
)
_KEEP_DEVICE = frozenset((torch.as_tensor,))


def _from_library() -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith(("torch.optim", "braze."))


class Graph:
    """A captured step."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


class Emulator:
    """Streams, launches and graphs of the emulator."""

    def __init__(self) -> None:
        self.module = emulated.load(VARIANT)
        self._graphs: list[int] = []

    def synchronize(self) -> None:
        self.module.synchronize()

    def launches(self, action: Callable[[], Any], device: int = 0) -> int | None:
        before = self.module.launch_count(device)
        action()
        return self.module.launch_count(device) - before

    @contextmanager
    def stream(self) -> Iterator[None]:
        """On a stream of its own."""
        before, stream = self.module.current_stream(0), self.module.new_stream(0)
        self.module.use_stream(0, stream)
        try:
            yield
        finally:
            self.module.synchronize()
            self.module.use_stream(0, before)
            self.module.destroy_stream(stream)

    @contextmanager
    def schedule(self, order: str, seed: int) -> Iterator[None]:
        before = [part.partition("=")[2] for part in self.module.schedule().split()]
        self.module.set_schedule(order, seed)
        try:
            yield
        finally:
            self.module.set_schedule(before[0], int(before[1]))

    def capture(self, action: Callable[[], Any]) -> Graph:
        with self.stream():
            self.module.begin_capture()
            try:
                action()
            except BaseException:
                with suppress(RuntimeError):  # the failure may have invalidated it
                    self.module.destroy_graph(self.module.end_capture())
                raise
            graph = self.module.end_capture()
        self._graphs.append(graph)
        return Graph(lambda: self.module.replay(graph))

    def clean_up(self) -> None:
        for graph in self._graphs:
            self.module.destroy_graph(graph)
        self._graphs.clear()
        self.module.set_deferred(False)
        self.module.set_null_launch(False)
        self.module.set_print_errors(True)
        self.module.clear_places()
        for device in range(2):
            self.module.use_stream(device, 0)


class EmulatedDevice(Emulator):
    """CPU tensors are the device's while ``on``."""

    emulated = True
    place = CPU

    def __init__(self) -> None:
        super().__init__()
        self._active = False

    @contextmanager
    def _switched(self, active: bool) -> Iterator[None]:
        before, self._active = self._active, active
        self.module.enable(active)
        try:
            yield
        finally:
            self._active = before
            self.module.enable(before)

    def on(self) -> AbstractContextManager[None]:
        return self._switched(True)

    def off(self) -> AbstractContextManager[None]:
        """In here steps are the CPU's."""
        return self._switched(False)


class ApartDevice:
    """CUDA tensors are the device's; tensors are made there while ``on``."""

    emulated = False

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.factories = OnDevice(self.place)

    @contextmanager
    def on(self) -> Iterator[None]:
        yield

    @contextmanager
    def off(self) -> Iterator[None]:
        self.factories.active = False
        try:
            yield
        finally:
            self.factories.active = True


class FakeDevice(ApartDevice, Emulator):
    """CUDA tensors of a torch without CUDA, in the host's memory: mixing them with the CPU's fails as on a
    GPU. torch's own operators run on the CPU, at once; they are not captured."""

    def __init__(self) -> None:
        fake_cuda.load(VARIANT)
        super().__init__()


class CudaDevice(ApartDevice):
    def __init__(self) -> None:
        super().__init__()
        # Results are compared with the CPU's. Not by assignment to torch.backends.cudnn, which torch's own test
        # tools forbid for the whole process.
        torch._C._set_cudnn_allow_tf32(False)
        torch._C._set_cudnn_benchmark(False)
        torch._C._set_cublas_allow_tf32(False)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def launches(self, action: Callable[[], Any], device: int = 0) -> int | None:
        """None where the profiler cannot see kernels."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            (torch.zeros(1, device=self.place) + 1).item()
            action()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
        if not names:
            return None
        return sum("step_kernel" in name for name in names)

    @contextmanager
    def stream(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, action: Callable[[], Any]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            action()
        return Graph(graph.replay)

    def clean_up(self) -> None:
        torch.cuda.synchronize()


Device = EmulatedDevice | FakeDevice | CudaDevice


def why_not() -> str | None:
    """None if ``get`` can work here, else the reason."""
    if MODE == "cuda":
        return None
    return (fake_cuda if MODE == "fake" else emulated).why_not(VARIANT)


@functools.cache
def get() -> Device:
    kinds: dict[str, type[Device]] = {"fake": FakeDevice, "cuda": CudaDevice}
    return kinds.get(MODE, EmulatedDevice)()


def values(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device; on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), generator=generator, dtype=wide, device="cpu").to(dtype)


def everything(optimizer: Any) -> list[Tensor]:
    """Parameters and state in the optimizer's order, on the CPU."""
    tensors = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors.append(p)
            entry = optimizer.state.get(p, {})
            tensors += [entry[k] for k in sorted(entry) if isinstance(entry[k], Tensor)]
    return [t.detach().to("cpu", copy=True) for t in tensors]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not same_bits(a, b):
            assert a.shape == b.shape and a.dtype == b.dtype, (i, a.shape, b.shape)
            wrong = (a != b).reshape(-1).nonzero().flatten()
            raise AssertionError(
                f"tensor {i} of {len(got)}, {a.dtype} {tuple(a.shape)}: {len(wrong)} elements differ, "
                f"first {wrong[:3].tolist()}"
            )


def same_on_both(device: Device, scenario: Callable[[torch.device], list[Tensor]]) -> None:
    """The scenario gives the same bits on the device and on the CPU."""
    with device.on():
        got = scenario(device.place)
    with device.off():
        want = scenario(CPU)
    assert_same(got, want)
