"""Modules: the inputs of torch's module_db, and checks of them.

A check gets a namespace, torch.nn or braze.nn, and an input, which makes its module there. Torch's container
modules are made by torch, and get the namespace's dropouts in place of their own.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import braze.nn
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state
from torch.fx.experimental.optimization import fuse as fuse_by_fx
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing._internal import common_modules as database
from torch.testing._internal.common_utils import freeze_rng_state, noncontiguous_like
from torch_databases import (
    DOUBLE,
    FLOATS,
    SINGLE,
    Case,
    Check,
    expand,
    near,
    raises_as,
    register,
    same,
    set_seed,
    weights_like,
)

BATCH_NORMS = {
    "BatchNorm1d": (6, 5, 3),
    "BatchNorm2d": (3, 5, 4, 2),
    "BatchNorm3d": (2, 5, 2, 3, 2),
}
DROPOUTS = {
    "Dropout": (6, 5),
    "Dropout1d": (6, 5, 3),
    "Dropout2d": (3, 5, 4, 2),
    "Dropout3d": (2, 5, 2, 3, 2),
    "AlphaDropout": (6, 5),
    "FeatureAlphaDropout": (3, 5, 4, 2),
}
CONTAINERS = ("TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoderLayer")


def replaced(module: nn.Module, namespace: Any) -> nn.Module:
    """With the namespace's classes in place of torch's, all over the tree."""
    for name, child in module.named_children():
        if type(child).__name__ in DROPOUTS:
            setattr(module, name, getattr(namespace, type(child).__name__)(child.p, child.inplace))
        else:
            replaced(child, namespace)
    return module


@dataclass(frozen=True)
class Input:
    """Arguments of a constructor and of forward."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Any, ...]
    input_kwargs: dict[str, Any]
    dtype: torch.dtype

    def make(self, namespace: Any, training: bool = True, **extra: Any) -> Any:
        """The same numbers in every namespace, and none of them a default."""
        with freeze_rng_state():
            set_seed()
            made = getattr(namespace, self.name)(*self.args, **{**self.kwargs, **extra})
            if self.container:
                replaced(made, namespace).to(self.dtype)
            if self.batch_norm and not made.state_dict().get("weight", torch.ones(1)).is_meta:
                with torch.no_grad():
                    for i, t in enumerate([*made.parameters(), *made.buffers()]):
                        if t.is_floating_point():
                            t.copy_(torch.linspace(0.5, 1.5 + i, len(t)))
        return made.train(training)

    @property
    def container(self) -> bool:
        return self.name in CONTAINERS

    @property
    def batch_norm(self) -> bool:
        return "BatchNorm" in self.name

    @property
    def x(self) -> Tensor:
        found: Tensor = self.inputs[0].detach().clone()
        return found

    def call(self, module: Any, x: Tensor) -> Tensor:
        set_seed()
        y: Tensor = module(x, *self.inputs[1:], **self.input_kwargs)
        return y

    def gradients(self, module: Any, x: Tensor) -> list[Tensor]:
        y = self.call(module, x.requires_grad_())
        wanted = [x, *module.parameters()]
        found = torch.autograd.grad(y, wanted, weights_like(y), allow_unused=True)
        return [y.detach(), *(g for g in found if g is not None)]


# ------------------------------------------------------------------- samples


def everything(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Input]]:
    set_seed()
    if name in DROPOUTS:
        x = torch.linspace(1, 2, torch.Size(DROPOUTS[name]).numel(), dtype=torch.float64)
        x = x.to(dtype).view(DROPOUTS[name])
        for p, inplace in ((0.5, False), (0.5, True), (0.0, False), (1.0, False)):
            yield f"p{p}{'-inplace' * inplace}", Input(name, (p, inplace), {}, (x,), {}, dtype)
        return
    known = {info.module_cls: info for info in database.module_db}
    base = name.removeprefix("Sync") if name != "SyncBatchNorm" else "BatchNorm2d"
    info = known[getattr(nn, base)]
    given = info.module_inputs_func(info, "cpu", dtype, False, True)
    for index, one in enumerate(given):
        if name in CONTAINERS and index % 10:  # their samples are hundreds
            continue
        made, forward = one.constructor_input, one.forward_input
        kwargs = dict(made.kwargs)
        if name != "TransformerEncoder":
            kwargs["dtype"] = dtype
        yield (
            f"{index}-{one.desc or 'plain'}".replace(" ", "_").replace("[", "").replace("]", ""),
            Input(name, made.args, kwargs, forward.args, forward.kwargs, dtype),
        )


