"""Messages that the documentation quotes are those of the sources; every public name has its place."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import braze.amp
import braze.memory
import braze.nn.functional
import braze.nn.utils
import braze.optim
import pytest

pytestmark = pytest.mark.cpu_only("is about texts")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_CPP_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')


def _python_strings(text: str) -> str:
    """All strings of a program in their order, with a gap for each value that is put in."""
    parts: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts.append(node.value)
        elif isinstance(node, ast.FormattedValue):
            parts.append("\0")
        else:
            for child in ast.iter_child_nodes(node):
                visit(child)
            if not isinstance(node, ast.JoinedStr):
                parts.append("\0")

    visit(ast.parse(text))
    return "".join(parts)


def _cpp_strings(text: str) -> str:
    parts, end = [], 0
    for match in _CPP_STRING.finditer(text):
        # Neighbours are one string, and so are those that only a comma parts, as a stream writes them.
        if text[end : match.start()].strip() not in ("", ","):
            parts.append("\0")
        parts.append(match[1].replace("\\n", "\n").replace('\\"', '"'))
        end = match.end()
    return "".join(parts)


def sources() -> list[str]:
    python = (ROOT / "python").rglob("*.py")
    cpp = [*(ROOT / "csrc/ops").rglob("*.cpp"), *(ROOT / "csrc/ops").rglob("*.h")]
    return [
        *(_python_strings(file.read_text()) for file in python),
        *(_cpp_strings(file.read_text()) for file in cpp),
    ]


def found(message: str, texts: list[str]) -> bool:
    """Whether one of the files has the fixed parts of the message, in their order."""
    parts = [re.escape(part) for part in message.split("…") if part.strip(" .:,")]
    pattern = re.compile(".{0,160}?".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def quoted() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^```text\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    table = re.findall(r"^\| (`it.*?) \|", (DOCS / "fuse.md").read_text(), re.MULTILINE)
    reasons = [re.findall(r"`([^`]+)`", row) for row in table]
    # "its forward prints" is made of two strings.
    flat = [reason.replace("its forward ", "", 1) for row in reasons for reason in row]
    return messages + flat


def test_quoted_messages_are_in_the_sources() -> None:
    texts = sources()
    assert len(quoted()) > 50
    missing = [message for message in quoted() if not found(message, texts)]
    assert not missing, "\n".join(missing)


def test_control_a_message_that_changed_is_noticed() -> None:
    texts = sources()
    assert found("the gradient of … must have the parameter's shape …, got …", texts)
    assert not found("the gradient of … must have the parameter's form …, got …", texts)
    assert not found("got … must have the parameter's shape … the gradient of …", ["abc"])


# ------------------------------------------------------------------ reference

MODULES = (
    braze,
    braze.amp,
    braze.memory,
    braze.nn,
    braze.nn.functional,
    braze.nn.utils,
    braze.optim,
)


def public_names() -> set[str]:
    """braze's own classes and functions, as the running packages show them."""
    names = set()
    for module in MODULES:
        for name in dir(module):
            value = getattr(module, name)
            own = str(getattr(value, "__module__", "")).startswith("braze")
            if not name.startswith("_") and own and callable(value):
                names.add(f"{module.__name__}.{name}")
    return names


def test_reference_has_every_public_name_once() -> None:
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    referred = re.findall(r"^::: (\S+)", pages, re.MULTILINE)
    assert sorted(referred) == sorted(public_names())


def test_every_public_name_has_a_docstring(tmp_path: Path) -> None:
    """That the check of make docs sees the same names as the running packages, and misses no gap."""
    pytest.importorskip("griffe", reason="griffe, of requirements-docs.txt, is not installed")
    sys.path.insert(0, str(DOCS))
    try:
        import docstrings
    finally:
        sys.path.remove(str(DOCS))
    package = docstrings.load()
    assert set(docstrings.public(package)) == public_names()
    assert docstrings.undocumented(package) == []
    # Controls: a function, a class, a method and a module without one.
    for part in ("", *docstrings.MODULES[1:]):
        folder = tmp_path.joinpath("braze", *part.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text('"""Told."""\n')
    (tmp_path / "braze/optim/__init__.py").write_text(
        "def f(): ...\nclass C:\n  'told'\n  def m(self): ...\n  def forward(self): ...\n"
    )
    gaps = docstrings.undocumented(docstrings.load(tmp_path))
    assert gaps == ["braze.optim", "braze.optim.C.m", "braze.optim.f"]
    text = ":class:`C` of :math:`x`.\n\n.. math::\n    a &= b \\\\\n    c\n\nEnd"
    shown = docstrings.to_markdown(text, {"braze.optim.C"})
    assert shown.startswith("[`C`][braze.optim.C] of $x$.") and "$$\n\nEnd" in shown
