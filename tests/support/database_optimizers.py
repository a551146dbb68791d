"""Optimizers: the keyword sets of torch's optim_db, and checks that test_optim_db.py does not make.

A check gets a namespace, torch.optim or braze.optim, and a configuration. What it finds there must equal what
torch's for-loop finds.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import braze.optim
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal import common_optimizers as database
from torch_databases import DOUBLE, Case, Check, expand, near, register

SHAPES = ((3, 4), (5,), (), (0,), (1, 2, 3))
NAMES = ("SGD", "Adam", "AdamW")


@dataclass(frozen=True)
class Config:
    """One keyword set of the database."""

    name: str
    kwargs: dict[str, Any]
    dtype: torch.dtype

    def make(self, namespace: Any, params: Any, **extra: Any) -> Any:
        """braze's and torch's defaults; torch's is the for-loop, which all else is measured by."""
        given = {**copy.deepcopy(self.kwargs), **extra}
        if namespace is torch.optim:
            given.setdefault("foreach", False)
            if given.get("fused") or given.get("differentiable"):
                given["foreach"] = None if given.get("fused") else False
        return getattr(namespace, self.name)(params, **given)

    def params(self, *dtypes: torch.dtype) -> list[Parameter]:
        found = []
        for i, shape in enumerate(SHAPES):
            numbers = torch.linspace(-1, 1 + i, torch.Size(shape).numel(), dtype=torch.float64)
            dtype = (dtypes or (self.dtype,))[i % max(len(dtypes), 1)]
            found.append(Parameter(numbers.view(shape).to(dtype)))
        return found


def set_gradients(params: list[Parameter], seed: int = 0, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = grad.to(p.dtype)


def train(optimizer: Any, params: list[Parameter], steps: int = 3, first: int = 0) -> None:
    for seed in range(first, first + steps):
        set_gradients(params, seed)
        optimizer.step()


def numbers(optimizer: Any, params: list[Parameter]) -> list[Any]:
    """Values, and the state by its names."""
    state = [dict(optimizer.state[p]) if p in optimizer.state else {} for p in params]
    return [
        [p.detach().clone() for p in params],
        [{n: v.clone() if isinstance(v, Tensor) else v for n, v in s.items()} for s in state],
    ]


# ------------------------------------------------------------------- samples


def everything(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Config]]:
    info = next(i for i in database.optim_db if i.name == name)
    for given in info.optim_inputs_func(device="cpu", dtype=torch.float32):
        yield given.desc.replace(" ", "_") or "plain", Config(name, given.kwargs, dtype)


def some(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Config]]:
    """Without options, and with the most."""
    extra = {"momentum": 0.9, "nesterov": True} if name == "SGD" else {"amsgrad": True}
    yield "plain", Config(name, {"lr": 0.01}, dtype)
    yield "most", Config(name, {"lr": 0.01, "weight_decay": 0.1, **extra}, dtype)


# -------------------------------------------------------------------- checks

CHECKS: list[Check] = []
check = functools.partial(register, CHECKS)


def _alike(call: Callable[[Any], Any], namespace: Any, factor: float = 1.0) -> None:
    near(call(namespace), call(torch.optim), factor)


@check((torch.float32, torch.float64, torch.bfloat16), everything)
def steps(namespace: Any, config: Config) -> None:
    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        train(optimizer, params)
        return numbers(optimizer, params)

    _alike(run, namespace, 4.0)


@check(DOUBLE, everything)
def implementations_agree(namespace: Any, config: Config) -> None:
    """foreach, fused, capturable and differentiable give the for-loop's numbers."""

    def run(**flags: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params, **flags)
        train(optimizer, params)
        return numbers(optimizer, params)

    expected = run(foreach=False)
    for flags in ({"foreach": True}, {"fused": True}, {"fused": False}, {}):
        if flags.get("foreach") and isinstance(config.kwargs.get("lr"), Tensor):
            continue
        near(run(**flags), expected)


