"""What MkDocs is told beside mkdocs.yml: pages from other places of the project, figures, formulas."""

from __future__ import annotations

import ast
import re
from html import unescape
from pathlib import Path
from typing import Any

import docstrings
import figures
import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files of the project that are pages too. LICENSE is text, the others Markdown.
INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",  # for links alone: the site has an index of its own
    "LICENSE": "licence.md",
}
_LINK = re.compile(r"\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
_FIGURE = re.compile(r"<!-- figure:(?P<name>\w+) -->")
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*(?:\\\(|\\\[)(?P<latex>.*?)(?:\\\)|\\\])\s*</(?P=tag)>',
    re.DOTALL,
)


def on_pre_build(config: MkDocsConfig) -> None:
    """A public name without a docstring ends the build."""
    if missing := docstrings.undocumented(docstrings.load()):
        raise PluginError(f"no docstring: {', '.join(missing)}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The project's own files join the pages."""
    for name, page in INCLUDED.items():
        if page == "index.md":
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        if not name.endswith(".md"):
            text = f"# Apache License 2.0\n\n```text\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def _relinked(match: re.Match[str], page: str) -> str:
    """A link to a file of the project, as one to its page; what is no page becomes plain text's."""
    path, anchor = match["path"], match["anchor"] or ""
    name = path.removeprefix("../")
    if name in INCLUDED:
        target = INCLUDED[name]
    elif name.startswith("docs/"):
        target = name.removeprefix("docs/")
    else:
        return match[0]
    return f"]({'../' * page.count('/')}{target}{anchor})"


def examples(folder: Path = ROOT / "examples") -> str:
    """A section for each program of ``folder``: its docstring, how to run it, its text."""
    sections = []
    for file in sorted(folder.glob("*.py")):
        told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        title, _, rest = told.partition("\n")
        sections.append(
            f"## {file.stem}\n\n{title}\n{rest}\n\n```sh\npython examples/{file.name}\n```\n\n"
            f'??? note "examples/{file.name}"\n\n'
            f"    ```python\n"
            f'    --8<-- "examples/{file.name}"\n    ```\n'
        )
    return "\n".join(sections) or "This version of braze has no example programs."


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between the project's files, figures and examples."""
    source = page.file.src_uri
    markdown = _LINK.sub(lambda match: _relinked(match, source), markdown)
    markdown = _FIGURE.sub(lambda match: figures.figure(match["name"]), markdown)
    return markdown.replace("<!-- examples -->", examples())


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    latex = unescape(match["latex"]).strip()
    converted: str = latex2mathml.converter.convert(latex, display=display)
    return f'<div class="formula">{converted}</div>' if display == "block" else converted


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""
    return _FORMULA.sub(_mathml, html)