def typical(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Input]]:
    """One of each kind, of few numbers; no empty batch."""
    if name in CONTAINERS or name in DROPOUTS:
        yield from list(everything(name, dtype))[:2]
    else:
        kinds = (
            "plain",
            "affine",
            "3d_input",
            "simple_average",
            "not_affine",
            "not_tracking_stats",
        )
        for desc, given in everything(name, dtype):
            if desc.split("-")[1] in kinds or "simple" in desc:
                yield desc, given


def one(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Input]]:
    yield next(everything(name, dtype))


# -------------------------------------------------------------------- checks

CHECKS: list[Check] = []
check = functools.partial(register, CHECKS)


def _alike(call: Callable[[Any], Any], namespace: Any, factor: float = 1.0) -> None:
    near(call(namespace), call(nn), factor)


@check(FLOATS, everything)
def forward(namespace: Any, given: Input) -> None:
    """Torch's outputs and buffers, over three steps of training and in evaluation."""

    def run(namespace: Any) -> Any:
        module = given.make(namespace)
        found = []
        for step in range(3):
            y = given.call(module, given.x * (step + 1))
            found.append((y.shape, y.dtype, y.stride()) if _random(given) else y.detach())
        module.eval()
        return [*found, given.call(module, given.x).detach(), dict(module.state_dict())]

    _alike(run, namespace, 4.0)


def _random(given: Input) -> bool:
    return not given.batch_norm and (given.container or given.args[0] == 0.5)


@check(FLOATS, everything)
def gradients(namespace: Any, given: Input) -> None:
    """Torch's, of the input and of every parameter; of what draws numbers in evaluation only."""
    for training in (True, False):
        inplace = given.name in DROPOUTS and given.args[-1]
        if inplace or (training and _random(given)):
            continue

        def run(namespace: Any, training: bool = training) -> Any:
            return given.gradients(given.make(namespace, training), given.x)

        _alike(run, namespace, 8.0)


@check(SINGLE, typical)
def repeats(namespace: Any, given: Input) -> None:
    """At a seed in training; any time in evaluation."""
    module, other = given.make(namespace), given.make(namespace)
    same(given.call(module, given.x), given.call(other, given.x))
    module.eval(), other.eval()
    set_seed(1)
    same(module(given.x, *given.inputs[1:], **given.input_kwargs), given.call(other, given.x))


def _differentiable(namespace: Any, given: Input) -> tuple[Any, tuple[Tensor, ...]]:
    module = given.make(namespace)
    names = [n for n, _ in module.named_parameters()]
    buffers = dict(module.named_buffers())

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        set_seed()
        state = {n: b.clone() for n, b in buffers.items()}
        state.update(zip(names, parameters, strict=True))
        y: Tensor = functional_call(
            module, state, (x.clone(), *given.inputs[1:]), given.input_kwargs
        )
        return y

    leaves = (given.x.requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters()))
    return function, leaves


@check(DOUBLE, typical)
def gradcheck(namespace: Any, given: Input) -> None:
    function, leaves = _differentiable(namespace, given)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@check(DOUBLE, typical)
def gradgradcheck(namespace: Any, given: Input) -> None:
    if given.container:
        return
    function, leaves = _differentiable(namespace, given)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@check(SINGLE, typical)
def noncontiguous(namespace: Any, given: Input) -> None:
    if given.args[-1:] == (True,) and given.name in DROPOUTS:
        return
    plain = given.gradients(given.make(namespace), given.x)
    strided = noncontiguous_like(given.x)
    near(given.gradients(given.make(namespace), strided.detach()), plain, 8.0)


