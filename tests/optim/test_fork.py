"""A process forked after parallel work can go on with it, with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_only("forks, which CUDA does not survive")

SCRIPT = """
import os, torch, braze.optim
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.linspace(-1, 1, 300_000))]
params += [torch.nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(600)]
for p in params:
    p.grad = p.detach().clone()
optimizer = braze.optim.AdamW(params)
optimizer.step()
read, write = os.pipe()
child = os.fork()
optimizer.step()
digest = str(hash(tuple(bytes(p.detach().numpy()) for p in params))).encode()
if child == 0:
    os.write(write, digest)
    os._exit(0)
os.waitpid(child, 0)
assert os.read(read, 100) == digest
print("same")
"""


CHECKSUM = """
import os, torch
from braze._native import _C
torch.set_num_threads(2)
weight = torch.linspace(-1, 1, 1_000_000)
before = _C.fingerprint((weight,))
child = os.fork()
same = _C.fingerprint((weight,)) == before
if child == 0:
    os._exit(not same)
assert same and os.waitpid(child, 0)[1] == 0
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("script", [SCRIPT, CHECKSUM], ids=["step", "checksum"])
def test_forked_child(script: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "same\n"
