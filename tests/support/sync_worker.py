"""What each process of test_nn_sync.py does: it runs every scenario on its share and saves the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import braze.nn as bnn
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CHANNELS = 5
SCENARIOS: dict[str, dict[str, Any]] = {
    "even": {"shares": (3, 3)},
    "uneven": {"shares": (5, 1)},
    "one empty": {"shares": (6, 0)},
    "one value each": {"shares": (1, 1), "pixels": 1},
    "channels last": {"shares": (2, 4), "channels_last": True},
    "join": {"shares": (2, 4), "activation": "relu", "residual": True},
    "curved join": {"shares": (2, 4), "activation": "gelu", "residual": True},
    "wide residual": {
        "shares": (2, 4),
        "dtype": torch.bfloat16,
        "residual": True,
        "activation": "leaky_relu",
    },
    "fp64": {"shares": (2, 4), "dtype": torch.float64, "params": torch.float64},
    "bf16": {"shares": (2, 4), "dtype": torch.bfloat16, "activation": "silu"},
    "cumulative": {"shares": (4, 2), "momentum": None},
    "no parameters": {"shares": (4, 2), "affine": False},
    "no statistics": {"shares": (4, 2), "track_running_stats": False},
    "input needs no gradient": {"shares": (4, 2), "input_gradient": False},
    "large mean": {"shares": (4, 2), "offset": 3000.0},
}


def options(scenario: dict[str, Any]) -> dict[str, Any]:
    names = ("momentum", "affine", "track_running_stats")
    return {n: scenario[n] for n in names if n in scenario}


def whole_batch(scenario: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, residual and gradient of all processes, on a grid that every dtype has exactly."""
    n, pixels = sum(scenario["shares"]), scenario.get("pixels", 4)
    shape = (n, CHANNELS, pixels, pixels)
    generator = torch.Generator().manual_seed(seed)
    x, r, dy = (torch.randint(-64, 65, shape, generator=generator) / 32 for _ in range(3))
    return x + scenario.get("offset", 0.0), r, dy


def own(tensor: Tensor, shares: tuple[int, ...], rank: int) -> Tensor:
    return tensor.split(shares)[rank].clone()


def run(scenario: dict[str, Any], rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = bnn.SyncBatchNormAct(
        CHANNELS,
        activation=scenario.get("activation", "identity"),
        dtype=scenario.get("params"),
        **options(scenario),
    )
    for i, p in enumerate(module.parameters()):
        nn.init.uniform_(p, -1.0, 1.0 + i)
    result: dict[str, Any] = {"start": {n: t.clone() for n, t in module.state_dict().items()}}
    for step in range(2):
        x, r, dy = (
            own(t, scenario["shares"], rank).to(scenario.get("dtype"))
            for t in whole_batch(scenario, step)
        )
        if scenario.get("channels_last"):
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_(scenario.get("input_gradient", True))
        residual = None
        if scenario.get("residual"):
            residual = r.float().requires_grad_()
        module.zero_grad()
        y = module(x, residual)
        if y.requires_grad:
            y.backward(dy.to(y.dtype))
        result[f"step {step}"] = {
            "y": y.detach(),
            "x.grad": x.grad,
            "r.grad": None if residual is None else residual.grad,
            **{f"{n}.grad": p.grad for n, p in module.named_parameters()},
        }
    result["end"] = module.state_dict()
    return result


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        bnn.ConvBNAct2d(3, CHANNELS, 3, activation="silu", bias=True),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(CHANNELS * 16, 2),
    ).double()


def training_batch() -> Tensor:
    return torch.randn(6, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def torchs_model() -> nn.Sequential:
    """make_model() in torch's modules."""
    model = make_model()
    block = model[0]
    plain = nn.Sequential(
        block.conv, nn.BatchNorm2d(CHANNELS).double(), nn.SiLU(), *list(model)[1:]
    )
    plain[1].load_state_dict(block.bn.state_dict())
    return plain


def train_ddp(module: nn.Module, rank: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(own(training_batch(), (3, 3), rank)).square().mean().backward()
        optimizer.step()
    state: dict[str, Tensor] = model.module.state_dict()
    return state


def alone(rank: int) -> dict[str, Tensor]:
    """A group of one, and eval(): nothing is shared, and torch's BatchNorm gives the same."""
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    module = bnn.SyncBatchNormAct(CHANNELS, process_group=groups[rank], activation=None)
    plain = nn.BatchNorm2d(CHANNELS)
    x = torch.randn(3 + rank, CHANNELS, 2, 2)
    result = {"trained": module(x), "trained.expected": plain(x)}
    module.eval(), plain.eval()
    module.process_group = None
    if rank == 0:  # the other does not take part
        result.update({"evaluated": module(x), "evaluated.expected": plain(x)})
    return result


def work(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    results = {name: run(scenario, rank) for name, scenario in SCENARIOS.items()}
    results["ddp"] = train_ddp(bnn.convert_sync_batchnorm(make_model()), rank)
    results["ddp, each its own statistics"] = train_ddp(make_model(), rank)
    results["ddp, torch"] = train_ddp(torchs_model(), rank)
    results["alone"] = alone(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
