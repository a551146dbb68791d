"""SyncBatchNormAct in two gloo processes against one batch norm of everything, and conversion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import braze.nn as bnn
import pytest
import sync_worker
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from activations import ACTIVATIONS
from nn_cases import assert_near, make_input
from torch import Tensor, nn

pytestmark = pytest.mark.cpu_only("uses gloo, which is for CPU tensors")
PROCESSES = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without distributed or gloo")
    folder: Path = tmp_path_factory.mktemp("sync")
    mp.spawn(sync_worker.work, args=(PROCESSES, str(folder)), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def joined(results: list[dict[str, Any]], name: str, step: int, what: str) -> Tensor | None:
    parts = [r[name][f"step {step}"][what] for r in results]
    return None if parts[0] is None else torch.cat(parts)


@pytest.mark.parametrize("name", sync_worker.SCENARIOS)
def test_as_one_batch(results: list[dict[str, Any]], name: str) -> None:
    scenario = sync_worker.SCENARIOS[name]
    dtype = scenario.get("dtype", torch.float32)
    truth = nn.BatchNorm2d(sync_worker.CHANNELS, **sync_worker.options(scenario)).double()
    truth.load_state_dict(results[0][name]["start"])
    factor = 100.0 if "offset" in scenario else 4.0
    for step in range(2):
        x, r, dy = (t.to(dtype).double() for t in sync_worker.whole_batch(scenario, step))
        x.requires_grad_(), r.requires_grad_()
        z = truth(x)
        if scenario.get("residual"):
            z = z + r
        y = ACTIVATIONS[scenario.get("activation", "identity")](z, 0.01)
        truth.zero_grad()
        y.backward(dy)
        found = joined(results, name, step, "y")
        assert found is not None
        assert_near(found, y, "output", factor)
        for what, leaf in (("x.grad", x), ("r.grad", r)):
            gradient = joined(results, name, step, what)
            if what == "x.grad":
                assert (gradient is not None) == scenario.get("input_gradient", True)
            else:
                assert (gradient is not None) == scenario.get("residual", False)
            if gradient is not None and leaf.grad is not None:
                assert_near(gradient, leaf.grad, what, factor, least=1.0)
        for parameter, p in truth.named_parameters():
            shares = [r[name][f"step {step}"][f"{parameter}.grad"].double() for r in results]
            assert p.grad is not None
            torch.testing.assert_close(sum(shares), p.grad, rtol=1e-3, atol=1e-3)
    first, second = (r[name]["end"] for r in results)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for key, value in truth.state_dict().items():
        assert_near(first[key].double(), value.double(), key, 1e6 * factor)


def test_layout_is_kept(results: list[dict[str, Any]]) -> None:
    y = results[0]["channels last"]["step 0"]["y"]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_residual_is_promoted(results: list[dict[str, Any]]) -> None:
    step = results[0]["wide residual"]["step 0"]
    assert step["y"].dtype is torch.float32 and step["x.grad"].dtype is torch.bfloat16


def test_distributed_data_parallel(results: list[dict[str, Any]]) -> None:
    model = sync_worker.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(sync_worker.training_batch()).square().mean().backward()
        optimizer.step()
    for r in results:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(r["ddp"][name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_distributed_data_parallel_with_an_absorbed_bias(results: list[dict[str, Any]]) -> None:
    """Every parameter takes part, the bias too, whose gradient is zero; buffers are rank 0's."""
    for r in results:
        found, wanted = r["ddp, each its own statistics"], r["ddp, torch"]
        assert len(found) == len(wanted)
        for (name, value), expected in zip(found.items(), wanted.values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8, msg=name)


def test_alone(results: list[dict[str, Any]]) -> None:
    assert "evaluated" in results[0]["alone"]
    for r in results:
        for name, value in r["alone"].items():
            if not name.endswith(".expected"):
                torch.testing.assert_close(value, r["alone"][name + ".expected"])


# -------------------------------------------------------------------- one process


def test_without_a_process_group() -> None:
    module = bnn.SyncBatchNormAct(5, activation="leaky_relu")
    plain = bnn.BatchNormAct2d(5, activation="leaky_relu")
    x, r = make_input("NCHW"), make_input("NCHW", 1)
    assert torch.equal(module(x, r), plain(x, r))
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert module(make_input("NC")).shape == (6, 5)
    with pytest.raises(ValueError, match="at least 2D input"):
        module(torch.ones(5))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = bnn.ConvBNAct2d(3, 4, 3, activation=nn.LeakyReLU(0.3))
        self.layers = nn.Sequential(nn.BatchNorm2d(4), bnn.BatchNorm2d(4), nn.SyncBatchNorm(4))
        self.one = bnn.BatchNormAct1d(4, momentum=None, affine=False)
        self.other = nn.InstanceNorm2d(4, track_running_stats=True)
        self.shared = self.layers[0]


def test_conversion_keeps_everything_but_the_class() -> None:
    model = Model()
    model.layers[0].eval()
    model.layers[1].register_forward_hook(lambda m, args, y: y * 2)
    names = {n: (p, p.shape) for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    group = object()
    before = list(model.state_dict())
    converted = bnn.convert_sync_batchnorm(model, group)
    assert converted is model
    assert list(model.state_dict()) == before
    assert all(p is names[n][0] for n, p in model.named_parameters())
    assert all(b is buffers[n] for n, b in model.named_buffers())
    for bn in (model.block.bn, *model.layers, model.one):
        assert type(bn) is bnn.SyncBatchNormAct and bn.process_group is group
    assert type(model.other) is nn.InstanceNorm2d
    assert (model.block.bn.activation, model.block.bn.activation_parameter) == ("leaky_relu", 0.3)
    assert model.layers[0].activation == "identity" and model.one.activation == "relu"
    assert model.shared is model.layers[0] and not model.layers[0].training
    assert model.one.momentum is None and not model.one.affine
    assert len(model.layers[1]._forward_hooks) == 1
    x = make_input("NCHW").detach()[:, :3]
    plain = Model().block
    plain.load_state_dict(model.block.state_dict())
    assert torch.equal(model.block(x), plain(x))


@pytest.mark.parametrize("by", [bnn.SyncBatchNormAct, bnn.SyncBatchNorm])
def test_conversion_by_the_class_and_of_a_batch_norm_itself(by: Any) -> None:
    module = bnn.BatchNormAct2d(4, activation="elu")
    weight = module.weight
    converted: Any = by.convert_sync_batchnorm(module)
    assert type(converted) is bnn.SyncBatchNormAct and converted.weight is weight
    assert converted.activation == "elu" and converted.process_group is None
    assert copy.deepcopy(converted).activation == "elu"
    assert bnn.convert_sync_batchnorm(nn.Linear(2, 2)).weight.shape == (2, 2)


def test_what_cannot_be_converted() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"1 is a LazyBatchNorm2d.*call the model once"):
        bnn.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    module = nn.Sequential(nn.BatchNorm2d(3))
    nn.utils.parametrize.register_parametrization(module[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="0 is parametrized"):
        bnn.convert_sync_batchnorm(module)
