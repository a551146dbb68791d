"""torch.cuda on the emulator, in a torch that has no CUDA: as much of it as CUDA tensors need.

Their operators are in tests/emulator/extension/fake_device.cpp. Streams, events and graphs are not here: tests
reach the emulator's through devices.py.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import torch

DEVICES = 2


def why_not(variant: str = "native") -> str | None:
    """None if ``load`` can work here, else the reason."""
    if torch.version.cuda is not None:
        return "this torch has CUDA, and no place for fake CUDA tensors"
    return emulated.why_not(variant)


@functools.cache
def load(variant: str = "native") -> emulated.Emulated:
    """CUDA tensors are the emulated device's from now on, and braze has kernels for them."""
    from braze import _native

    module = emulated.load(variant)
    module.install_fake_device()
    _native.CUDA_FILE = Path(module.__file__)
    functions = {
        "_cuda_getDeviceCount": lambda: DEVICES,
        "_cuda_getDevice": lambda: module.exchange_device(-1),
        "_cuda_setDevice": module.exchange_device,
        "_cuda_getCurrentRawStream": lambda _: 0,
        "_cuda_isCurrentStreamCapturing": lambda: False,
    }
    for name, function in functions.items():
        setattr(torch._C, name, function)
    state: dict[str, Any] = {
        "_initialized": True,
        # Two functions: dynamo wants to tell them from each other.
        "_exchange_device": lambda device: module.exchange_device(device),
        "_maybe_exchange_device": lambda device: module.exchange_device(device),
        "_get_device_properties": lambda _: SimpleNamespace(major=9, minor=0, name="fake"),
        "default_generators": tuple(module.default_generator(i) for i in range(DEVICES)),
    }
    for name, value in state.items():
        setattr(torch.cuda, name, value)
    _teach_storages(module)
    return module


def _teach_storages(module: emulated.Emulated) -> None:
    """Python's storages know only the devices that torch was built for."""
    make, resize = torch.UntypedStorage.__new__, torch.UntypedStorage.resize_

    def make_anywhere(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return make(cls, *args, device=device, **kwargs)
        return torch.empty(*args, dtype=torch.uint8, device=device, **kwargs).untyped_storage()

    def resize_anywhere(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return resize(self, size)
        module.resize_storage(
            torch.empty(0, dtype=torch.uint8, device=self.device).set_(self), size
        )
        return self

    torch.UntypedStorage.__new__ = make_anywhere  # type: ignore[method-assign]
    torch.UntypedStorage.resize_ = resize_anywhere  # type: ignore[method-assign]
