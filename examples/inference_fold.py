"""In eval() without gradients a fused network's convolution, batch norm, sum and activation are one call.

    python examples/inference_fold.py    # prints the times of both, taken in turns, and their ratio

Needs: braze and torch.
"""

import copy
import time

import braze
import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int, groups: int = 1) -> list[nn.Module]:
    padding = size // 2
    return [
        nn.Conv2d(inputs, outputs, size, padding=padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(*conv(channels, wide, 1), nn.ReLU6())
        self.filter = nn.Sequential(*conv(wide, wide, 3, groups=wide), nn.ReLU6())
        self.project = nn.Sequential(*conv(wide, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.filter(self.expand(x)))


torch.manual_seed(0)
plain = nn.Sequential(*conv(3, 32, 3), *(InvertedResidual(32, 128) for _ in range(4)))
x = torch.randn(4, 3, 56, 56).contiguous(memory_format=torch.channels_last)
for _ in range(3):  # gives the batch norms running statistics
    plain(x)

fused = braze.fuse(copy.deepcopy(plain), channels_last=True)
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
