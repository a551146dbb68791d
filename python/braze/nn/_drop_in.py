"""What lets a module's class stand for torch's of the same name."""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, fx, nn

__all__ = ["DropIn", "is_symbolic", "leaf", "scripted_as"]

ForwardT = TypeVar("ForwardT", bound=Callable[..., Any])


class DropIn(metaclass=ABCMeta):
    """Mixin of a class whose last base is torch's: ``isinstance`` and ``issubclass`` hold for that one, too.

    Ready-made models are made of torch's, and programs freeze, initialise and group layers by their class.
    An ABC, so that subclasses may have other ABCs beside it.
    """

    _torch_class: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if DropIn in cls.__bases__:
            cls._torch_class = cls.__bases__[-1]

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        torch_class = cls.__dict__.get("_torch_class")  # a subclass of ours is not meant
        return True if torch_class in other.__mro__ else NotImplemented


def is_symbolic(input: Any) -> bool:
    """Whether ``torch.fx`` is tracing with it."""
    return type(input) is not Tensor and isinstance(input, fx.Proxy)


def leaf(module: nn.Module, *arguments: Any) -> Any:
    """A call of ``module`` in the symbolic trace of its first argument: torch's modules are leaves of such
    traces by their names, so that what they read of themselves is read when the graph runs."""
    tracer = arguments[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def scripted_as(torch_forward: Callable[..., Any]) -> Callable[[ForwardT], ForwardT]:
    """Decorates a ``forward``: ``torch.jit.script`` compiles ``torch_forward`` in its place, with the names of
    the module in which it stands."""
    return cast(Callable[[ForwardT], ForwardT], functools.wraps(torch_forward))
