"""Which device the tests' tensors are on: BRAZE_TEST_DEVICE=cpu (default), emulated, fake or cuda.

emulated: CPU tensors run through the CUDA host layer and kernels, on an emulator; no GPU needed.
fake: CUDA tensors that are no GPU's, on the emulator; what a GPU could not read is an error as it is there.
cuda: the same tests on the current CUDA device, each on a stream of its own.

And which tests run: those marked slow only with BRAZE_TEST_ALL=1.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when torch is loaded. Threads that spin until others are done take the cores from the tests beside these.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The helpers, and the test modules that others take parts of.
sys.path += [str(folder) for folder in sorted(Path(__file__).parent.iterdir()) if folder.is_dir()]

import devices
import pytest
import torch

# marker: the devices on which a test that has it is left out
LEFT_OUT = {
    "cpu_only": ("emulated", "fake", "cuda"),
    "emulated_only": ("fake", "cuda"),
    "fake_lacks": ("fake",),
}
ALL = os.environ.get("BRAZE_TEST_ALL") == "1"
left_out_key = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if devices.MODE not in devices.MODES:
        raise pytest.UsageError(
            f"BRAZE_TEST_DEVICE is {devices.MODE!r}; it may be {', '.join(devices.MODES)}"
        )
    config.addinivalue_line("markers", "cpu_only(reason): not where tensors are on a device")
    config.addinivalue_line("markers", "emulated_only(reason): not on a GPU")
    config.addinivalue_line(
        "markers", "fake_lacks(reason): needs what the fake device does not have"
    )
    config.addinivalue_line("markers", "slow(reason): not in the quick tier (make test)")
    if devices.MODE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("BRAZE_TEST_DEVICE=cuda, but torch.cuda.is_available() is False")


def reason_against(item: pytest.Item) -> str | None:
    """Why a test is left out; None if it is not."""
    for name, modes in LEFT_OUT.items():
        if devices.MODE in modes and (marker := item.get_closest_marker(name)) is not None:
            return f"{devices.MODE}: {marker.args[0]}"
    marker = item.get_closest_marker("slow")
    return None if ALL or marker is None else f"slow, make test-all: {marker.args[0]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = [reason_against(item) for item in items]
    left_out = [item for item, reason in zip(items, reasons, strict=True) if reason is not None]
    if left_out:
        config.stash[left_out_key] = Counter(reason for reason in reasons if reason is not None)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item, reason in zip(items, reasons, strict=True) if reason is None]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # of pytest-xdist
        output["left_out"] = dict(session.config.stash.get(left_out_key, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects all tests."""
    node.config.stash[left_out_key] = Counter(getattr(node, "workeroutput", {}).get("left_out"))


@pytest.fixture(scope="session")
def device() -> devices.Device:
    """What the tests of the CUDA step run on, in every mode: never the CPU's own step."""
    if (reason := devices.why_not()) is not None:
        pytest.skip(reason)
    return devices.get()


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    if devices.MODE == "cpu":
        yield
        return
    used: devices.Device = request.getfixturevalue("device")
    if isinstance(used, devices.EmulatedDevice):
        with used.on():
            yield
        return
    if isinstance(used, devices.FakeDevice):
        with used.stream(), used.factories:
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


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Stand-ins for cuDNN's fused convolutions, which run on CPU tensors and keep their arguments."""
    import cudnn_stand_in

    torch.manual_seed(0)
    with torch.no_grad():
        yield cudnn_stand_in.installed(monkeypatch)


@pytest.fixture(autouse=True)
def clean_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a stream, a graph or a setting of the emulator behind."""
    yield
    if devices.get.cache_info().currsize:
        devices.get().clean_up()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for reason, count in config.stash.get(left_out_key, Counter()).items():
        terminalreporter.write_line(f"left out: {count} tests, {reason}")
    for report in terminalreporter.getreports("passed"):
        for line in dict(report.user_properties).get("summary", ()):
            terminalreporter.write_line(line)
    used = devices.get() if devices.get.cache_info().currsize else None
    if devices.MODE in ("emulated", "fake") and isinstance(used, devices.Emulator):
        module = used.module
        count = sum(module.launch_count(i) for i in range(2))
        terminalreporter.write_line(f"emulated launches: {count}, schedule: {module.schedule()}")
