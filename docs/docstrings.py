"""Public names and their docstrings, read from the sources: nothing is imported, so nothing need be built.

As an extension of griffe it turns the docstrings' reStructuredText roles into Markdown for the site.
A public name without a docstring ends the build: docs/hooks.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
# What users import from. What these have of torch's is documented there.
MODULES = ("", ".amp", ".memory", ".nn", ".nn.functional", ".nn.utils", ".optim")
# Overrides of torch's methods, which the docstring of the class is about.
OVERRIDES = {"forward", "extra_repr", "train"}

_ROLE = re.compile(r":(?P<role>class|func|meth|mod|attr|math):`(?P<text>[^`]+)`")
_BLOCK = re.compile(r"^\.\. math::\n(?P<body>(?:[ ]+.*\n?|\n)+)", re.MULTILINE)


def load(folder: Path = ROOT / "python") -> griffe.Module:
    """The package as griffe reads it from its sources."""
    package = griffe.load("braze", search_paths=[folder], resolve_aliases=True)
    assert isinstance(package, griffe.Module)
    return package


def public(package: griffe.Module) -> dict[str, griffe.Object]:
    """braze's own classes and functions, by the names under which users find them."""
    found: dict[str, griffe.Object] = {}
    for suffix in MODULES:
        module: Any = package[suffix[1:]] if suffix else package
        for name, member in module.members.items():
            if name.startswith("_"):
                continue
            try:
                target = member.final_target if member.is_alias else member
            except griffe.GriffeError:  # torch's
                continue
            own = target.path.startswith("braze.") and (target.is_class or target.is_function)
            if own and not (suffix == "" and name in ("nn", "optim")):
                found[f"braze{suffix}.{name}"] = target
    return dict(sorted(found.items()))


def _members(target: griffe.Object) -> Iterator[griffe.Object]:
    if not target.is_class:
        return
    members = target.all_members
    for name, member in members.items():
        if name.startswith("_") or name in OVERRIDES:
            continue
        item: Any = member.final_target if member.is_alias else member
        if item.path.startswith("braze.") and (item.is_function or "property" in item.labels):
            yield item


def undocumented(package: griffe.Module) -> list[str]:
    """Public names, of methods and properties too, that have no docstring."""
    missing = [
        f"braze{suffix}"
        for suffix in MODULES
        if not (package[suffix[1:]] if suffix else package).docstring
    ]
    for name, target in public(package).items():
        if not target.docstring:
            missing.append(name)
        missing += [f"{name}.{m.name}" for m in _members(target) if not m.docstring]
    return missing


def _formula(match: re.Match[str]) -> str:
    lines = match["body"].strip().splitlines()
    body = "\n".join(line.strip() for line in lines)
    return f"$$\n\\begin{{align*}}\n{body}\n\\end{{align*}}\n$$\n\n"


def to_markdown(text: str, names: set[str] | None = None) -> str:
    """``text`` with Markdown in the place of roles; what ``names`` has is linked."""

    def role(match: re.Match[str]) -> str:
        body = re.sub(r"\s+", " ", match["text"])
        if match["role"] == "math":
            return f"${body}$"
        called = "()" if match["role"] in ("func", "meth") else ""
        fitting = [n for n in names or () if n == body or n.endswith(f".{body}")]
        code = f"`{body}{called}`"
        return f"[{code}][{fitting[0]}]" if len(fitting) == 1 else code

    return _ROLE.sub(role, _BLOCK.sub(_formula, text))


class Markdown(griffe.Extension):
    """Docstrings as the site shows them."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        names = set(public(pkg)) if pkg.path == "braze" else set()
        seen: set[int] = set()

        def visit(item: griffe.Object) -> None:
            if id(item) in seen:
                return
            seen.add(id(item))
            if item.docstring:
                item.docstring.value = to_markdown(item.docstring.value, names)
            for member in item.members.values():
                if not member.is_alias:
                    visit(member)  # type: ignore[arg-type]

        visit(pkg)