@check(SINGLE, typical)
def memory_format(namespace: Any, given: Input) -> None:
    """Strides of the result and of the gradient are torch's in every memory format."""
    formats = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}.get(given.x.dim(), ())

    def run(namespace: Any) -> Any:
        found = []
        for memory_format in formats:
            module = given.make(namespace).to(memory_format=memory_format)
            x = given.x.contiguous(memory_format=memory_format).requires_grad_()
            y = module(x.clone())
            found.append([y.stride(), torch.autograd.grad(y.sum(), x)[0].stride()])
        return found

    _alike(run, namespace)


@check(SINGLE, everything)
def copies(namespace: Any, given: Input) -> None:
    """By deepcopy, pickle, torch.save of the module and of its state: same class, hooks, results."""
    module = given.make(namespace)
    given.call(module, given.x)

    def through_file(what: Any, **kwargs: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(what, buffer)
        buffer.seek(0)
        return torch.load(buffer, **kwargs)

    again = given.make(namespace)
    again.load_state_dict(through_file(module.state_dict(), weights_only=True))
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        through_file(module, weights_only=False),
        again,
    ):
        assert type(other) is type(module) and repr(other) == repr(module)
        same(dict(other.state_dict()), dict(module.state_dict()))
        same(given.call(other.eval(), given.x), given.call(module.eval(), given.x))
        module.train()


@check(SINGLE, one)
def weights_only(namespace: Any, given: Input) -> None:
    """A module of which one says that it is safe loads with weights_only."""
    module = given.make(namespace)
    # braze's are allowed already, and torch's context would forbid at its end what it is given.
    allowed = set(torch.serialization.get_safe_globals())
    kinds = ({type(m) for m in module.modules()} | {set}) - allowed
    if given.container:
        return
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals(list(kinds)):
        other = torch.load(buffer, weights_only=True)
    same(given.call(other.eval(), given.x), given.call(module.eval(), given.x))


@check(SINGLE, everything)
def state_of_the_other(namespace: Any, given: Input) -> None:
    """Torch's state loads here, and this one's there."""
    for source, target in ((nn, namespace), (namespace, nn)):
        module, other = given.make(source), given.make(target)
        given.call(module, given.x)
        other.load_state_dict(module.state_dict())
        same(dict(other.state_dict()), dict(module.state_dict()))
        near(given.call(other.eval(), given.x), given.call(module.eval(), given.x))
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in module.named_parameters()]


@check(FLOATS, one)
def factory(namespace: Any, given: Input) -> None:
    """device and dtype, the meta device, to_empty, skip_init, deferred defaults."""
    if not given.batch_norm:
        return

    def about(module: Any) -> Any:
        return {n: (t.device, t.dtype, t.shape) for n, t in module.state_dict().items()}

    def run(namespace: Any) -> Any:
        cls = getattr(namespace, given.name)
        meta = cls(*given.args, **given.kwargs, device="meta")
        found = [about(meta)]
        with torch.device("meta"):
            found.append(about(cls(*given.args, **given.kwargs)))
        real = meta.to_empty(device="cpu")
        real.reset_parameters()
        found += [about(real), given.call(real, given.x)]
        skipped = nn.utils.skip_init(cls, *given.args, **given.kwargs)
        skipped.reset_parameters()
        return [*found, about(skipped), given.call(skipped, given.x)]

    _alike(run, namespace, 4.0)


@check(SINGLE, one)
def meta_and_fake(namespace: Any, given: Input) -> None:
    def run(namespace: Any) -> Any:
        x = given.x
        y = given.make(namespace).to("meta")(x.to("meta"))
        with FakeTensorMode() as mode:
            module = getattr(namespace, given.name)(*given.args, **given.kwargs)
            fake = module(mode.from_tensor(x))
        return [(t.shape, t.dtype, t.stride(), t.device) for t in (y, fake)]

    if not given.container:
        _alike(run, namespace)


@check(SINGLE, one)
def instances(namespace: Any, given: Input) -> None:
    """Torch's modules are instances of the namespace's class, and the namespace's of torch's."""
    ours, theirs = getattr(namespace, given.name), getattr(nn, given.name)
    assert isinstance(given.make(namespace), theirs), "not an instance of torch's class"
    assert isinstance(given.make(nn), ours), "torch's is not an instance of this class"


