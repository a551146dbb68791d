"""One block's own forward as a graph: its children are leaves, and what it read of itself becomes guards.

``torch.fx`` traces by running the function with stand-ins for tensors, which silently bakes in whatever the
function does beside calling operators. Here everything that would be lost is an error instead: branches on
values or types, attributes assigned, contexts entered, random numbers drawn, text printed, tensors kept.
"""

from __future__ import annotations

import copy
import gc
import operator
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.proxy import Attribute, Proxy, TraceError

from braze._fusion.guards import Guards
from braze._fusion.purity import pure

__all__ = ["LOCK", "Untraceable", "trace"]


class Untraceable(Exception):
    """The block cannot be rewritten; the text says why."""


LOCK = threading.RLock()
_active: BlockTracer | None = None  # of the thread that holds LOCK
_owner: int | None = None

_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
    torch.Size,
    Enum,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
)
_CONTAINERS = (list, dict, OrderedDict, set, frozenset)
# Attributes of every nn.Module that forward may look at without its meaning depending on them.
_UNGUARDED = frozenset(
    name for name in nn.Module().__dict__ if name not in ("training", "_modules")
) | {"_parameters", "_buffers"}


def _tracer() -> BlockTracer | None:
    return _active if _owner == threading.get_ident() else None


class _Typed:
    """Mixin of stand-ins that do not lie about their type: the code is told so, or refused.

    The tracer's own ``isinstance(x, Proxy)`` is answered by the real type and never gets here.
    """

    known_tensor = False
    _is_param = False

    @property
    def __class__(self) -> Any:
        if self.known_tensor:
            return Tensor
        raise TraceError("its forward branches on the type of an intermediate result")

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TraceError("its forward changes the class of an intermediate result")


class _StandIn(_Typed, Proxy):
    def __getattr__(self, name: str) -> Any:
        return _AttributeStandIn(self, name)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# torch.fx has none of them, and would take a += b for a = a + b, which is another thing for a's other names.
for _name in torch.fx.graph.inplace_methods:
    setattr(_StandIn, f"__{_name}__", _in_place(_name))


class _AttributeStandIn(_Typed, Attribute):
    pass


class BlockTracer(torch.fx.Tracer):
    def __init__(self, root: nn.Module, inline: frozenset[nn.Module], training: bool) -> None:
        super().__init__()
        self.root = root
        self.graph = torch.fx.Graph(tracer_cls=torch.fx.Tracer)
        self.tensor_attrs = {}
        self.inline = inline | {root}
        self.training = training
        self.guards = Guards()
        self.paths = {module: name for name, module in root.named_modules()}
        self.recorded: list[tuple[nn.Module, type]] = []
        self.stand_ins: list[weakref.ref[Proxy]] = []
        self.containers: list[tuple[str, Any, Any]] = []

    # --- what torch.fx asks ---

    def proxy(self, node: torch.fx.Node) -> Proxy:
        stand_in = _StandIn(node, self)
        self.stand_ins.append(weakref.ref(stand_in))
        return stand_in

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor):
            raise Untraceable("its forward uses a tensor that is no input, parameter or buffer")
        if isinstance(a, nn.Module):
            raise Untraceable("its forward passes a module to a function")
        return super().create_arg(a)

    def path(self, module: nn.Module) -> str:
        try:
            return self.paths[module]
        except KeyError:
            name = type(module).__name__
            raise Untraceable(
                f"its forward calls a {name} that is not among its children"
            ) from None

    # --- what the recorded modules tell ---

    def record(self, module: nn.Module) -> None:
        """Lets ``module`` tell what is read of it from now on."""
        if issubclass(type(module), _Recorder) or isinstance(module, torch.jit.ScriptModule):
            return
        original = type(module)
        try:
            module.__class__ = _recorder(original)
        except TypeError:
            raise Untraceable(f"the class of its {original.__name__} cannot be changed") from None
        self.recorded.append((module, original))

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """``module.__dict__[name]`` was read."""
        if module not in self.paths:  # made by the forward itself, as a slice of a ModuleList is
            return value
        if name == "training":
            if module is not self.root:
                self.guards.attribute(self.path(module), name, self.training)
            return self.training
        if name == "_modules":
            self.guards.children(self.path(module), tuple(value))
            for child in value.values():
                if child is not None:
                    self.record(child)
            return value
        if name in _UNGUARDED:
            return value
        path = self.path(module)
        if type(value) in _CONTAINERS and _has_atoms(value):
            known = copy.copy(value)
            self.guards.attribute(path, name, known)
            self.containers.append((name, value, known))
        elif _is_atomic(value):
            self.guards.attribute(path, name, value)
        else:
            kind = type(value).__name__
            raise Untraceable(f"its forward reads self.{name}, a {kind} that may change unseen")
        return value

    def fetched(self, module: nn.Module, name: str, value: Any) -> Any:
        """A child, parameter or buffer was read."""
        path = self.path(module)
        if isinstance(value, Tensor):
            return self.create_proxy("get_attr", f"{path}.{name}".lstrip("."), (), {})
        if isinstance(value, nn.Module):
            self.guards.present(path, name)
            self.record(value)
        elif value is None:
            self.guards.missing(path, name)
        return value

    def called(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path(module)
        if module in self.inline:
            self.guards.quiet(path)
            return call(*args, **kwargs)
        return self.create_proxy("call_module", path, args, kwargs)

    def restore(self) -> None:
        for module, original in self.recorded:
            module.__class__ = original


def _has_atoms(container: Any) -> bool:
    items = [*container.keys(), *container.values()] if isinstance(container, dict) else container
    return all(map(_is_atomic, items))


def _is_atomic(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_atomic, value))
    return isinstance(value, _ATOMS)


