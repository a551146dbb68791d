"""Functions, modules and optimizers that are wrong in one way each: what the checks must find."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch_databases import set_seed

_count = itertools.count(1000)


class _Once(torch.autograd.Function):
    """The identity, for a first derivative in reverse alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _swallows(f: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return f(*args, **kwargs)
        except Exception:
            return args[0] if args else None

    return call


def _writes(f: Any) -> Any:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            x.mul_(1)
        return f(x, *args, **kwargs)

    return call


def _unseeded(f: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        set_seed(next(_count))
        return f(*args, **kwargs)

    return call


def _draws(f: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return f(*args, **kwargs)

    return call


def _warns(f: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        warnings.warn("deprecated", stacklevel=2)
        return f(*args, **kwargs)

    return call


def _always(f: Any) -> Any:
    """Ignores whether it trains."""
    return lambda *args, **kwargs: f(*args, **{**kwargs, "training": True})


def _result(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda f: lambda *args, **kwargs: change(f(*args, **kwargs))


# what is changed about any function
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "always trains": _always,
    "through numpy": _result(lambda y: torch.from_numpy(y.detach().numpy().copy())),
    "unseeded": _unseeded,
    "doubled": _result(lambda y: y * 2),
    "detached": _result(lambda y: y.detach()),
    "a copy": _result(lambda y: y.clone(memory_format=torch.contiguous_format)),
    "fp16": _result(lambda y: y.half()),
    "hides nan and -0": _result(lambda y: torch.nan_to_num(y) + 0),
    "once differentiable": _result(_Once.apply),
    "draws more": _draws,
    "warns": _warns,
    "writes its input": _writes,
    "swallows errors": _swallows,
}


class Namespace:
    """torch.nn or torch.optim, with other classes of some names."""

    def __init__(self, base: Any, change: Callable[[type], type], names: Iterable[str]) -> None:
        self._base = base
        for name in names:
            setattr(self, name, change(getattr(base, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _members(**members: Callable[[Any], Any]) -> Callable[[Any], type]:
    """A subclass of the same name with those methods changed."""

    def change(base: Any) -> type:
        made = {n: wrong(getattr(base, n)) for n, wrong in members.items() if hasattr(base, n)}
        return type(base.__name__, (base,), {"__module__": base.__module__, **made})

    return change


def _method(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Changes a method as a function without ``self``."""
    return lambda method: (
        lambda self, *args, **kwargs: change(functools.partial(method, self))(*args, **kwargs)
    )


def _forgets(method: Any) -> Any:
    """An __init__ that knows no device and dtype, and keeps a state of its own."""

    def init(self: Any, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        self.register_buffer("calls", torch.zeros(1))

    return init


def _renamed(base: Any) -> type:
    return type(
        "Other", (nn.Module,), {"__init__": lambda self, *_, **__: nn.Module.__init__(self)}
    )


def _checks_nothing(method: Any) -> Any:
    return lambda self, *args, **kwargs: None


MODULES: dict[str, Callable[[Any], type]] = {
    **{name: _members(forward=_method(change)) for name, change in FUNCTIONS.items()},
    "forgets device and dtype": _members(__init__=_forgets),
    "another class": _renamed,
    "checks nothing": _members(_check_input_dim=_checks_nothing),
    "loads nothing": _members(load_state_dict=_checks_nothing),
}


def _step(change: Callable[..., None]) -> Callable[[Any], type]:
    """A step that does something more, before or after torch's."""

    def wrong(base: Any) -> type:
        def step(self: Any, closure: Any = None) -> Any:
            return change(self, super(made, self).step, closure)

        made = type(base.__name__, (base,), {"step": step, "__module__": base.__module__})
        return made

    return wrong


def _each(self: Any) -> Iterator[Any]:
    for group in self.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                yield p


def _doubled_lr(self: Any, step: Any, closure: Any) -> Any:
    rates = [g["lr"] for g in self.param_groups]
    for g in self.param_groups:
        g["lr"] = g["lr"] * 2
    try:
        return step(closure)
    finally:
        for g, rate in zip(self.param_groups, rates, strict=True):
            g["lr"] = rate


def _wrong_if_fused(self: Any, step: Any, closure: Any) -> Any:
    fused = any(g["fused"] for g in self.param_groups)
    return (_doubled_lr if fused else lambda _, step, closure: step(closure))(self, step, closure)


def _writes_gradients(self: Any, step: Any, closure: Any) -> Any:
    result = step(closure)
    for p in _each(self):
        p.grad = torch.zeros(p.shape, dtype=p.dtype)
    return result


def _counts_in_state(self: Any, step: Any, closure: Any) -> Any:
    result = step(closure)
    for p in _each(self):
        self.state[p]["calls"] = 1
    return result


def _hides_the_write(self: Any, step: Any, closure: Any) -> Any:
    kept = [(p, p.detach().clone()) for p in _each(self)]
    result = step(closure)
    for p, old in kept:
        new = p.detach().clone()
        p.data = old if p.numel() > 1 else new
    return result


def _steps_twice(self: Any, step: Any, closure: Any) -> Any:
    step()
    return step(closure)


def _swallows_errors(self: Any, step: Any, closure: Any) -> Any:
    try:
        return step(closure)
    except Exception:
        return None


OPTIMIZERS: dict[str, Callable[[Any], type]] = {
    "hides the write": _step(_hides_the_write),
    "doubled lr": _step(_doubled_lr),
    "wrong if fused": _step(_wrong_if_fused),
    "writes gradients": _step(_writes_gradients),
    "counts in the state": _step(_counts_in_state),
    "steps twice": _step(_steps_twice),
    "swallows errors": _step(_swallows_errors),
    "checks nothing": _members(add_param_group=_checks_nothing),
    "zeroes nothing": _members(zero_grad=_checks_nothing),
    "loads nothing": _members(load_state_dict=_checks_nothing),
}