@check(SINGLE, one)
def subclasses_of_each_other(namespace: Any, given: Input) -> None:
    ours, theirs = getattr(namespace, given.name), getattr(nn, given.name)
    assert issubclass(ours, theirs) and issubclass(theirs, ours)


@check(SINGLE, one)
def subclasses(namespace: Any, given: Input) -> None:
    """A user's subclass with a forward that calls super, and its isinstance."""
    base = getattr(namespace, given.name)

    class Twice(base):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    module = Twice(*given.args, **given.kwargs).eval()
    plain = base(*given.args, **given.kwargs).eval()
    plain.load_state_dict(module.state_dict())
    same(given.call(module, given.x), 2 * given.call(plain, given.x))
    assert isinstance(module, base) and not isinstance(plain, Twice)


@check(SINGLE, everything)
def prints(namespace: Any, given: Input) -> None:
    assert repr(given.make(namespace)) == repr(given.make(nn))


@check(SINGLE, one)
def hooks(namespace: Any, given: Input) -> None:
    def run(namespace: Any) -> Any:
        module, seen = given.make(namespace, False), []
        module.register_forward_pre_hook(lambda m, args: seen.append(("pre", len(args))))
        module.register_forward_hook(lambda m, args, out: (seen.append("post"), out + 1)[1])
        module.register_full_backward_hook(lambda m, gi, go: seen.append(("back", len(gi))))
        module.register_full_backward_pre_hook(lambda m, go: seen.append(("back pre", len(go))))
        y = given.call(module, given.x.requires_grad_())
        y.sum().backward()
        return [y.detach(), seen]

    _alike(run, namespace, 4.0)


@check(SINGLE, one)
def conversions(namespace: Any, given: Input) -> None:
    """half, double, bfloat16 and swapped parameters."""

    def run(namespace: Any) -> Any:
        found = []
        for swap in (False, True):
            torch.__future__.set_swap_module_params_on_conversion(swap)
            try:
                for dtype in (torch.float64, torch.bfloat16):
                    module = given.make(namespace, False).to(dtype)
                    y = module(given.x.to(dtype))
                    found.append([y.detach(), {n: t.dtype for n, t in module.state_dict().items()}])
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)
        return found

    if not given.container:
        _alike(run, namespace, 4.0)


@check(SINGLE, typical)
def functional(namespace: Any, given: Input) -> None:
    """functional_call with other parameters, and vmap over a stack of modules."""

    def run(namespace: Any) -> Any:
        modules = [given.make(namespace, False) for _ in range(3)]
        with torch.no_grad():
            for i, module in enumerate(modules):
                for p in module.parameters():
                    p.mul_(i + 1)
        state = {n: t * 2 for n, t in modules[0].named_parameters()}
        found = [functional_call(modules[0], state, (given.x,)).detach()]
        parameters, buffers = stack_module_state(modules)

        def call(parameters: Any, buffers: Any) -> Any:
            return functional_call(modules[0], (parameters, buffers), (given.x,))

        if parameters or buffers:
            found.append(torch.vmap(call)(parameters, buffers).detach())
        return found

    if not given.container:
        _alike(run, namespace, 4.0)


@check(SINGLE, everything)
def symbolic_trace(namespace: Any, given: Input) -> None:
    """The traced model follows train() and eval(), as the model itself."""
    if given.container:
        return
    for first in (True, False):
        model = nn.Sequential(nn.Identity(), given.make(namespace)).train(first)
        traced = torch.fx.symbolic_trace(model)
        for training in (True, False, True):
            model.train(training), traced.train(training)
            x = given.x
            near(given.call(traced, x.clone()), given.call(model, x.clone()), 4.0)
        near(dict(traced.state_dict()), dict(model.state_dict()), 4.0)


def _traced(namespace: Any, given: Input, trace: Callable[[Any], Any]) -> None:
    """The same in evaluation, and in training where nothing is random."""
    if given.container and trace is not torch.jit.script:  # seconds each
        return
    for training in (False, True):
        if training and _random(given):
            continue
        module = given.make(namespace, training)
        expected = given.call(copy.deepcopy(module), given.x)
        near(given.call(trace(copy.deepcopy(module)), given.x), expected, 4.0)