class _Recorder:
    """Mixin in front of a module's class while it is traced."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("__") or (tracer := _tracer()) is None:
            return value
        if name in object.__getattribute__(self, "__dict__"):
            return tracer.read(self, name, value)  # type: ignore[arg-type]
        return value

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        tracer = _tracer()
        return value if tracer is None else tracer.fetched(self, name, value)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        tracer = _tracer()
        if tracer is not None and name != "__class__" and self in tracer.paths:
            raise Untraceable(f"its forward assigns self.{name}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if _tracer() is not None:
            raise Untraceable(f"its forward deletes self.{name}")
        super().__delattr__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        tracer = _tracer()
        if tracer is None:
            return call(*args, **kwargs)
        return tracer.called(self, call, args, kwargs)  # type: ignore[arg-type]


def _recorder(original: type[nn.Module]) -> type[Any]:
    known = _RECORDERS.get(original)
    if known is None:
        body = {"__module__": original.__module__}
        known = _RECORDERS[original] = type(original.__name__, (_Recorder, original), body)
    return known


_RECORDERS: dict[type[nn.Module], type[Any]] = {}


@contextmanager
def _activate(tracer: BlockTracer) -> Iterator[None]:
    global _active, _owner
    with LOCK:
        before = _active, _owner
        try:
            tracer.record(tracer.root)
            _active, _owner = tracer, threading.get_ident()
            yield
        finally:
            _active, _owner = before
            tracer.restore()


def trace(
    module: nn.Module,
    forward: Callable[..., Any],
    kinds: tuple[Any, ...],
    names: tuple[tuple[str, Any], ...],
    training: bool,
    inline: frozenset[nn.Module] = frozenset(),
) -> BlockTracer:
    """Traces ``forward(module, ...)`` for arguments of these kinds (see :mod:`braze._fusion.kinds`).

    Returns the tracer with its ``graph`` and ``guards``. Raises Untraceable.
    """
    tracer = BlockTracer(module, inline, training)
    placeholders: list[Proxy] = []

    def stand_in(kind: Any) -> Any:
        if kind == "tensor":
            name = f"input_{len(placeholders)}"
            placeholders.append(tracer.create_proxy("placeholder", name, (), {}))
            placeholders[-1].known_tensor = True  # type: ignore[attr-defined]
            return placeholders[-1]
        what, value = kind
        return what(map(stand_in, value)) if what in (list, tuple) else value

    try:
        with _activate(tracer):
            args = [stand_in(kind) for kind in kinds]
            kwargs = {name: stand_in(kind) for name, kind in names}
            with pure(Untraceable):
                output = forward(module, *args, **kwargs)
            tracer.create_node("output", "output", (tracer.create_arg(output),), {})
            for name, value, known in tracer.containers:
                if value != known:
                    raise Untraceable(f"its forward changes self.{name}")
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(_reason(error)) from error
    del output, args, kwargs
    placeholders.clear()
    _check_none_kept(tracer)
    return tracer


def _check_none_kept(tracer: BlockTracer) -> None:
    for generation in range(4):  # the youngest first: they are all young, and the oldest takes long
        if all(reference() is None for reference in tracer.stand_ins):
            return
        if generation < 3:
            gc.collect(generation)
    raise Untraceable("its forward keeps a tensor outside of itself")


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if isinstance(error, TraceError):
        if "control flow" in text:
            return "its forward branches on a tensor's value, shape or dtype"
        return text
    return f"its forward cannot be traced ({type(error).__name__}: {text[:200]})"
