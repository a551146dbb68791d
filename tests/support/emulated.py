"""The CUDA optimizers on the emulated device: CPU tensors run through csrc/cuda. Needs no GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Protocol, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import emulator_build

ROOT = emulator_build.ROOT
EXTENSION = emulator_build.EMULATOR / "extension"
# The one host file that emulated_module.cpp stands in for.
MODULE = ROOT / "csrc" / "ops" / "module_cuda.cpp"


class Emulated(Protocol):
    """The module ``_emulated``. Streams and graphs are numbers; stream 0 is the default stream."""

    __file__: str
    backend: object

    def enable(self, on: bool, /) -> None:
        """CPU tensors belong to the emulated device from now on, or no more."""

    def install_fake_device(self) -> None:
        """CUDA tensors belong to the emulated device, and no others, until the process ends."""

    def default_generator(self, device: int, /) -> torch.Generator: ...
    def resize_storage(self, tensor: torch.Tensor, size: int, /) -> None: ...
    def exchange_device(self, device: int, /) -> int:
        """Makes a device the current one unless it is -1; returns the one before."""

    def place(self, begin: int, size: int, device: int, /) -> None:
        """Puts memory on a device; all other memory is device 0's."""

    def clear_places(self) -> None: ...
    def set_schedule(self, order: str, seed: int, /) -> None: ...
    def schedule(self) -> str:
        """The schedule, as the environment variables that bring it back."""

    def set_null_launch(self, on: bool, /) -> None:
        """Launches are checked and counted, and kernels do not run: what is left is the host's cost."""

    def set_deferred(self, on: bool, /) -> None:
        """Work is queued, and runs only when something waits for it."""

    def pending_work(self) -> int: ...
    def synchronize(self) -> None: ...
    def set_print_errors(self, on: bool, /) -> None: ...
    def set_device_count(self, count: int, /) -> None: ...
    def launch_count(self, device: int, /) -> int: ...
    def new_stream(self, device: int, /) -> int: ...
    def destroy_stream(self, stream: int, /) -> None: ...
    def current_stream(self, device: int, /) -> int: ...
    def use_stream(self, device: int, stream: int, /) -> None: ...
    def begin_capture(self) -> None:
        """Captures the current stream of device 0, which must not be the default one."""

    def end_capture(self) -> int: ...
    def replay(self, graph: int, /) -> None: ...
    def destroy_graph(self, graph: int, /) -> None: ...


def build(variant: str = "native") -> Path:
    """The path of the module, built if the last build is not of these sources."""
    torch_folder = Path(torch.__file__).parent
    system = [
        torch_folder / "include",
        torch_folder / "include" / "torch" / "csrc" / "api" / "include",
        Path(sysconfig.get_paths()["include"]),
    ]
    libraries = torch_folder / "lib"
    return emulator_build.build_library(
        "_emulated",
        [
            *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
            *sorted(set((ROOT / "csrc" / "ops").glob("*_cuda.cpp")) - {MODULE}),
            *sorted(EXTENSION.glob("*.cpp")),
        ],
        variant,
        include=[EXTENSION / "include", EXTENSION, emulator_build.EMULATOR],
        flags=[part for folder in system for part in ("-isystem", str(folder))],
        link=[
            f"-L{libraries}",
            f"-Wl,-rpath,{libraries}",
            "-lc10",
            "-ltorch_cpu",
            "-ltorch_python",
        ],
    )


# A module that is built already: a process with a sanitizer preloaded should not run compilers.
BUILT = "BRAZE_EMULATED_MODULE"


def why_not(variant: str = "native") -> str | None:
    """None if ``load`` can work here, else the reason."""
    if BUILT in os.environ:
        return None
    if not (EXTENSION / "emulated_module.cpp").exists():
        return "the emulator's sources are not here"
    return emulator_build.have(variant)


@functools.cache
def load(variant: str = "native") -> Emulated:
    """Builds the module, imports it and gives it to braze. The device is not enabled yet."""
    from braze import _native

    path = Path(os.environ[BUILT]) if BUILT in os.environ else build(variant)
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["_emulated"] = module
    _native._C.register_backend(module.backend)
    return cast(Emulated, module)