@check(SINGLE, one)
def jit_script(namespace: Any, given: Input) -> None:
    _traced(namespace, given, torch.jit.script)


@check(SINGLE, one)
def jit_script_trains(namespace: Any, given: Input) -> None:
    """Scripted in training, it follows eval()."""
    scripted = torch.jit.script(given.make(namespace)).eval()
    near(given.call(scripted, given.x), given.call(given.make(namespace, False), given.x), 4.0)


@check(SINGLE, one)
def jit_trace(namespace: Any, given: Input) -> None:
    _traced(namespace, given, lambda m: torch.jit.trace(m, (given.x,), check_trace=False))


@check(SINGLE, one)
def export(namespace: Any, given: Input) -> None:
    _traced(
        namespace,
        given,
        lambda m: torch.export.export(
            m, (given.x, *given.inputs[1:]), given.input_kwargs, strict=False
        ).module(),
    )


@check(SINGLE, one)
def compiled(namespace: Any, given: Input) -> None:
    torch._dynamo.reset()
    _traced(namespace, given, lambda m: torch.compile(m, backend="aot_eager"))


# ------------------------------------------------------ batch norms alone


def batch_norms(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Input]]:
    if "BatchNorm" in name:
        yield from one(name, dtype)


def dropouts(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Input]]:
    if name in DROPOUTS:
        yield from list(everything(name, dtype))[:2]


def _set(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda module: setattr(module, name, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "momentum": _set("momentum", 0.7),
    "momentum_none": _set("momentum", None),
    "momentum_int": _set("momentum", 1),
    "momentum_tensor": _set("momentum", torch.tensor(0.5)),
    "eps": _set("eps", 0.3),
    "eps_negative": _set("eps", -1.0),
    "no_weight": _set("weight", None),
    "no_bias": _set("bias", None),
    "no_statistics": lambda m: (_set("running_mean", None)(m), _set("running_var", None)(m)),
    "no_mean": _set("running_mean", None),
    "no_count": _set("num_batches_tracked", None),
    "untracked": _set("track_running_stats", False),
    "reset": lambda m: m.reset_running_stats(),
    "reset_parameters": lambda m: m.reset_parameters(),
    "frozen": lambda m: m.requires_grad_(False),
    "tensor_weight": lambda m: (
        delattr(m, "weight"),
        setattr(m, "weight", torch.full((len(m.bias),), 2.0)),
    ),
    "float_count": _set("num_batches_tracked", torch.tensor(3.0)),
    "int32_count": _set("num_batches_tracked", torch.tensor(3, dtype=torch.int32)),
    "short_weight": _set("weight", nn.Parameter(torch.ones(2))),
    "half_statistics": lambda m: (
        m.running_mean.data.half(),
        setattr(m, "running_mean", m.running_mean.half()),
        setattr(m, "running_var", m.running_var.half()),
    ),
    "double_statistics": lambda m: (
        setattr(m, "running_mean", m.running_mean.double()),
        setattr(m, "running_var", m.running_var.double()),
    ),
    "double_weight": _set("weight", nn.Parameter(torch.ones(3).double())),
    "num_features": _set("num_features", 99),
    "mean_requires_grad": lambda m: m.running_mean.requires_grad_(),
    "var_requires_grad": lambda m: m.running_var.requires_grad_(),
    "mean_parameter": lambda m: (
        delattr(m, "running_mean"),
        setattr(m, "running_mean", nn.Parameter(torch.zeros(len(m.running_var)))),
    ),
    "expanded_mean": lambda m: setattr(
        m, "running_mean", torch.zeros(1).expand(len(m.running_var))
    ),
    "strided_mean": lambda m: setattr(m, "running_mean", torch.zeros(len(m.running_var), 2)[:, 0]),
}


def changes(name: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Input, Any]]]:
    for _, given in batch_norms(name, dtype):
        for change, function in CHANGES.items():
            yield change, (given, function)


