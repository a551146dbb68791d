"""What the GPU run stands on: child processes that are stopped in time, and results that survive a kill."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .environment import now
from .files import collect_folder, read_json, write_json
from .gpu_steps import Step
from .rows import Row


@dataclass
class Finished:
    """A child's end. ``code`` is None if it was stopped, ``row`` what it was measuring then."""

    code: int | None
    row: str
    tail: str


@dataclass
class Log:
    """One text file, also in the folder that is sent back."""

    paths: list[Path]

    def write(self, text: str) -> None:
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(text)


def stop(child: subprocess.Popen[bytes]) -> None:
    """Ends the child with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_child(
    command: Sequence[str | Path],
    root: Path,
    environment: Mapping[str, str],
    log: Log,
    seconds: float,
    row_seconds: float = float("inf"),
    on_row: Callable[[Row], None] | None = None,
) -> Finished:
    """Runs a program in ``root`` for at most ``seconds``, and at most ``row_seconds`` for one of its rows.

    Its lines ``ROW {json}`` go to ``on_row``, all others to the log.
    """
    log.write(f"$ {' '.join(map(str, command))}\n")
    # A group, so that grandchildren die too; no session of its own, which would outlive the terminal.
    group: dict[str, Any] = (
        {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
    )
    child = subprocess.Popen(
        [str(word) for word in command],
        cwd=root,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **group,
    )
    assert child.stdout is not None
    deadline = time.monotonic() + seconds
    row, row_deadline = "", float("inf")
    rest, tail = b"", [""]
    stopped = False
    try:
        while True:
            left = min(deadline, row_deadline) - time.monotonic()
            if left <= 0:
                stopped = True
                break
            if not select.select([child.stdout], [], [], min(left, 3600.0))[0]:
                continue
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            *lines, rest = (rest + chunk).split(b"\n")
            for text in (line.decode(errors="replace") for line in lines):
                if text.startswith("BEGIN "):
                    row, row_deadline = text[6:], time.monotonic() + row_seconds
                elif text.startswith("ROW ") and on_row is not None:
                    with contextlib.suppress(ValueError):  # cut short by the end of the child
                        on_row(json.loads(text[4:]))
                    row, row_deadline = "", float("inf")
                else:
                    log.write(f"{text}\n")
                    tail = [*tail, text][-15:] if text else tail
            if not chunk:
                break
        if not stopped:
            child.wait()
    finally:
        code = None if stopped else child.poll()
        stop(child)
        child.stdout.close()
    if time.monotonic() < deadline and stopped:
        tail.append(f"stopped after {row_seconds:.0f} s")
    return Finished(code, row, "\n".join(tail))


@dataclass
class Results:
    """All rows of one GPU, and what became of each step. Written after every change."""

    paths: list[Path]
    facts: dict[str, Any]
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, facts: dict[str, Any]) -> Results:
        """Goes on with what is in that file."""
        collect = collect_folder()
        paths = [path, *([collect / path.name] if collect else [])]
        old = read_json(path) or {}
        return cls(paths, facts, old.get("steps", {}), old.get("rows", []))

    def of(self, step: Step, sources: str) -> list[Row]:
        """Rows of the step's program that were measured on these sources."""
        return [
            row for row in self.rows if (row["program"], row["sources"]) == (step.program, sources)
        ]

    def put(self, step: Step, sources: str, row: Row) -> None:
        """In the place of an older row of that name. ``ok`` None: could not be tried, or not to the end."""
        row = {"program": step.program, "sources": sources, "date": now(), **self.about(), **row}
        key = (step.program, row["name"])
        self.rows = [old for old in self.rows if (old["program"], old["name"]) != key]
        self.rows.append(row)
        self.save()

    def close(self, step: Step, **verdict: Any) -> None:
        """What became of a step."""
        self.steps[step.name] = {"date": now(), **self.about(), **verdict}
        self.save()

    def about(self) -> dict[str, Any]:
        return {"device": self.facts["device"]["name"], "torch": self.facts["versions"]["torch"]}

    def save(self) -> None:
        write_json({**self.facts, "steps": self.steps, "rows": self.rows}, *self.paths)
