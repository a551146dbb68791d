"""A fused model through its life: optimizers, checkpoints, copies, pickles, devices of training."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import braze
import pytest
import torch
import torch.nn.functional as F
from fuse_cases import Network, Residual, assert_same_outcome, image, outcome
from torch import Tensor, nn

pytestmark = pytest.mark.cpu_only("is about modules, which are the same on every device")


def _pair(p: float = 0.0) -> tuple[Network, Network]:
    torch.manual_seed(0)
    plain = Network(p).double()
    return braze.fuse(copy.deepcopy(plain)), plain


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    target = torch.randint(0, 3, (3,), generator=torch.Generator().manual_seed(seed))
    loss = F.cross_entropy(model(image(seed=seed)), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _assert_same_state(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-8) -> None:
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("optim", [torch.optim.SGD, torch.optim.AdamW, braze.optim.SGD])
def test_training_with_an_optimizer_made_before_or_after(before: bool, optim: Any) -> None:
    torch.manual_seed(0)
    plain = Network().double()
    fused = copy.deepcopy(plain)
    if not before:
        braze.fuse(fused)
    optimizers = [optim(model.parameters(), lr=0.05) for model in (fused, plain)]
    if before:
        braze.fuse(fused)
    for seed in range(5):
        losses = [
            _step(model, optimizer, seed)
            for model, optimizer in zip((fused, plain), optimizers, strict=True)
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    _assert_same_state(fused, plain)


def test_checkpoints_go_both_ways() -> None:
    fused, plain = _pair()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    _step(fused, optimizer, 0)
    other = Network().double()
    other.load_state_dict(fused.state_dict())
    braze.fuse(other)
    _assert_same_state(other, fused, 0)
    fused.load_state_dict(plain.state_dict())
    assert_same_outcome(outcome(fused, image()), outcome(plain, image()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "copy of a copy"])
def test_copies_are_fused_and_independent(how: str) -> None:
    fused, plain = _pair()
    fused.eval()
    with torch.no_grad():
        fused(image())  # something is folded now
    if how == "deepcopy":
        other = copy.deepcopy(fused)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(fused))))
    assert isinstance(other, Network) and type(other).__name__ == "Network"
    assert len(braze.fusion_report(other).joined) == len(braze.fusion_report(fused).joined) == 8
    assert other.layer[0].__dict__["_braze_fusion"] is not None
    assert_same_outcome(outcome(other, image()), outcome(plain, image()))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert_same_outcome(outcome(fused, image()), outcome(plain, image()))
    braze.unfuse(other)
    assert type(other.layer[0]) is Residual and type(fused.layer[0]) is not Residual


def test_another_process_loads_a_pickle(tmp_path: Path) -> None:
    """One that has imported neither braze nor what the class was made from."""
    model = braze.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).eval()
    x = torch.randn(2, 3, 4, 4)
    file = tmp_path / "model"
    file.write_bytes(pickle.dumps((model, x, model(x).detach())))
    program = """
import pickle, sys
model, x, y = pickle.load(open(sys.argv[1], "rb"))
assert type(model).__module__ == "torch.nn.modules.container" and "braze" in sys.modules
assert (model(x) - y).abs().max() < 1e-5
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(file)], check=True)


def test_fusing_again_and_options() -> None:
    fused, plain = _pair()
    assert braze.fuse(fused) is fused
    assert_same_outcome(outcome(fused, image()), outcome(plain, image()))
    braze.fuse(fused, channels_last=True)
    assert_same_outcome(outcome(fused, image()), outcome(plain, image()))
    braze.unfuse(fused)
    braze.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