@check(SINGLE, changes)
def changed_attributes(namespace: Any, about: tuple[Input, Any]) -> None:
    """What one sets on the module later: torch's results and buffers, or torch's type of error."""
    given, change = about

    def run(namespace: Any) -> Any:
        module = given.make(namespace)
        change(module)
        found = []
        for training in (True, True, False):
            module.train(training)
            try:
                found.append(given.call(module, given.x).detach())
            except Exception as error:
                found.append(type(error))
        return [*found, {n: t.detach().clone() for n, t in module.state_dict().items()}]

    _alike(run, namespace, 4.0)


def wrong_inputs(name: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Input, Any]]]:
    for _, given in batch_norms(name, dtype):
        x = given.x
        for what, wrong in {
            "one_dim": x.flatten(),
            "six_dims": x.reshape(*x.shape, *(1,) * (6 - x.dim())),
            "two_dims": x.flatten(1),
            "channels": torch.cat([x, x], 1),
            "one_value": x.flatten(2)[:1, :, :1].reshape(1, x.shape[1], *(1,) * (x.dim() - 2))
            if x.dim() > 2
            else x[:1],
            "integers": x.long(),
            "complex": x.to(torch.complex64),
            "double": x.double(),
            "none": None,
            "list": [x],
        }.items():
            yield what, (given, wrong)


@check(SINGLE, wrong_inputs)
def error_inputs(namespace: Any, about: tuple[Input, Any]) -> None:
    given, x = about
    for training in (True, False):
        raises_as(
            lambda t=training: given.make(namespace, t)(x), lambda t=training: given.make(nn, t)(x)
        )


@check(SINGLE, batch_norms)
def database_errors(namespace: Any, given: Input) -> None:
    """Constructors and calls that the database says fail."""
    if given.name == "SyncBatchNorm":
        return
    info = next(i for i in database.module_db if i.module_cls is getattr(nn, given.name))
    for error in info.module_error_inputs_func(info, "cpu", torch.float32, False, True):
        made, called = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        module = getattr(namespace, given.name)(*made.args, **made.kwargs)
        try:
            module(*called.args, **called.kwargs)
        except error.error_type as found:
            assert error.error_regex in str(found)
        else:
            raise AssertionError(f"no {error.error_type}")


@check(SINGLE, batch_norms)
def old_checkpoint(namespace: Any, given: Input) -> None:
    """Without a count, from before there was one."""
    state = given.make(namespace).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    module = given.make(namespace)
    module.load_state_dict(state)
    assert module.num_batches_tracked.item() == 0


@check(SINGLE, batch_norms)
def lazy(namespace: Any, given: Input) -> None:
    """The lazy class becomes, at its first call, what is an instance of this namespace's class."""
    if given.name == "SyncBatchNorm":
        return
    module = getattr(namespace, f"Lazy{given.name}")()
    x = given.x
    near(module(x), getattr(nn, given.name)(x.shape[1])(x), 4.0)
    assert isinstance(module, getattr(namespace, given.name)) and module.num_features == x.shape[1]


@check(SINGLE, batch_norms)
def synchronized(namespace: Any, given: Input) -> None:
    """torch.nn.SyncBatchNorm.convert_sync_batchnorm takes it."""
    model = nn.Sequential(nn.Identity(), given.make(namespace))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1], nn.SyncBatchNorm)
    assert list(converted.state_dict()) == list(model.state_dict())
    near(
        given.call(converted.eval(), given.x),
        given.call(given.make(namespace, False), given.x),
        4.0,
    )


def _block(namespace: Any, given: Input) -> tuple[nn.Sequential, Tensor]:
    dims = given.name.removeprefix("BatchNorm").removeprefix("Sync").removeprefix("BatchNorm")
    conv = getattr(nn, f"Conv{dims or '2d'}")
    set_seed()
    model = nn.Sequential(conv(2, given.args[0], 1), given.make(namespace), nn.ReLU()).eval()
    size = {"1d": (2, 2, 3), "3d": (2, 2, 3, 3, 3)}.get(dims, (2, 2, 3, 3))
    return model, torch.linspace(-1, 1, torch.Size(size).numel()).view(size)


@check(SINGLE, batch_norms)
def fused_by_torch(namespace: Any, given: Input) -> None:
    """torch.nn.utils.fusion folds it into a convolution."""
    model, x = _block(namespace, given)
    near(fuse_conv_bn_eval(model[0], model[1])(x), model[:2](x), 8.0)


