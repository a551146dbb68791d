"""Where a program that was written for torch.optim once behaved otherwise with braze.optim."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from braze import optim
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("SGD", "Adam", "AdamW")
EACH = pytest.mark.parametrize("name", NAMES)
MOMENTUM: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {}}


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(module: Any, name: str, **kwargs: Any) -> tuple[Parameter, Any]:
    p = Parameter(numbers(0, 5))
    return p, getattr(module, name)([p], **{"lr": 0.1, **MOMENTUM[name], **kwargs})


def feed(p: Parameter, optimizer: Any, seed: int) -> None:
    p.grad = numbers(seed, 5)
    optimizer.step()
    optimizer.zero_grad()


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------ dispatch modes


@pytest.mark.cpu_only("runs torch's fused kernels for the CPU; make_fx refuses its Adam without")
@EACH
def test_make_fx_records_the_step(name: str) -> None:
    def recorded(module: Any) -> list[str]:
        p, optimizer = make(module, name, fused=True)
        feed(p, optimizer, 1)

        def step(grad: Tensor) -> Tensor:
            p.grad = grad
            optimizer.step()
            return p.detach()

        return [str(node.target) for node in make_fx(step)(numbers(2, 5)).graph.nodes]

    graph = recorded(torch.optim)
    assert any("fused" in target for target in graph)
    assert recorded(optim) == graph


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@EACH
def test_a_dispatch_mode_sees_folds_and_steps(name: str) -> None:
    (p, watched), (q, plain) = (make(optim, name, accumulation_steps=2) for _ in range(2))
    for seed in range(4):
        p.grad = numbers(seed, 5)
        with Seen() as seen:
            watched.step()
        assert "aten::add_" in seen.names if seed % 2 == 0 else len(seen.names) > 2
        feed(q, plain, seed)
        assert watched.updated is plain.updated is (seed % 2 == 1)
    assert_close(p, q)
    watched.zero_grad()
    feed(p, watched, 4)  # and goes on in the kernels
    feed(q, plain, 4)
    assert torch.equal(watched.state[p]["grad_sum"], plain.state[q]["grad_sum"])


# ------------------------------------------------------------------ GradScaler


@pytest.mark.cpu_only("compares with torch's fused kernels for the CPU")
@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("unscaled", [False, True], ids=["step", "unscale_"])
def test_a_scaled_step_leaves_the_gradient_as_torchs_does(
    name: str, dtype: torch.dtype, overflow: bool, unscaled: bool
) -> None:
    """With fused=True and without; 2**16 is infinite in fp16."""
    for fused in (True, None):
        if dtype == torch.float16 and (unscaled or not fused):
            continue  # torch refuses to unscale fp16
        grads = []
        for module in (optim, torch.optim):
            params = [Parameter(numbers(i, 5 + i, dtype=dtype)) for i in range(3)]
            optimizer = getattr(module, name)(params, lr=0.1, fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            scaler.scale(torch.ones(()))
            for p in params[:2]:
                p.grad = (
                    (numbers(9, *p.shape) * 2.0**-3).to(dtype).mul_(2.0**16 if overflow else 2.0**9)
                )
            assert params[0].grad is not None
            if overflow:
                params[0].grad[0] = torch.inf
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            assert params[2].grad is None
            grads.append([params[0].grad, params[1].grad])
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, None])
def test_the_last_gradient_of_a_window_is_left_unscaled(fused: bool | None) -> None:
    p, optimizer = make(optim, "AdamW", accumulation_steps=2, fused=fused)
    scaler = torch.amp.GradScaler(p.device.type, init_scale=8.0)
    scaler.scale(torch.ones(()))
    for seed in range(2):
        p.grad = numbers(seed, 5) * 8.0
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.updated
    assert p.grad is not None
    assert torch.equal(p.grad, numbers(1, 5))


# ------------------------------------------------------------------ accumulation windows


def lose_keys(optimizer: Any) -> None:
    optimizer.param_groups = [
        {k: v for k, v in group.items() if not k.startswith("accumulated")}
        for group in optimizer.param_groups
    ]


def lose_first(optimizer: Any) -> None:
    first = optimizer.param_groups[0]
    optimizer.param_groups[0] = {k: first[k] for k in first if not k.startswith("accumulated")}


CHANGES: dict[str, Callable[[Any], Any]] = {
    "groups replaced": lose_keys,
    "first group replaced": lose_first,
    "groups copied": lambda o: setattr(o, "param_groups", [dict(g) for g in o.param_groups]),
    "groups reversed": lambda o: o.param_groups.reverse(),
    "groups in a new list": lambda o: setattr(o, "param_groups", o.param_groups[::-1]),
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "deepcopy of replaced groups": lambda o: (lose_keys(o), copy.deepcopy(o))[1],
    "state_dict of replaced groups": lambda o: (lose_keys(o), o.load_state_dict(o.state_dict()))[1],
}


@EACH
@pytest.mark.parametrize("change", CHANGES)
def test_an_open_window_survives(name: str, change: str) -> None:
    """Each change at each micro-batch of windows of three, with two groups."""
    for when in range(1, 7):
        pairs = []
        for library, options in ((optim, {"accumulation_steps": 3}), (torch.optim, {})):
            params = [Parameter(numbers(i, 5)) for i in range(2)]
            groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.05}]
            pairs.append(
                [params, getattr(library, name)(groups, lr=0.1, **MOMENTUM[name], **options)]
            )
        (mine, ours), (wanted, theirs) = pairs
        for seed in range(9):
            if seed == when:
                ours = CHANGES[change](ours) or ours
                flat = [p for group in ours.param_groups for p in group["params"]]
                mine = flat if flat[0].equal(mine[0]) else flat[::-1]
            for i, p in enumerate(mine):
                p.grad = numbers(10 * seed + i, 5)
            ours.step()
            ours.zero_grad()
            assert ours.updated is (seed % 3 == 2)
            if seed % 3 == 2:
                for i, q in enumerate(wanted):
                    q.grad = sum(numbers(10 * s + i, 5) for s in range(seed - 2, seed + 1)) / 3
                theirs.step()
                for p, q in zip(mine, wanted, strict=True):
                    assert_close(p, q)
                assert not any("grad_sum" in entry for entry in ours.state.values())
        assert (
            ours.state_dict()["param_groups"][0].keys()
            == theirs.state_dict()["param_groups"][0].keys()
        )


@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR"])
def test_an_open_window_under_a_schedule(kind: str) -> None:
    def schedule(optimizer: Any) -> Any:
        if kind == "LambdaLR":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)

    (p, ours), (q, theirs) = make(optim, "AdamW", accumulation_steps=2), make(torch.optim, "AdamW")
    schedules = schedule(ours), schedule(theirs)
    for seed in range(10):
        feed(p, ours, seed)
        if ours.updated:
            q.grad = (numbers(seed - 1, 5) + numbers(seed, 5)) / 2
            theirs.step()
            for each in schedules:
                each.step()
            assert_close(p, q)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_what_never_opened_a_window_has_no_trace_of_one() -> None:
    p, optimizer = make(optim, "AdamW")
    feed(p, optimizer, 0)
    assert repr(optimizer) == repr(make(torch.optim, "AdamW")[1])
    assert not any(key.startswith("accumulated") for key in optimizer.param_groups[0])


# ------------------------------------------------------------------ wrappers of torch.distributed

distributed = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="no torch.distributed with gloo"
)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def zero(params: list[Parameter], name: str, **kwargs: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, getattr(optim, name), **kwargs)


@distributed
@pytest.mark.cpu_only("uses gloo, which is for CPU tensors")
@pytest.mark.usefixtures("group")
class TestZeroRedundancy:
    def test_every_window(self) -> None:
        p = Parameter(torch.zeros(1))
        optimizer = zero([p], "SGD", lr=1.0, accumulation_steps=2)
        reached = []
        for value in (1, 3, 10, 30, 100, 300):
            p.grad = torch.full((1,), float(value))
            optimizer.step()
            optimizer.zero_grad()
            reached.append(p.item())
        assert reached == [0, -2, -2, -22, -22, -222]

    @EACH
    @pytest.mark.parametrize("fresh", [False, True], ids=["into itself", "into another"])
    def test_state_dicts_of_open_and_closed_windows(self, name: str, fresh: bool) -> None:
        options = {"lr": 0.1, "accumulation_steps": 3, **MOMENTUM[name]}
        for saved_at in range(1, 7):
            for loaded_at in range(saved_at, 8):
                q, plain = make(optim, name, accumulation_steps=3)
                p = Parameter(numbers(0, 5))
                optimizer = zero([p], name, **options)
                for seed in range(saved_at):
                    feed(p, optimizer, seed)
                    feed(q, plain, seed)
                optimizer.consolidate_state_dict()
                saved, value = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
                for seed in range(saved_at, loaded_at):
                    feed(p, optimizer, seed)
                if fresh:
                    p = Parameter(value)
                    optimizer = zero([p], name, **options)
                else:
                    p.data.copy_(value)
                optimizer.load_state_dict(saved)
                for seed in range(saved_at, 9):
                    feed(p, optimizer, seed)
                    feed(q, plain, seed)
                    assert_close(p, q)

    def test_a_closed_window_loaded_over_an_open_one_without_any_state(self) -> None:
        """SGD without momentum: the checkpoint has nothing that would replace the sum."""
        p = Parameter(torch.zeros(1))
        optimizer = zero([p], "SGD", lr=1.0, accumulation_steps=2)
        for value in (1.0, 3.0):
            p.grad = torch.full((1,), value)
            optimizer.step()
        optimizer.consolidate_state_dict()
        saved = copy.deepcopy(optimizer.state_dict())
        for loads, value in ((False, 1000.0), (True, 1.0), (False, 3.0)):
            if loads:
                optimizer.load_state_dict(saved)
            p.grad = torch.full((1,), value)
            optimizer.step()
        assert p.item() == -4.0


@distributed
@EACH
def test_named_optimizer_in_an_open_window(name: str) -> None:
    from torch.distributed.optim.named_optimizer import _NamedOptimizer

    def named(model: nn.Module) -> Any:
        return _NamedOptimizer(
            model.named_parameters(),
            getattr(optim, name),
            None,
            None,
            lr=0.1,
            accumulation_steps=3,
            **MOMENTUM[name],
        )

    def train(model: nn.Module, optimizer: Any, seed: int) -> None:
        model(numbers(seed, 2, 4)).pow(2).sum().backward()
        optimizer.step()
        model.zero_grad()

    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    start = copy.deepcopy(model)
    optimizer = named(model)
    plain = copy.deepcopy(start)
    reference = getattr(optim, name)(
        plain.parameters(), lr=0.1, accumulation_steps=3, **MOMENTUM[name]
    )
    for seed in range(7):
        if seed in (2, 4):
            other = copy.deepcopy(model)
            resumed = named(other)
            for _ in range(seed):  # it loads into a state with the same entries only
                train(other, resumed, 99)
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(optimizer.state_dict())
            model, optimizer = other, resumed
        train(model, optimizer, seed)
        train(plain, reference, seed)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p, q)


# ------------------------------------------------------------------ torch.compile


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@EACH
def test_a_compiled_training_step_follows_a_schedule(name: str) -> None:
    """Windows and all, without a recompilation, and ``updated`` tells the truth."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    plain = copy.deepcopy(model)
    ours, theirs = (
        getattr(optim, name)(m.parameters(), lr=0.1, accumulation_steps=2, **MOMENTUM[name])
        for m in (model, plain)
    )

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    for seed in range(6):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.1 / (seed + 1)
        compiled(model, ours, numbers(seed, 2, 4))
        step(plain, theirs, numbers(seed, 2, 4))
        assert ours.updated is theirs.updated is (seed % 2 == 1)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@EACH
