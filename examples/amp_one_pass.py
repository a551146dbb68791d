"""Mixed precision, clipping and an average of the weights: torch's recipe and braze's one pass.

    python examples/amp_one_pass.py

Needs: pip install scikit-learn
"""

import copy

import braze
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.manual_seed(0)
digits, targets = load_digits(return_X_y=True)
images, labels = torch.tensor(digits, dtype=torch.float32) / 16, torch.tensor(targets)
train, test = torch.randperm(len(images)).split([1400, 397])
batches = [batch for _ in range(5) for batch in train[torch.randperm(1400)].split(50)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.cross_entropy(model(images[batch]), labels[batch])


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


theirs = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 10))
ours = copy.deepcopy(theirs)

adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler("cpu")
average = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(0.98))
for batch in batches:
    scaler.scale(loss_of(theirs, batch)).backward()
    scaler.unscale_(adamw)
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    scaler.step(adamw)
    scaler.update()
    adamw.zero_grad()
    average.update_parameters(theirs)
print(f"torch: accuracy {accuracy(theirs):.3f}, of the average {accuracy(average):.3f}")

optimizer = braze.optim.AdamW(ours.parameters(), lr=3e-3, max_grad_norm=1.0, ema_decay=0.98)
scaler = braze.amp.GradScaler("cpu")
for batch in batches:
    scaler.scale(loss_of(ours, batch)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
right = accuracy(ours)
with optimizer.swap_ema():
    print(f"braze: accuracy {right:.3f}, of the average {accuracy(ours):.3f}")
print(f"norm of the last gradient {optimizer.grad_norm:.3f}")