@check(DOUBLE, some)
def hooks(namespace: Any, config: Config) -> None:
    """Of the optimizer and of all optimizers, in torch's order, until they are removed."""

    def run(namespace: Any) -> Any:
        seen: list[str] = []
        params = config.params()
        optimizer = config.make(namespace, params)
        handles = [
            register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
            register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
            optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
            optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        ]
        try:
            train(optimizer, params, 2)
        finally:
            for handle in handles:
                handle.remove()
        train(optimizer, params, 1)
        return seen

    _alike(run, namespace)


@check(DOUBLE, some)
def changed_defaults(namespace: Any, config: Config) -> None:
    """Groups added later, and state loaded later, take the defaults of then."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params[:2])
        optimizer.defaults["lr"] = 0.5
        optimizer.defaults["weight_decay"] = 0.3
        optimizer.add_param_group({"params": params[2:]})
        train(optimizer, params)
        return [*numbers(optimizer, params), [g["lr"] for g in optimizer.param_groups]]

    _alike(run, namespace)


@check(DOUBLE, some)
def changed_groups(namespace: Any, config: Config) -> None:
    """Parameters put in and taken out of groups between steps; groups replaced; state cleared by hand."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params[:3])
        train(optimizer, params, 1)
        optimizer.param_groups[0]["params"].append(params[3])
        train(optimizer, params, 1, 1)
        del optimizer.param_groups[0]["params"][0]
        train(optimizer, params, 1, 2)
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "params": [params[0], params[4]]}
        train(optimizer, params, 1, 3)
        optimizer.state.clear()
        train(optimizer, params, 1, 4)
        optimizer.state[params[0]].clear()
        train(optimizer, params, 1, 5)
        return numbers(optimizer, params)

    _alike(run, namespace)


@check((torch.float32, torch.bfloat16), some)
def loads_other_dtypes(namespace: Any, config: Config) -> None:
    """State of a model in fp64 loads for one in fp32 or bf16, in torch's dtypes, and training goes on."""

    def run(namespace: Any) -> Any:
        source_params, params = config.params(torch.float64), config.params()
        source = config.make(namespace, source_params)
        train(source, source_params)
        optimizer = config.make(namespace, params)
        optimizer.load_state_dict(source.state_dict())
        loaded = numbers(optimizer, params)
        train(optimizer, params, 2, 3)
        return [loaded, numbers(optimizer, params)]

    _alike(run, namespace, 4.0)


@check(DOUBLE, some)
def loads_by_reference(namespace: Any, config: Config) -> None:
    """The state that is loaded is the tensors of the dict, where torch does not have to cast them."""

    def run(namespace: Any) -> Any:
        source_params, params = config.params(), config.params()
        source = config.make(namespace, source_params)
        train(source, source_params)
        optimizer = config.make(namespace, params)
        optimizer.load_state_dict(source.state_dict())
        pairs = zip(source_params, params, strict=True)
        return [
            source.state[a][n] is optimizer.state[b][n]
            for a, b in pairs
            for n in source.state[a]
            if isinstance(source.state[a][n], Tensor) and n != "step"
        ]

    _alike(run, namespace)


@check(DOUBLE, some)
def foreign_state(namespace: Any, config: Config) -> None:
    """Whatever one puts into the state or into a group stays, through state_dict and pickle too."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        train(optimizer, params, 1)
        optimizer.state[params[0]]["mine"] = torch.ones(2)
        optimizer.param_groups[0]["tag"] = "decoder"
        train(optimizer, params, 1, 1)
        other_params = config.params()
        other = config.make(namespace, other_params)
        other.load_state_dict(optimizer.state_dict())
        again = pickle.loads(pickle.dumps(optimizer))
        return [
            numbers(optimizer, params),
            other.state[other_params[0]]["mine"],
            other.param_groups[0]["tag"],
            sorted(again.state_dict()["param_groups"][0]),
        ]

    _alike(run, namespace)


@check(DOUBLE, some)
def same_parameter_twice(namespace: Any, config: Config) -> None:
    """In one group it is updated twice, with a warning."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, [params[0], params[0]])
        train(optimizer, params, 1)
        return params[0].detach()

    _alike(run, namespace)


