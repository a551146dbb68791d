"""In eval() without gradients a fused network's convolution, batch norm, sum and activation are one call.

    python examples/inference_fold.py    # prints the times of both, taken in turns, and their ratio
"""

import copy
import time

import braze
import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + x)


torch.manual_seed(0)
plain = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *(Block(32) for _ in range(4)))
x = torch.randn(4, 3, 56, 56)
for _ in range(3):  # gives the batch norms running statistics
    plain(x)

fused = braze.fuse(copy.deepcopy(plain), channels_last=True)
plain.to(memory_format=torch.channels_last)  # the fairer opponent
networks = {"torch": plain.eval(), "braze": fused.eval()}
results: dict[str, Tensor] = {}
best = dict.fromkeys(networks, float("inf"))
with torch.no_grad():
    for _ in range(15):
        for name, network in networks.items():
            start = time.perf_counter()
            results[name] = network(x)
            best[name] = min(best[name], time.perf_counter() - start)

torch.testing.assert_close(results["braze"], results["torch"], rtol=1e-4, atol=1e-4)
difference = (results["braze"] - results["torch"]).abs().max().item()
print(f"same results: largest difference {difference:.1e}")
print(f"best times: torch {best['torch'] * 1e3:.2f} ms, braze {best['braze'] * 1e3:.2f} ms")
print(f"ratio {best['torch'] / best['braze']:.2f}")
print(str(braze.fusion_report(fused)).splitlines()[-1])
