"""braze's optimizers under torch.distributed, in a group of one gloo process on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import braze.optim as optim
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch is built without distributed or gloo", allow_module_level=True)

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.cpu_only("uses gloo, which is for CPU tensors")

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("Adam", {"lr": 0.02, "amsgrad": True}),
    ("AdamW", {"lr": 0.02}),
]
EACH = pytest.mark.parametrize(("name", "kwargs"), CONFIGS, ids=str)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mesh(group: None) -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 17), nn.Tanh(), nn.Linear(17, 3)).double()


def make(name: str, model: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
    result: torch.optim.Optimizer = getattr(optim, name)(model.parameters(), **kwargs)
    return result


def batch(seed: int) -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: Any, seeds: range, scaler: Any = None) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss = model(batch(seed)).pow(2).sum()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def trained(name: str, kwargs: dict[str, Any], steps: int) -> nn.Module:
    """The same model, trained by torch's for-loop without any distribution."""
    model = make_model()
    train(
        model, getattr(torch.optim, name)(model.parameters(), foreach=False, **kwargs), range(steps)
    )
    return model


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(model: nn.Module, reference: nn.Module) -> None:
    mine = [full(p).detach() for p in model.parameters()]
    theirs = [full(p).detach() for p in reference.parameters()]
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@EACH
@pytest.mark.parametrize("as_views", [True, False])
def test_ddp(name: str, kwargs: dict[str, Any], as_views: bool) -> None:
    model = DistributedDataParallel(make_model(), gradient_as_bucket_view=as_views)
    optimizer = make(name, model, **kwargs)
    train(model, optimizer, range(4))
    assert_close(model.module, trained(name, kwargs, 4))


def test_ddp_accumulation_equals_one_big_batch() -> None:
    model = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
    optimizer = optim.AdamW(model.parameters(), lr=0.02, accumulation_steps=2, accumulation="sum")
    reference = make_model()
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.02, foreach=False)
    for step in range(3):
        seeds = (2 * step, 2 * step + 1)
        for seed in seeds:
            optimizer.zero_grad()
            model(batch(seed)).pow(2).sum().backward()
            optimizer.step()
        theirs.zero_grad()
        reference(torch.cat([batch(seed) for seed in seeds])).pow(2).sum().backward()
        theirs.step()
    assert_close(model.module, reference)


@EACH
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_fsdp2(mesh: DeviceMesh, name: str, kwargs: dict[str, Any], flags: dict[str, bool]) -> None:
    if name == "SGD" and flags.get("fused"):
        pytest.skip("torch has no fused SGD for DTensor")
    model = make_model()
    fully_shard(model, mesh=mesh)
    optimizer = make(name, model, **kwargs, **flags)
    train(model, optimizer, range(4))
    weight = next(model.parameters())
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    assert isinstance(optimizer.state[weight][key], DTensor)
    assert_close(model, trained(name, kwargs, 4))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SGD", {"lr": 0.05}),
        ("AdamW", {"lr": 0.05, "eps": 0.1}),  # large, or Adam would not notice a wrong scale
        ("AdamW", {"lr": 0.05, "eps": 0.1, "fused": True}),
    ],
    ids=str,
)
def test_fsdp2_with_a_scaler(mesh: DeviceMesh, name: str, kwargs: dict[str, Any]) -> None:
    model = make_model()
    fully_shard(model, mesh=mesh)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    train(model, make(name, model, **kwargs), range(3), scaler)
    assert_close(model, trained(name, kwargs, 3))


@EACH
def test_fsdp2_state_dict_round_trip(mesh: DeviceMesh, name: str, kwargs: dict[str, Any]) -> None:
    model = make_model()
    fully_shard(model, mesh=mesh)
    optimizer = make(name, model, **kwargs)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = {i: {k: full(v).clone() for k, v in e.items()} for i, e in saved["state"].items()}
    resumed = make(name, model, **kwargs)
    resumed.load_state_dict(saved)
    train(model, resumed, range(2, 4))
    assert_close(model, trained(name, kwargs, 4))
    for i, entry in saved["state"].items():
        torch.testing.assert_close({k: full(v) for k, v in entry.items()}, kept[i], rtol=0, atol=0)


@pytest.mark.parametrize("steps_per_update", [2, 3])
def test_fsdp2_accumulation_equals_one_big_batch(mesh: DeviceMesh, steps_per_update: int) -> None:
    model, reference = make_model(), make_model()
    fully_shard(model, mesh=mesh)
    optimizer = optim.Adam(model.parameters(), lr=0.05, accumulation_steps=steps_per_update)
    theirs = torch.optim.Adam(reference.parameters(), lr=0.05, foreach=False)
    for update in range(2):
        seeds = range(update * steps_per_update, (update + 1) * steps_per_update)
        train(model, optimizer, seeds)
        theirs.zero_grad()
        for seed in seeds:
            (reference(batch(seed)).pow(2).sum() / steps_per_update).backward()
        theirs.step()
    assert_close(model, reference)