@check(DOUBLE, some)
def overlapping_parameters(namespace: Any, config: Config) -> None:
    """Two that share memory are updated one after the other."""

    def run(namespace: Any) -> Any:
        memory = torch.linspace(0, 1, 8, dtype=torch.float64)
        params = [Parameter(memory[:6]), Parameter(memory[2:])]
        optimizer = config.make(namespace, params)
        train(optimizer, params, 1)
        return memory

    _alike(run, namespace)


@check(DOUBLE, some)
def overridden_init_group(namespace: Any, config: Config) -> None:
    """A subclass's _init_group is called in each step."""
    calls: list[int] = []

    class Mine(getattr(namespace, config.name)):  # type: ignore[misc]
        def _init_group(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super()._init_group(*args, **kwargs)

    params = config.params()
    train(Mine(params, **config.kwargs), params, 2)
    assert len(calls) == 2


@check(DOUBLE, some)
def subclasses(namespace: Any, config: Config) -> None:
    """A subclass's own step and attributes."""

    def run(namespace: Any) -> Any:
        class Mine(getattr(namespace, config.name)):  # type: ignore[misc]
            def __init__(self, params: Any, **kwargs: Any) -> None:
                super().__init__(params, **kwargs)
                self.count = 0

            def step(self, closure: Any = None) -> Any:
                self.count += 1
                for group in self.param_groups:
                    for p in group["params"]:
                        p.grad.mul_(0.5)
                return super().step(closure)

        params = config.params()
        optimizer = Mine(params, **{**config.kwargs, "foreach": False})
        train(optimizer, params, 2)
        return [*numbers(optimizer, params), optimizer.count, type(optimizer).__name__]

    _alike(run, namespace)


@check(DOUBLE, some)
def fractional_step(namespace: Any, config: Config) -> None:
    """A step count that is no whole number, as averaging states makes it."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        train(optimizer, params, 1)
        for p in params:
            if "step" in optimizer.state[p]:
                optimizer.state[p]["step"] += 1.5
        train(optimizer, params, 1, 1)
        return numbers(optimizer, params)

    _alike(run, namespace)


@check(DOUBLE, some)
def step_counts(namespace: Any, config: Config) -> None:
    """Their dtype, device and shape under every default dtype."""

    def run(namespace: Any) -> Any:
        found = []
        default = torch.get_default_dtype()
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                params = config.params()
                optimizer = config.make(namespace, params)
                train(optimizer, params, 1)
                found += [numbers(optimizer, params)[1]]
            finally:
                torch.set_default_dtype(default)
        return found

    _alike(run, namespace)


def _scaled(namespace: Any, config: Config, overflow: bool, **flags: Any) -> Any:
    """Values, gradients and scale after two steps with a GradScaler; one overflows."""
    params = config.params()
    optimizer = config.make(namespace, params, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    found: list[Any] = []
    for step in range(3):
        optimizer.zero_grad()
        loss = torch.stack([(p * (i + 1)).sum().square() for i, p in enumerate(params)]).sum()
        scaler.scale(loss).backward()
        # torch's fused SGD takes uninitialised memory for the momentum after an overflow at first
        if overflow and (step == 2 or (step == 0 and config.name != "SGD")):
            params[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        found.append([p.grad.clone() for p in params] if not overflow else [])
        found.append(scaler.get_scale())
    return [found, numbers(optimizer, params)]


@check((torch.float32,), some)
def grad_scaler(namespace: Any, config: Config) -> None:
    """.grad is unscaled after the step, as with torch's default step."""
    _alike(lambda n: _scaled(n, config, False), namespace, 4.0)


@check((torch.float32,), some)
def grad_scaler_overflow(namespace: Any, config: Config) -> None:
    """A step that overflows, the first one too, changes neither values nor state."""
    _alike(lambda n: _scaled(n, config, True), namespace, 4.0)


@check((torch.float32,), some)
def grad_scaler_fused(namespace: Any, config: Config) -> None:
    """fused=True as torch's fused=True."""
    _alike(lambda n: _scaled(n, config, False, fused=True), namespace, 4.0)


@check((torch.float32,), some)
def grad_scaler_fused_overflow(namespace: Any, config: Config) -> None:
    _alike(lambda n: _scaled(n, config, True, fused=True), namespace, 4.0)


@check((torch.float32,), some)
def found_inf(namespace: Any, config: Config) -> None:
    """A fused optimizer with found_inf and grad_scale set by hand: gradients unscaled, or nothing done."""

    def run(namespace: Any) -> Any:
        found = []
        for inf in (0.0, 1.0):
            params = config.params()
            optimizer = config.make(namespace, params, fused=True)
            train(optimizer, params, 1)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(inf)
            set_gradients(params, 1)
            optimizer.step()
            found += [numbers(optimizer, params), [p.grad for p in params]]
        return found

    _alike(run, namespace, 4.0)


@check(DOUBLE, some)
def swapped_tensors(namespace: Any, config: Config) -> None:
    """Parameters swapped with others by torch.utils.swap_tensors keep their place in the optimizer."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        train(optimizer, params, 1)
        for p in params:
            p.grad = None
            torch.utils.swap_tensors(p, Parameter(p.detach() * 2))
        train(optimizer, params, 2, 1)
        return numbers(optimizer, params)

    _alike(run, namespace)


@check(DOUBLE, some)
def data_changed(namespace: Any, config: Config) -> None:
    """p.data and p.grad replaced, by other shapes' memory too."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        train(optimizer, params, 1)
        for p in params:
            p.data = p.data.clone().mul_(3)
        train(optimizer, params, 1, 1)
        params[0].data = params[0].data.t().contiguous().t()
        train(optimizer, params, 1, 2)
        return numbers(optimizer, params)

    _alike(run, namespace)


def _dense(optimizer: Any, params: list[Parameter]) -> Any:
    values, states = numbers(optimizer, params)
    dense = [
        {n: v.to_dense() if isinstance(v, Tensor) and v.is_sparse else v for n, v in s.items()}
        for s in states
    ]
    return [values, dense]


@check(DOUBLE, everything)
def sparse_gradients(namespace: Any, config: Config) -> None:
    """Torch's numbers for several steps, or torch's type of error."""

    def run(namespace: Any) -> Any:
        params = [Parameter(torch.linspace(0, 1, 12, dtype=torch.float64).view(4, 3))]
        optimizer = config.make(namespace, params)
        found: list[Any] = []
        for step in range(3):
            index = torch.tensor([[step, 3, 3]])
            values = torch.ones(3, 3, dtype=torch.float64) * (step + 1)
            params[0].grad = torch.sparse_coo_tensor(index, values, (4, 3))
            try:
                optimizer.step()
            except Exception as error:
                return [*found, type(error)]
            found.append(_dense(optimizer, params)[0])
        return found

    _alike(run, namespace)


@check(DOUBLE, some)
def sparse_and_dense(namespace: Any, config: Config) -> None:
    """Gradients that change between sparse and dense, beside dense ones."""

    def run(namespace: Any) -> Any:
        params = [Parameter(torch.linspace(0, 1, 12, dtype=torch.float64).view(4, 3)) for _ in "ab"]
        optimizer = config.make(namespace, params)
        found: list[Any] = []
        for step in range(4):
            set_gradients(params, step)
            if step % 2:
                params[0].grad = params[0].grad.to_sparse()
            try:
                optimizer.step()
            except Exception as error:
                return [*found, type(error)]
            found.append([p.detach().clone() for p in params])
        return found

    _alike(run, namespace)


@check(DOUBLE, some)
def traced_by_make_fx(namespace: Any, config: Config) -> None:
    """A step traced with values and gradients as inputs gives the step's values for others."""

    def step(values: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        params = [v.clone() for v in values]  # a Parameter would hide the tracer's tensor
        optimizer = config.make(namespace, params)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        return params

    params = config.params()
    set_gradients(params)
    values, grads = [p.detach() for p in params], [p.grad for p in params]
    for mode in ("real", "fake"):
        traced = make_fx(step, tracing_mode=mode)(values, grads)
        others = [v * 2 + 1 for v in values]
        near(traced(others, grads), step(others, grads))


@check(DOUBLE, some)
def fake_tensors(namespace: Any, config: Config) -> None:
    """Model, gradients and state that are fake: shapes and dtypes of the state are torch's."""

    def run(namespace: Any) -> Any:
        with FakeTensorMode():
            params = [Parameter(torch.ones(3, 4)), Parameter(torch.ones(5))]
            optimizer = config.make(namespace, params)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            return [
                {n: (v.shape, v.dtype, type(v).__name__) for n, v in optimizer.state[p].items()}
                for p in params
            ]

    _alike(run, namespace)


@check(DOUBLE, some)
def mixed_dtypes(namespace: Any, config: Config) -> None:
    def run(namespace: Any) -> Any:
        params = config.params(torch.float32, torch.float64, torch.bfloat16)
        optimizer = config.make(namespace, params)
        train(optimizer, params)
        return numbers(optimizer, params)

    _alike(run, namespace, 4.0)


@check((torch.float32, torch.bfloat16), some)
def gradients_of_other_dtypes(namespace: Any, config: Config) -> None:
    """With grad_dtype=None a gradient may have any dtype."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        for _ in range(2):
            for p in params:
                p.grad_dtype = None
                p.grad = torch.full(p.shape, 0.25, dtype=torch.float64)
            try:
                optimizer.step()
            except Exception as error:
                return [type(error)]
        return numbers(optimizer, params)

    _alike(run, namespace, 4.0)


@check(DOUBLE, some)
def gradients_with_a_graph(namespace: Any, config: Config) -> None:
    """backward(create_graph=True) before the step."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        for _ in range(2):
            optimizer.zero_grad()
            torch.stack([p.pow(3).sum() for p in params]).sum().backward(create_graph=True)
            optimizer.step()
        return numbers(optimizer, params)

    _alike(run, namespace)


@check(DOUBLE, some)
def optimizer_in_backward(namespace: Any, config: Config) -> None:
    """One optimizer for each parameter, stepped by its hook."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizers = {p: config.make(namespace, [p]) for p in params}
        for p in params:
            p.register_post_accumulate_grad_hook(
                lambda p: (optimizers[p].step(), optimizers[p].zero_grad())[0]
            )
        for _ in range(2):
            torch.stack([p.square().sum() for p in params]).sum().backward()
        return [numbers(o, [p]) for p, o in optimizers.items()]

    _alike(run, namespace)


@check(DOUBLE, some)
def zeroed_gradients(namespace: Any, config: Config) -> None:
    """zero_grad(False) zeroes in place, True releases; both before any gradient too."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        optimizer.zero_grad(set_to_none=False)
        found: list[Any] = [[p.grad is None for p in params]]
        set_gradients(params)
        grads = [p.grad for p in params]
        optimizer.zero_grad(set_to_none=False)
        found.append([p.grad is g and not g.any() for p, g in zip(params, grads, strict=True)])
        optimizer.step()
        optimizer.zero_grad()
        return [*found, [p.grad is None for p in params], *numbers(optimizer, params)]

    _alike(run, namespace)


@check(DOUBLE, some)
def wrong_arguments(namespace: Any, config: Config) -> None:
    """Types of errors of the constructor and of add_param_group."""

    def run(namespace: Any) -> Any:
        params = config.params()
        leaf = torch.ones(2, requires_grad=True)
        found: list[Any] = []
        for given in (
            [],
            params[0],
            set(params),
            [leaf * 2],
            ["text"],
            None,
            3,
            [{"params": params[:2]}, {"params": params[1:]}],
            [{"params": set(params)}],
            [{"lr": 1.0}],
            iter(params),
            {f"p{i}": p for i, p in enumerate(params)}.items(),
            [torch.ones(2)],
            [torch.ones(2, dtype=torch.int64)],
            [("a", params[0]), params[1]],
        ):
            try:
                found.append(len(config.make(namespace, given).param_groups))
            except Exception as error:
                found.append(type(error))
        optimizer = config.make(namespace, params[:2])
        for group in (
            {"params": params[0]},
            [params[2]],
            {"params": [leaf * 1]},
            {"params": params[2]},
        ):
            try:
                found.append(optimizer.add_param_group(group))
            except Exception as error:
                found.append(type(error))
        for key in ("lr", "weight_decay"):
            try:
                found.append(len(config.make(namespace, params, **{key: -1.0}).param_groups))
            except Exception as error:
                found.append(type(error))
        return found

    _alike(run, namespace)


@check(DOUBLE, some)
def odd_numbers(namespace: Any, config: Config) -> None:
    """lr as int, numpy's float, bool; lr of 0 and of 1e300; nan and infinite gradients."""
    import numpy

    def run(namespace: Any) -> Any:
        found = []
        for lr in (1, numpy.float64(0.1), True, 0.0, 1e30):
            params = config.params()
            optimizer = config.make(namespace, params, lr=lr)
            train(optimizer, params, 2)
            found.append([numbers(optimizer, params), type(optimizer.param_groups[0]["lr"])])
        for value in (float("nan"), float("inf"), 0.0, 1e-300):
            params = config.params()
            optimizer = config.make(namespace, params)
            for p in params:
                p.grad = torch.full_like(p, value)
            optimizer.step()
            found.append(numbers(optimizer, params))
        return found

    _alike(run, namespace)


@check(DOUBLE, some)
def strange_groups(namespace: Any, config: Config) -> None:
    """Empty groups, groups without gradients, parameters that need no gradient."""

    def run(namespace: Any) -> Any:
        params = config.params()
        params[1].requires_grad_(False)
        groups = [{"params": []}, {"params": params[:2]}, {"params": params[2:], "lr": 0.0}]
        optimizer = config.make(namespace, groups)
        train(optimizer, params, 2)
        for p in params[2:]:
            p.grad = None
        optimizer.step()
        return numbers(optimizer, params)

    _alike(run, namespace)


@check(DOUBLE, some)
def grad_modes(namespace: Any, config: Config) -> None:
    """A step under no_grad, in inference mode, with anomaly detection and in a closure that raises."""

    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        for mode in (torch.no_grad, torch.enable_grad, torch.autograd.detect_anomaly):
            set_gradients(params)
            with mode():
                optimizer.step()
        before = numbers(optimizer, params)

        def fails() -> Tensor:
            raise KeyError("closure")

        try:
            optimizer.step(fails)
        except KeyError:
            before.append("raised")
        return [*before, torch.is_grad_enabled(), *numbers(optimizer, params)]

    _alike(run, namespace)


@check(DOUBLE, some)
def inference_mode(namespace: Any, config: Config) -> None:
    def run(namespace: Any) -> Any:
        params = config.params()
        optimizer = config.make(namespace, params)
        train(optimizer, params, 1)
        try:
            with torch.inference_mode():
                optimizer.step()
        except Exception as error:
            return type(error)
        return numbers(optimizer, params)

    _alike(run, namespace)


@check((torch.complex128,), some)
def complex_parameters(namespace: Any, config: Config) -> None:
    def run(namespace: Any) -> Any:
        p = Parameter(
            torch.view_as_complex(torch.linspace(0, 1, 8, dtype=torch.float64).view(4, 2))
        )
        optimizer = config.make(namespace, [p])
        for step in range(3):
            p.grad = torch.full_like(p, complex(step + 1, -2))
            optimizer.step()
        return [torch.view_as_real(p.detach())]

    _alike(run, namespace)


@check(DOUBLE, some)
def versions(namespace: Any, config: Config) -> None:
    """A saved parameter that a step changed is an error in backward."""

    def run(namespace: Any) -> Any:
        p = Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = config.make(namespace, [p])
        loss = p.square().sum()
        p.grad = torch.ones_like(p)
        optimizer.step()
        try:
            loss.backward()
        except RuntimeError as error:
            return "modified by an inplace operation" in str(error)
        return None

    _alike(run, namespace)


def cases() -> Iterator[Case]:
    for name in NAMES:
        yield from expand(name, CHECKS, torch.optim, braze.optim, name)
