"""Which device the tests' tensors are on: BRAZE_TEST_DEVICE=cpu (default), emulated or cuda.

emulated: CPU tensors run through the CUDA host layer and kernels, on an emulator; no GPU needed.
cuda: the same tests on the current CUDA device, each on a stream of its own.
"""

from __future__ import annotations

import fnmatch
import gc
from collections.abc import Iterator

import devices
import emulated
import pytest
import torch

# What files with these names are about, where that is the CPU or no tensor at all.
CPU_FILES = {
    "test_bench*": "runs the benchmark's own processes",
    "test_build*": "is about the build",
    "test_cuda_build*": "is about the build",
    "test_demo*": "runs the demo's own processes",
    "test_distributed*": "uses gloo, which is for CPU tensors",
    "test_emulat*": "is about the emulator",
    "test_kernel_*": "is about the emulator",
    "test_fold*": "is about convolutions of the CPU",
    "test_fuse*": "is about modules, which are the same on every device",
    "test_new_like*": "is about the CPU's memory",
    "test_fork*": "forks, which CUDA does not survive",
    "test_jit*": "is about the build",
    "test_numerics_determinism*": "compares CPU threads and instruction sets",
}
# Not on a real device: what they measure or need is the host's.
NOT_ON_CUDA = {
    "test_leaks.py": "measures this process's memory",
    "test_plan_threads.py": "steps in threads, which are on another stream than the test",
    "test_layouts_overlap.py::test_columns_of_a_matrix_as_parameters": "takes 400 launches",
}


def pytest_configure(config: pytest.Config) -> None:
    if devices.MODE not in devices.MODES:
        raise pytest.UsageError(
            f"BRAZE_TEST_DEVICE is {devices.MODE!r}; it may be {', '.join(devices.MODES)}"
        )
    config.addinivalue_line("markers", "cpu_only(reason): not for tensors on a device")
    config.addinivalue_line("markers", "emulated_only(reason): steers the emulator")
    if devices.MODE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("BRAZE_TEST_DEVICE=cuda, but torch.cuda.is_available() is False")


def about_the_cpu(file: str) -> str | None:
    return next((why for name, why in CPU_FILES.items() if fnmatch.fnmatch(file, name)), None)


def _reason(item: pytest.Item) -> str | None:
    if devices.MODE == "cpu":
        return None
    if (reason := about_the_cpu(item.path.name)) is not None:
        return reason
    marker = item.get_closest_marker("cpu_only")
    if marker is not None:
        return str(marker.args[0])
    if devices.MODE != "cuda":
        return None
    marker = item.get_closest_marker("emulated_only")
    if marker is not None:
        return str(marker.args[0])
    for name in (item.path.name, f"{item.path.name}::{getattr(item, 'originalname', '')}"):
        if name in NOT_ON_CUDA:
            return NOT_ON_CUDA[name]
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (reason := _reason(item)) is not None:
            item.add_marker(pytest.mark.skip(reason=f"{devices.MODE}: {reason}"))


@pytest.fixture(scope="session")
def device() -> devices.Device:
    """What the tests of the CUDA step run on, in every mode: never the CPU's own step."""
    if devices.MODE != "cuda" and (reason := emulated.why_not(devices.VARIANT)) is not None:
        pytest.skip(reason)
    return devices.get()


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    if devices.MODE == "cpu" or _reason(request.node) is not None:
        yield
        return
    used: devices.Device = request.getfixturevalue("device")
    if isinstance(used, devices.EmulatedDevice):
        with used.on():
            yield
        return
    with used.stream(), used.factories:
        before = _allocated()
        yield
    after = _allocated()
    assert after <= before, f"{after - before} bytes of device memory are not given back"


def _allocated() -> int:
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    bytes_now = torch.cuda.memory_allocated()
    if bytes_now:
        gc.collect()
        bytes_now = torch.cuda.memory_allocated()
    return bytes_now


@pytest.fixture(autouse=True)
def clean_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a stream, a graph or a setting of the emulator behind."""
    yield
    if devices.get.cache_info().currsize:
        devices.get().clean_up()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    used = devices.get() if devices.get.cache_info().currsize else None
    if devices.MODE == "emulated" and isinstance(used, devices.EmulatedDevice):
        module = used.module
        count = sum(module.launch_count(i) for i in range(2))
        terminalreporter.write_line(f"emulated launches: {count}, schedule: {module.schedule()}")
