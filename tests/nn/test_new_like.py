"""Large results on the CPU get the memory of earlier ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import braze.nn as bnn
import pytest
import torch
from braze import memory

pytestmark = pytest.mark.cpu_only("is about the CPU's memory")

# 25 MB
SHAPE = (4, 32, 224, 224)


def _result(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = bnn.functional.batch_norm(x, None, None, training=True)
    return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_is_used_again(layout: torch.memory_format) -> None:
    x = torch.randn(SHAPE).contiguous(memory_format=layout)
    first = _result(x)
    expected, address = first.clone(), first.data_ptr()
    second = _result(x)
    assert second.data_ptr() != address
    del first
    third = _result(x)
    assert third.data_ptr() == address
    assert torch.equal(second, expected) and torch.equal(third, expected)
    assert third.stride() == x.stride() and third.is_contiguous(memory_format=layout)


def test_kept_memory_is_counted_and_given_back() -> None:
    memory.empty_cache()
    y = _result(torch.randn(SHAPE))
    size = y.untyped_storage().nbytes()
    assert memory.kept() == 0
    del y
    assert memory.kept() == size
    memory.empty_cache()
    assert memory.kept() == 0


def test_without_reuse_nothing_is_kept() -> None:
    x = torch.randn(SHAPE)
    before, _ = _result(x), _result(x)
    del _
    assert memory.reuse() and memory.kept() > 0
    memory.set_reuse(False)
    try:
        assert not memory.reuse() and memory.kept() == 0
        after = _result(x)
        assert torch.equal(before, after)
        del before  # made with reuse
        memory.set_reuse(True)
        del after  # made without
    finally:
        memory.set_reuse(True)
    assert memory.kept() == 0


@pytest.mark.parametrize("asked", ["", "1", "0"])
def test_environment_switches_reuse_off(asked: str) -> None:
    code = "import braze; print(braze.memory.reuse())"
    environment = {**os.environ, "BRAZE_REUSE_MEMORY": asked}
    command = [sys.executable, "-c", code]
    end = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert end.stdout == f"{asked != '0'}\n"


def test_it_is_a_tensor_like_any_other() -> None:
    y = _result(torch.randn(SHAPE))
    size = y.untyped_storage().nbytes()
    assert size == y.numel() * 4 and y.device.type == "cpu"
    y.resize_(2 * y.numel())
    assert y.untyped_storage().nbytes() == 2 * size
    with torch.inference_mode():
        assert _result(torch.randn(SHAPE)).is_inference()
    z = _result(torch.randn(SHAPE)).share_memory_()
    assert z.is_shared()


def test_threads() -> None:
    x = torch.randn(SHAPE)
    expected = _result(x)
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(3):
            if not torch.equal(_result(x), expected):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


_BOUNDED = """
import braze.nn as bnn, torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def result():
    with torch.no_grad():
        return bnn.functional.batch_norm(x, None, None, training=True)

x = torch.randn(4, 32, 224, 224)
result()
before = resident()
results = [result() for _ in range(40)]
most = resident() - before
results.clear()
print(most, resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_what_is_kept_is_bounded() -> None:
    """Of a gigabyte in 40 results, half is given back."""
    command = [sys.executable, "-c", _BOUNDED]
    end = subprocess.run(command, capture_output=True, text=True, check=True)
    most, kept = map(float, end.stdout.split())
    assert most > 900 and kept < 560