@check(SINGLE, batch_norms)
def fused_by_fx(namespace: Any, given: Input) -> None:
    """torch.fx.experimental.optimization.fuse finds it."""
    if given.name == "SyncBatchNorm":
        return
    model, x = _block(namespace, given)
    fused = fuse_by_fx(model)
    near(fused(x), model(x), 8.0)
    assert not any("BatchNorm" in type(m).__name__ for m in fused.modules())


@check(SINGLE, batch_norms)
def fused_by_quantization(namespace: Any, given: Input) -> None:
    """torch.ao.quantization.fuse_modules finds it."""
    if given.name == "SyncBatchNorm":
        return
    model, x = _block(namespace, given)
    fused = torch.ao.quantization.fuse_modules(model, [["0", "1", "2"]])
    near(fused(x), model(x), 8.0)


@check(SINGLE, batch_norms)
def pruned_and_parametrized(namespace: Any, given: Input) -> None:
    """The weight is a tensor that a hook or a property makes."""

    def run(namespace: Any) -> Any:
        pruned = prune.l1_unstructured(given.make(namespace), "weight", amount=2)
        parametrized = given.make(namespace)
        parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
        return [given.gradients(m, given.x) for m in (pruned, parametrized)]

    _alike(run, namespace, 8.0)


@check(SINGLE, batch_norms)
def averaged(namespace: Any, given: Input) -> None:
    """torch.optim.swa_utils.update_bn resets and averages its statistics."""

    def run(namespace: Any) -> Any:
        model = nn.Sequential(given.make(namespace))
        torch.optim.swa_utils.update_bn([given.x, given.x * 2], model)
        return dict(model.state_dict())

    _alike(run, namespace, 4.0)


@check(SINGLE, batch_norms)
def gradient_hooks_and_accumulation(namespace: Any, given: Input) -> None:
    """.grad adds up, and hooks of parameters and post-accumulation run."""

    def run(namespace: Any) -> Any:
        module, seen = given.make(namespace), []
        for n, p in module.named_parameters():
            p.register_hook(lambda g, n=n: seen.append(n))
            p.register_post_accumulate_grad_hook(lambda p, n=n: seen.append(n + " done"))
        for _ in range(2):
            given.call(module, given.x).square().sum().backward()
        return [sorted(seen), {n: p.grad for n, p in module.named_parameters()}]

    _alike(run, namespace, 8.0)


# ------------------------------------------------------------- dropouts alone


@check(SINGLE, dropouts)
def random_of_dropouts(namespace: Any, given: Input) -> None:
    """Drops in training, is the identity in evaluation, and draws nothing there."""
    module = given.make(namespace)
    y = given.call(module, given.x)
    assert not torch.equal(y, given.x) and y.shape == given.x.shape
    x = given.x
    before = torch.get_rng_state()
    assert module.eval()(x) is x
    same(torch.get_rng_state(), before)


@check(SINGLE, dropouts)
def inplace_of_dropouts(namespace: Any, given: Input) -> None:
    x = given.x
    relation = given.make(namespace)(x) is x
    x = given.x
    assert relation is (given.make(nn)(x) is x)


@check(SINGLE, dropouts)
def attributes_of_dropouts(namespace: Any, given: Input) -> None:
    """p and inplace may be set later; wrong ones raise torch's errors at torch's time."""

    def run(namespace: Any) -> Any:
        found: list[Any] = []
        for p in (-0.1, 1.5, "half", None):
            try:
                getattr(namespace, given.name)(p)
                found.append(None)
            except Exception as error:
                found.append(type(error))
        module = given.make(namespace)
        for p in (0.0, 1.0, 0, 1, -0.5, 1.5):
            module.p = p
            try:
                found.append(given.call(module, given.x))
            except Exception as error:
                found.append(type(error))
        return found

    _alike(run, namespace)


SUBJECTS = (*BATCH_NORMS, "SyncBatchNorm", *DROPOUTS, *CONTAINERS)


def cases() -> Iterator[Case]:
    for name in SUBJECTS:
        yield from expand(name, CHECKS, nn, braze.nn, name)