def test_dtypes_and_moves() -> None:
    fused, plain = _pair()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        for model in (fused, plain):
            model.to(dtype).train()
        x = image().to(dtype)
        torch.testing.assert_close(fused(x), plain(x), rtol=tolerance, atol=tolerance)
    fused.to("meta")
    assert fused(torch.empty(3, 4, 6, 5, dtype=torch.bfloat16, device="meta")).shape == (3, 3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autocast(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    plain = Network().to(memory_format=layout)
    fused = braze.fuse(copy.deepcopy(plain))
    x = image().float().to(memory_format=layout)
    for training in (True, False):
        results = []
        for model in (fused, plain):
            model.train(training)
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x)
                with torch.no_grad():
                    z = model(x)
            results.append((y, z))
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype == torch.bfloat16
            torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


def test_compiled() -> None:
    """One graph, and the fused operators are in it."""
    fused, plain = _pair()
    fused, plain = fused.float(), plain.float()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    x = image().float()
    for training in (True, False):
        graphs.clear()
        torch._dynamo.reset()
        fused.train(training)
        plain.train(training)
        compiled = torch.compile(fused, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
        assert len(graphs) == 1
        targets = [str(node.target) for node in graphs[0].graph.nodes]
        assert sum("batch_norm_act" in target for target in targets) == 6
        assert sum("batch_norm_add_act" in target for target in targets) == 1
    _assert_same_state(fused, plain, 1e-4)


def test_compiled_with_the_inductor() -> None:
    fused, plain = _pair()
    fused, plain = fused.float(), plain.float()
    compiled = torch.compile(fused)
    x = image().float()
    for model in (compiled, plain):
        (model(x) * 2).sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_fused_while_already_compiled() -> None:
    """torch.compile(model) first, braze.fuse of what it returns after."""
    _, plain = _pair()
    model = torch.compile(copy.deepcopy(plain), backend="eager")
    assert braze.fuse(model) is model
    torch.testing.assert_close(model(image()), plain(image()), rtol=1e-9, atol=1e-9)
    assert len(braze.fusion_report(model).joined) == 8


def test_tracing_and_export_see_torch_operators() -> None:
    fused, plain = _pair()
    fused.eval()
    plain.eval()
    x = image()
    traced = torch.jit.trace(fused, x)
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-9, atol=1e-9)
    assert "braze::" not in str(traced.inlined_graph)
    exported = torch.export.export(fused, (x,))
    assert "braze." not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), plain(x), rtol=1e-9, atol=1e-9)
    graph = torch.fx.symbolic_trace(fused)
    torch.testing.assert_close(graph(x), plain(x), rtol=1e-9, atol=1e-9)


def test_functional_call_and_vmap() -> None:
    fused, plain = _pair()
    fused.eval()
    plain.eval()
    state = {
        name: value * 2 for name, value in plain.state_dict().items() if value.is_floating_point()
    }
    ours, theirs = (torch.func.functional_call(m, state, (image(),)) for m in (fused, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    xs = torch.stack([image(), image(seed=1)])
    torch.testing.assert_close(torch.vmap(fused)(xs), torch.vmap(plain)(xs), rtol=1e-9, atol=1e-9)


def test_data_parallel(tmp_path: Path) -> None:
    fused, plain = _pair()
    file = tmp_path / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(fused)
        reference = nn.parallel.DistributedDataParallel(plain)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (parallel, reference)]
        for seed in range(3):
            for model, optimizer in zip((parallel, reference), optimizers, strict=True):
                _step(model, optimizer, seed)
        _assert_same_state(fused, plain)
        # Fusing what is wrapped already.
        wrapped = braze.fuse(nn.parallel.DistributedDataParallel(copy.deepcopy(plain)))
        assert len(braze.fusion_report(wrapped).joined) == 8
        torch.testing.assert_close(wrapped(image()), reference(image()), rtol=1e-9, atol=1e-9)
    finally:
        torch.distributed.destroy_process_group()


def test_sync_batch_norm_after_fusing() -> None:
    fused, plain = _pair()
    fused = braze.nn.convert_sync_batchnorm(fused)
    assert_same_outcome(outcome(fused, image()), outcome(plain, image()))


def test_threads() -> None:
    """Threads share a model, also while its blocks are traced for the first time."""
    fused, plain = _pair()
    fused = pickle.loads(pickle.dumps(fused)).eval()  # nothing is traced yet
    plain.eval()
    expected = plain(image())
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    torch.testing.assert_close(fused(image()), expected, rtol=1e-9, atol=1e-9)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_model_without_batch_norm_keeps_its_class() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 4, 4]), nn.GELU())
    braze.fuse(model)
    assert type(model) is nn.Sequential and not braze.fusion_report(model).blocks


def test_a_single_layer() -> None:
    model = braze.fuse(nn.BatchNorm2d(3))
    assert type(model) is braze.nn.BatchNorm2d
    assert type(braze.unfuse(model)) is nn.BatchNorm2d
    other = braze.fuse(nn.Conv2d(3, 4, 3), channels_last=True)
    assert other(torch.randn(2, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)


def test_the_report_reads_well() -> None:
    model = Residual(4, 6)
    text = str(braze.fusion_report(model))
    assert text.splitlines() == [
        "(the model): Residual",
        "    fused  conv+bn+conv+bn+add+relu: conv2, bn2, downsample.0, downsample.1, relu",
        "    fused  conv+bn+relu: conv1, bn1, relu",
        "downsample: Sequential",
        "    fused  conv+bn: 0, 1",
        "3 batch norms: 3 fused with what follows, 0 with their convolution in eval() only, 0 alone, "
        "0 left as they are",
    ]


def test_signature_and_documentation_stay() -> None:
    import inspect

    fused, plain = _pair()
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    assert repr(fused) == repr(plain) and type(fused).__doc__ == type(plain).__doc__


def test_without_numpy() -> None:
    """Which torch and braze do not need."""
    program = """
import sys
sys.modules["numpy"] = None
import braze, torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
braze.fuse(model, example=torch.randn(2, 3, 4, 4))
assert braze.fusion_report(model).joined == ["1"], braze.fusion_report(model)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
