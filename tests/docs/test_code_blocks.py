"""What the documentation tells readers to type works: Python blocks run, commands and options exist.

A Python block whose title begins with "not run:" is not run; the title is the reason, which readers see too.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import braze.__main__
import pytest
import torch

pytestmark = pytest.mark.cpu_only("is about texts")

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<options>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
_TITLE = re.compile(r'title="not run: [^"]+"')


class Block(NamedTuple):
    line: int
    language: str
    options: str
    text: str

    @property
    def runs(self) -> bool:
        return not _TITLE.search(self.options)


def blocks(text: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(text):
        indent = len(match["indent"])
        body = "\n".join(line[indent:] for line in match["text"].splitlines())
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(line, match["language"], match["options"], body))
    return found


def small_world() -> dict[str, Any]:
    """What blocks may take as given that show no whole program, as those of the README."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(288, 10),
    )
    return {
        "__name__": "__main__",
        "torch": torch,
        "model": model,
        "x": x,
        "y": y,
        "batches": [(x, y)] * 2,
        "loss_of": lambda model, x, y: torch.nn.functional.cross_entropy(model(x), y),
    }


def run(text: str, name: str) -> None:
    """Runs a page's Python blocks one after the other in one namespace; tracebacks name the page's lines."""
    namespace = small_world()
    for block in blocks(text):
        if block.language == "python" and block.runs:
            code = compile("\n" * (block.line - 1) + block.text, name, "exec")
            exec(code, namespace)


WITH_PYTHON = [
    p for p in PAGES if any(b.language == "python" and b.runs for b in blocks(p.read_text()))
]


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    try:
        run(page.read_text(), str(page))
    finally:
        torch.set_rng_state(before)
        braze.uninstall()


def test_pages_have_code() -> None:
    """The pattern still finds the blocks: without any, nothing above would fail."""
    assert len(WITH_PYTHON) >= 10


def test_control_a_block_that_fails_is_found() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n    ```python\n    assert x == 2\n    ```\n"
    with pytest.raises(AssertionError) as failure:
        run(text, "page.md")
    assert failure.traceback[-1].lineno + 1 == 8  # counts from 0
    run(text.replace("    ```python", '    ```python title="not run: is wrong"'), "page.md")


def commands() -> list[tuple[str, list[str]]]:
    """Every ``python -m braze ...`` and ``make ...`` of a shell block, in words."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text()):
            if block.language not in ("sh", "bash"):
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for start in range(len(words)):
                    braze_command = words[start : start + 3] == ["python", "-m", "braze"]
                    if braze_command or (words[start] == "make" and start == 0):
                        found.append((str(page.relative_to(ROOT)), words[start:]))
                        break
    return found


def complaint(words: list[str], makefile: str) -> str:
    """What is wrong with a command, or nothing."""
    if words[0] == "make":
        targets = [w for w in words[1:] if "=" not in w]
        known = re.findall(r"^([\w-]+)(?=[\w -]*:)", makefile, re.MULTILINE)
        missing = [t for t in targets if t not in known]
        return f"no target {missing}" if missing else ""
    names = []
    for word in words[3:]:
        if word.startswith("-") or word in ("&&", "|", ";", ">"):
            break
        names.append(word)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            braze.__main__.main([*names, "--help"])
        except SystemExit as end:
            if end.code:
                return output.getvalue()
    options = [w.split("=")[0] for w in words[3:] if w.startswith("--")]
    missing = [o for o in options if o != "--help" and o not in output.getvalue()]
    return f"no option {missing}" if missing else ""


def test_commands_exist() -> None:
    found = commands()
    makefile = (ROOT / "Makefile").read_text() + "\ntest test-all:"
    wrong = [(page, words, text) for page, words in found if (text := complaint(words, makefile))]
    assert not wrong, wrong
    assert len(found) >= 20
    # Controls: what is not there is noticed.
    assert complaint(["make", "no-such-target"], makefile)
    assert complaint(["python", "-m", "braze", "no-such-command"], makefile)
    assert complaint(["python", "-m", "braze", "info", "--no-such-option"], makefile)
