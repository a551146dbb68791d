"""A network of timm is fused and trained, and its checkpoint loads into the same network without braze.

    python examples/timm_fused.py

Needs: pip install timm torchvision scikit-learn
"""

import io

import braze
import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import param_groups_weight_decay
from torch import nn


def network() -> nn.Module:
    made: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    return made


torch.manual_seed(0)
digits, targets = load_digits(return_X_y=True)
images = torch.tensor(digits, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
images = nn.functional.interpolate(images, scale_factor=4)
labels = torch.tensor(targets)

model = network()
# example: compares outputs, gradients and running statistics of copies before and after, in fp64.
model = braze.fuse(model, channels_last=True, example=images[:4])
print(braze.fusion_report(model))

groups = param_groups_weight_decay(model, 0.05)
optimizer = braze.optim.AdamW(groups, lr=3e-3)
for step in range(40):
    batch = torch.randint(len(images), (32,))
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 13 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

file = io.BytesIO()
torch.save(model.state_dict(), file)
file.seek(0)
plain = network()
plain.load_state_dict(torch.load(file))  # strict: the very names that timm gave them
model.eval(), plain.eval()
with torch.no_grad():
    expected, fused = plain(images[:200]), model(images[:200])
print(f"plain timm against fused: largest difference {(fused - expected).abs().max().item():.1e}")
print(f"same digits: {torch.equal(fused.argmax(1), expected.argmax(1))}")