def test_updated_inside_a_compiled_function(name: str) -> None:
    torch._dynamo.reset()
    p, optimizer = make(optim, name, accumulation_steps=2)

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        optimizer.accumulate(2.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return x + 1 if optimizer.updated else x - 1

    reached = [step(torch.zeros(())).item() for _ in range(6)]
    assert reached == [-1, 1] * 3


@EACH
def test_step_hooks_run_around_a_compiled_step(name: str) -> None:
    torch._dynamo.reset()
    p, optimizer = make(optim, name)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(2):
        p.grad = numbers(seed, 5)
        step()
    assert calls == ["before", "after"] * 2


def test_fullgraph_refuses_the_step() -> None:
    p, optimizer = make(optim, "AdamW")

    @torch.compile(backend="eager", fullgraph=True)
    def step() -> None:
        optimizer.step()

    p.grad = numbers(0, 5)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step()


def test_torchs_own_steps_are_still_compiled() -> None:
    """They share the code of their hooks with braze's."""
    torch._dynamo.reset()
    make(optim, "SGD")
    p, optimizer = make(torch.optim, "SGD", foreach=False)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(optimizer.step, backend=backend)
    p.grad = numbers(0, 5)
    step()
    assert graphs


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("first", ["sparse", "none"])
def test_sparse_gradients_with_momentum(reload: bool, first: str) -> None:
    results = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        embedding, dense = nn.Embedding(6, 3, sparse=True).double(), nn.Linear(3, 2).double()
        params = [*embedding.parameters(), *dense.parameters()]
        optimizer = module.SGD(
            params, lr=0.1, momentum=0.9, foreach=None if module is optim else False
        )
        for seed in range(4):
            optimizer.zero_grad()
            used = embedding(torch.tensor([seed, 4, 4]))
            dense(used.detach() if seed == 0 and first == "none" else used).pow(2).sum().backward()
            optimizer.step()
            if reload:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        results.append([p.detach() for p in params])
        assert optimizer.state[params[0]]["momentum_buffer"].is_sparse
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_fractional_step_count_corrects_the_bias_as_torchs(name: str) -> None:
    (p, ours), (q, theirs) = make(optim, name), make(torch.optim, name, foreach=False)
    for seed, count in enumerate((None, 2.1, None, 0.5, 7.0)):
        for x, optimizer in ((p, ours), (q, theirs)):
            if count is not None:
                optimizer.state[x]["step"].fill_(count)
            feed(x, optimizer, seed)
        assert_close(p, q)
    assert float(ours.state[p]["step"]) == 8.0


# ------------------------------------------------------------------ names


@EACH
def test_braze_in_the_place_of_torchs_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, name, getattr(optim, name))
    (p, first), (q, second) = make(torch.optim, name), make(torch.optim, name, fused=False)
    assert type(first) is getattr(optim, name)
    for seed in range(2):
        feed(p, first, seed)
        feed(q, second, seed)
    assert_close(p, q)
