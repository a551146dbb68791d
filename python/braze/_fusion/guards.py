"""What must still hold of a block for its traced graph to be what its forward would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from braze.nn._activation import has_hooks

__all__ = ["Guards"]


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


class Guards:
    """Conditions, collected during a trace and compiled into one function of the block."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[Any, ...]] = {}

    def attribute(self, path: str, name: str, value: Any) -> None:
        """The attribute has still this value, and this type."""
        place = f"{_expression(path)}.__dict__.get({name!r}, absent)"
        if value is None or isinstance(value, (bool, type)) or callable(value):
            self._add("{place} is {0}", place, value)
        else:
            self._add("{place} == {0}", place, value)

    def children(self, path: str, names: tuple[str, ...]) -> None:
        self._add("tuple({place}) == {0}", f"{_expression(path)}._modules", names)

    def present(self, path: str, name: str) -> None:
        self._add("{place} is not None", f"{_expression(path)}._modules.get({name!r})")

    def missing(self, path: str, name: str) -> None:
        self._add("{place} is None", f"getattr({_expression(path)}, {name!r}, absent)")

    def quiet(self, path: str) -> None:
        """The module's own call, which no longer happens, would do nothing but its forward."""
        if path:
            self._add("not has_hooks({place})", _expression(path))

    def holds(self, path: str, condition: Callable[[nn.Module], bool]) -> None:
        self._add("{0}({place})", _expression(path), condition)

    def _add(self, form: str, place: str, *values: Any) -> None:
        key = f"{form}|{place}|{values!r}"
        self._lines.setdefault(key, (form, place, *values))

    def compiled(self) -> Callable[[nn.Module], bool]:
        """A function that tells whether all of them hold; a part that is gone counts as no."""
        values: dict[str, Any] = {"absent": _ABSENT, "has_hooks": has_hooks}
        terms = []
        for form, place, *constants in self._lines.values():
            names = []
            for constant in constants:
                names.append(f"v{len(values)}")
                values[names[-1]] = constant
            terms.append(form.format(*names, place=place))
        source = "def holds(self):\n    return (\n        "
        source += "\n        and ".join(terms or ["True"]) + "\n    )\n"
        exec(compile(source, "<braze: guards of a fused block>", "exec"), values)
        inner: Callable[[nn.Module], bool] = values["holds"]
        return inner


def _expression(path: str) -> str:
    names = path.split(".") if path else []
    return "self" + "".join(f"._modules[{name!r}]" for name in names)
