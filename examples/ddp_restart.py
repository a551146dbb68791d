"""DistributedDataParallel with accumulation: a job that is stopped goes on from its checkpoint, bit for bit.

    torchrun --standalone --nproc-per-node 2 examples/ddp_restart.py --stop-after 5
    torchrun --standalone --nproc-per-node 2 examples/ddp_restart.py

The second goes on and removes the checkpoint; once more, it runs without a stop and ends in the same weights.
Needs: braze and torch.
"""

import argparse
import hashlib
import time
from pathlib import Path

import braze.nn as nn
import braze.optim as optim
import torch
import torch.distributed as dist

STEPS, first = 20, 0
parser = argparse.ArgumentParser()
parser.add_argument("--stop-after", type=int, default=STEPS, help="so many steps, as if killed")
stop_after = parser.parse_args().stop_after
checkpoint = Path("ddp_restart.pt")
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
else:  # python examples/ddp_restart.py: a group of one process
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
ddp = nn.parallel.DistributedDataParallel(model)
# Two calls of step() make one update. No no_sync(): a gradient joins the sum when it is all processes'.
optimizer = optim.AdamW(ddp.parameters(), lr=1e-2, accumulation_steps=2)
if checkpoint.exists():
    saved = torch.load(checkpoint)
    first = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])  # and what is accumulated of an open window
dist.barrier()  # all have read it
for step in range(first, min(first + stop_after, STEPS)):
    torch.manual_seed(1000 * step + rank)  # of this step's data and dropout masks
    x = torch.randn(32, 16)
    loss = nn.functional.cross_entropy(ddp(x), x[:, :4].argmax(1))
    loss.backward()
    optimizer.step()  # releases the gradients
    if rank == 0 and step + 1 < STEPS:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, "ddp_restart.new")
        Path("ddp_restart.new").replace(checkpoint)  # whole, whenever the job is killed
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
hashes = [""] * dist.get_world_size()
dist.all_gather_object(hashes, hashlib.sha256(weights).hexdigest()[:16])
if rank == 0:
    print(f"steps {first}-{step + 1}, loss {loss.item():.4f}, weights of each process:", *hashes)
if rank == 0 and step + 1 == STEPS:
    checkpoint.unlink()
time.sleep(0.2)  # a thread of gloo that still holds a gradient when Python ends aborts the process
dist.destroy_process_group()
