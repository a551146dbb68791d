"""The test suite with CUDA tensors that are no GPU's: no test mixes them with the CPU's unawares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
from test_emulated_suite import TESTS, TIMEOUT, launches, run

# What takes long and is about numbers, not about where they are.
LEFT_OUT = ("optim/test_numerics.py", "cuda/test_emulated_suite.py", "cuda/test_fake_suite.py")

pytestmark = pytest.mark.cpu_only("runs the suite itself")


@pytest.fixture(autouse=True)
def possible() -> None:
    if (reason := fake_cuda.why_not()) is not None:
        pytest.skip(reason)


def test_the_whole_suite() -> None:
    files = [f"{p.parent.name}/{p.name}" for p in sorted(TESTS.glob("*/test_*.py"))]
    files = [name for name in files if name not in LEFT_OUT]
    done = run(files, {"BRAZE_EMULATOR_ORDER": "reverse"}, "fake")
    print(done.stdout[-3000:])
    assert launches(done.stdout) > 40_000


CONTROL = """
import pytest, torch
from braze.nn import functional

def test_all_is_on_the_device():
    x = torch.randn(2, 3, 4)
    assert x.is_cuda and functional.batch_norm(x, torch.zeros(3), torch.ones(3), training=True).is_cuda
    assert torch.equal((x + 1).cpu(), x.cpu() + 1)

def test_number_of_the_cpu():
    assert bool((torch.ones(3) * torch.tensor(2.0, device="cpu") == 2).all())

def test_sum(): torch.ones(3) + torch.ones(3, device="cpu")
def test_list(): torch.cat([torch.ones(3), torch.ones(3, device="cpu")])
def test_product(): torch.ones(3, 3, device="cpu") @ torch.ones(3, 3)
def test_choice(): torch.where(torch.ones(3, device="cpu") > 0, torch.ones(3), torch.ones(3))
def test_comparison(): torch.equal(torch.ones(()), torch.ones((), device="cpu"))
def test_written_number(): torch.ones((), device="cpu").add_(torch.ones(()))
def test_loss(): torch.nn.functional.mse_loss(torch.ones(3), torch.ones(3, device="cpu"))
def test_two_devices(): torch.ones(3, device="cuda:1") + torch.ones(3)
def test_device(): torch.testing.assert_close(torch.ones(3), torch.ones(3, device="cpu"))
def test_wait_in_a_capture(device): device.capture(lambda: torch.ones(3).sum().item())
def test_generator(): torch.empty(3).normal_(generator=torch.Generator("cpu"))
"""
SOUND = 2
SAME_DEVICE = "Expected all tensors to be on the same device, but found at least two devices"
WORDS = {
    SAME_DEVICE: 8,
    "values for attribute 'device' do not match": 1,
    "for generator but": 1,
    "not permitted when stream is capturing": 1,
}


def test_mixing_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_control.py").write_text(CONTROL)
    done = run(["-p", "conftest", str(tmp_path)], {}, "fake", check=False)
    wrong = CONTROL.count("def test_") - SOUND
    assert re.search(rf"{wrong} failed, {SOUND} passed", done.stdout), done.stdout[-6000:]
    for words, count in WORDS.items():
        found = re.findall(rf"^E .*{re.escape(words)}", done.stdout, re.M)
        assert len(found) == count, (words, found)
    assert launches(done.stdout) > 0


@pytest.mark.parametrize("mode", ["cpu", "emulated"])
def test_without_it_there_is_no_cuda(mode: str) -> None:
    """The other modes load the same module, and nothing of it into torch."""
    script = "import devices, torch; devices.get(); print(torch.cuda.is_available())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TESTS / "support",
        env={**os.environ, "BRAZE_TEST_DEVICE": mode},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.stdout.strip() == "False", done.stderr[-2000:]