@EACH
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1(name: str, kwargs: dict[str, Any], use_orig_params: bool) -> None:
    model = FullyShardedDataParallel(
        make_model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    optimizer = make(name, model, **kwargs)
    train(model, optimizer, range(4))
    reference = trained(name, kwargs, 4)
    with FullyShardedDataParallel.summon_full_params(model):
        assert_close(model.module, reference)


@EACH
@pytest.mark.parametrize("as_views", [True, False])
def test_zero_redundancy_optimizer(name: str, kwargs: dict[str, Any], as_views: bool) -> None:
    model = make_model()
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), getattr(optim, name), parameters_as_bucket_view=as_views, **kwargs
    )
    assert type(optimizer.optim) is getattr(optim, name)
    train(model, optimizer, range(2))
    optimizer.consolidate_state_dict()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["lr"] = kwargs["lr"]
    train(model, optimizer, range(2, 4))
    assert_close(model, trained(name, kwargs, 4))


def shard(model: nn.Module, mesh: DeviceMesh, sharded: bool) -> nn.Module:
    if sharded:
        fully_shard(model, mesh=mesh)
    return model


SHARDED = pytest.mark.parametrize(
    "sharded",
    [False, True],
    ids=["plain", "fsdp2"],
)


@EACH
@pytest.mark.parametrize(
    ("saver", "sharded"),
    [
        ("braze", False),
        ("torch", False),
        ("braze", True),
        ("torch", True),
    ],
)
def test_checkpoint_state_dict_functions(
    mesh: DeviceMesh, name: str, kwargs: dict[str, Any], sharded: bool, saver: str
) -> None:
    """From braze or torch into a fresh optimizer of the other, through the file-less functions."""
    modules = (optim, torch.optim) if saver == "braze" else (torch.optim, optim)
    first, second = (shard(make_model(), mesh, sharded) for _ in modules)
    source = getattr(modules[0], name)(first.parameters(), **kwargs)
    train(first, source, range(2))
    second.load_state_dict(first.state_dict())
    target = getattr(modules[1], name)(second.parameters(), **kwargs)
    set_optimizer_state_dict(second, target, get_optimizer_state_dict(first, source))
    assert target.param_groups[0]["lr"] == kwargs["lr"]
    train(second, target, range(2, 4))
    assert_close(second, trained(name, kwargs, 4))


def resume_from_files(
    path: Path, prepare: Callable[[], nn.Module], steps_before: int, **kwargs: Any
) -> None:
    whole, model = prepare(), prepare()
    uninterrupted = optim.AdamW(whole.parameters(), **kwargs)
    train(whole, uninterrupted, range(8))
    optimizer = optim.AdamW(model.parameters(), **kwargs)
    train(model, optimizer, range(steps_before))
    saved = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=path)
    resumed = prepare()
    fresh = optim.AdamW(resumed.parameters(), **kwargs)
    loaded = {"model": resumed.state_dict(), "optim": get_optimizer_state_dict(resumed, fresh)}
    dcp.load(loaded, checkpoint_id=path)
    resumed.load_state_dict(loaded["model"])
    set_optimizer_state_dict(resumed, fresh, loaded["optim"])
    train(resumed, fresh, range(steps_before, 8))
    assert_close(resumed, whole)


@SHARDED
def test_checkpoint_files(mesh: DeviceMesh, tmp_path: Path, sharded: bool) -> None:
    resume_from_files(tmp_path, lambda: shard(make_model(), mesh, sharded), 4, lr=0.02)


def test_checkpoint_files_with_accumulation(tmp_path: Path) -> None:
    resume_from_files(tmp_path, make_model, 4, lr=0.02, accumulation_steps=2)


@EACH
def test_apply_optimizer_in_backward(name: str, kwargs: dict[str, Any]) -> None:
    model = make_model()
    _apply_optimizer_in_backward(getattr(optim, name), model.parameters(), kwargs)
    for seed in range(3):
        model(batch(seed)).pow(2).sum().backward()
        assert all(p.grad is None for p in model.parameters())
    optimizers = [o for p in model.parameters() for o in p._in_backward_optimizers]
    assert all(type(o) is getattr(optim, name) for o in optimizers)
    assert_close(model, trained(name, kwargs, 3))


@EACH
def test_optimizer_in_post_accumulate_grad_hooks(name: str, kwargs: dict[str, Any]) -> None:
    model = make_model()
    optimizers = {p: getattr(optim, name)([p], **kwargs) for p in model.parameters()}

    def hook(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for seed in range(3):
        model(batch(seed)).pow(2).sum().backward()
    assert_close(model, trained(name, kwargs, 3))


_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import braze.amp, braze.optim as optim

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

def trained(shard):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 17), nn.Tanh(), nn.Linear(17, 3)).double()
    if shard:
        fully_shard(model, mesh=mesh)
    optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.9, max_grad_norm=0.1, ema_decay=0.5)
    scaler = braze.amp.GradScaler("cpu", init_scale=8.0)
    norms = []
    for seed in range(3):
        optimizer.zero_grad()
        x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        scaler.scale(model(x).pow(2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        norms.append(float(optimizer.grad_norm))
    whole = [p.full_tensor() if shard else p for p in model.parameters()]
    averages = [optimizer.state[p]["ema"] for p in model.parameters()]
    averages = [a.full_tensor() if shard else a for a in averages]
    return norms, [t.detach() for t in whole], averages

sharded, single = trained(True), trained(False)
assert min(single[0]) > 0.1, single[0]
torch.testing.assert_close(sharded, single, rtol=1e-6, atol=1e-9)
dist.destroy_process_group()
"""


def test_the_norm_is_of_all_shards(tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    workers = [
        subprocess.Popen([sys.executable, "-c", _TWO_PROCESSES, str(rank), store], stderr=-1)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
