"""What every part of the GPU run uses: the clock, child processes, and records that survive a kill."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import collect_folder, read_json, slug, write_json
from .sources import digest, family_digest

PART_LIMIT_S = 520.0
# A row that was still running after this long when the time ran out has failed.
ROW_LIMIT_S = 150.0
Row = dict[str, Any]


class Cut(Exception):
    """The time is up; what is missing is measured by the next run."""


class PartFailed(Exception):
    """The part cannot go on; the text is for a person."""


@dataclass
class Context:
    """One run of the driver."""

    root: Path
    out: Path
    device: str = "cuda"
    facts: dict[str, Any] = field(default_factory=dict)
    deadline: float = float("inf")
    redo: frozenset[str] = frozenset()
    pip: bool = True
    jobs: int = 1
    seconds: float = 1.0
    only: str = ""
    part_start: float = 0.0

    @property
    def site(self) -> Path:
        return self.out / "site"

    @property
    def results(self) -> Path:
        """Results of a GPU belong to the repository; those of a rehearsal do not."""
        base = self.root / "bench" if self.device == "cuda" else self.out
        return base / "results" / slug(str(self.facts.get("device", {}).get("name", "")))

    def remaining(self) -> float:
        """Seconds left for the present part."""
        now = time.monotonic()
        return min(self.deadline, self.part_start + PART_LIMIT_S) - now

    def need(self, seconds: float) -> float:
        """Returns what is left; raises Cut if it is less than ``seconds``."""
        left = self.remaining()
        if left < seconds:
            raise Cut
        return left

    def environment(self, **more: str) -> dict[str, str]:
        """The children's: the braze that was built here comes first, then what they add."""
        path = [str(self.site), str(self.out / "shim"), os.environ.get("PYTHONPATH", "")]
        # pip's cmake and ninja lie beside the interpreter.
        tools = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        joined = {
            "PYTHONPATH": os.pathsep.join(p for p in path if p),
            "PATH": os.pathsep.join(tools),
            "PYTHONUNBUFFERED": "1",
        }
        return {**os.environ, **joined, **more}


class Record:
    """The rows of one part, rewritten to all their places after every change."""

    def __init__(
        self, context: Context, kind: str, globs: Sequence[str], family: str = "optimizer"
    ) -> None:
        self._lock = threading.Lock()
        own = context.out / f"{kind}.json"
        collect = collect_folder()
        self.paths = [own, *([collect / own.name] if collect else [])]
        if kind != "build":
            self.paths.append(context.results / own.name)
        device = context.facts.get("device", {})
        key = f"{digest(context.root, globs)} {device.get('type')} {device.get('name')}"
        old = read_json(own)
        if old is not None and old.get("key") == key and kind not in context.redo:
            self.data = old
            return
        if old is not None:
            write_json(old, own.with_name(f"{kind}.previous.json"))
        self.data = {
            "kind": kind,
            "family": family,
            "sources": family_digest(context.root, family),
            "key": key,
            **context.facts,
            "complete": False,
            "ok": False,
            "seconds": 0.0,
            "rows": [],
        }

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.data["rows"]
        return rows

    def passed(self) -> list[str]:
        """Names of rows that need not be repeated."""
        return [row["name"] for row in self.rows if row["ok"] is True]

    def done(self) -> bool:
        return bool(self.data["complete"] and self.data["ok"] and self.data.get("available", True))

    def put(self, row: Row) -> None:
        """Adds the row, in the place of an older one of that name. ``ok`` None: could not be tried."""
        with self._lock:
            others = [old for old in self.rows if old["name"] != row["name"]]
            self.data["rows"] = [*others, row]
            self._save()

    def open(self) -> None:
        """Until it is closed the part is incomplete, however it ends."""
        self.data["complete"] = False

    def close(self, complete: bool, seconds: float, note: str = "") -> None:
        """Writes the verdict."""
        with self._lock:
            self.data["complete"] = complete
            self.data["ok"] = (
                not note and bool(self.rows) and all(row["ok"] is not False for row in self.rows)
            )
            self.data["available"] = all(row["ok"] is not None for row in self.rows)
            self.data["note"] = note
            self.data["seconds"] = round(self.data["seconds"] + seconds, 1)
            self._save()

    def _save(self) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        self.data["date"] = now.isoformat(timespec="seconds")
        write_json(self.data, *self.paths)


@dataclass
class Finished:
    """A child's end. ``begun``: the row it was in, and for how many seconds."""

    code: int
    timed_out: bool
    text: str
    begun: str = ""
    begun_seconds: float = 0.0

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.text.splitlines()[-lines:])


_children: set[subprocess.Popen[str]] = set()


_stopping = threading.Event()


def stop_children(stop: bool = True) -> None:
    """Kills the process groups that this run started, whose ends then say nothing; False: allows new ones."""
    if not stop:
        _stopping.clear()
        return
    _stopping.set()
    for child in list(_children):
        _stop(child)


def _stop(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def run_child(
    command: Sequence[str | Path],
    context: Context,
    log: str,
    limit: float,
    on_row: Callable[[Row], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Runs a command in the repository's root. Output goes to ``logs/``; lines ``ROW {json}`` to ``on_row``.

    Raises:
        Cut: the whole run is being stopped.
    """
    path = context.out / "logs" / log
    path.parent.mkdir(parents=True, exist_ok=True)
    # A group, so that grandchildren die too; no session of its own, which would outlive the terminal.
    group: dict[str, Any] = (
        {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
    )
    child = subprocess.Popen(
        [str(word) for word in command],
        cwd=context.root,
        env=dict(environment or context.environment()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **group,
    )
    _children.add(child)
    late = threading.Event()

    def expire() -> None:
        late.set()
        _stop(child)

    timer = threading.Timer(max(limit, 0.1), expire)
    timer.daemon = True
    timer.start()
    lines: list[str] = []
    begun, since = "", time.monotonic()
    try:
        with path.open("a") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
            assert child.stdout is not None
            for text in child.stdout:
                file.write(text)
                file.flush()
                if text.startswith("BEGIN "):
                    begun, since = text[6:].strip(), time.monotonic()
                elif text.startswith("ROW ") and on_row is not None:
                    with contextlib.suppress(ValueError):  # a line cut short by a kill
                        on_row(json.loads(text[4:]))
                        begun = ""
                else:
                    lines.append(text)
        code = child.wait()
    finally:
        timer.cancel()
        _stop(child)
        child.wait()
        _children.discard(child)
    if _stopping.is_set():
        raise Cut
    text = "".join(lines)
    return Finished(code, late.is_set(), text, begun, time.monotonic() - since)


def run_rows(command: Sequence[str | Path], context: Context, record: Record, log: str) -> None:
    """Runs a program that emits rows until all are measured; a row that kills it is recorded as failed.

    Raises:
        Cut: the time ran out first.
        PartFailed: the program died outside of any row.
    """
    tried = set(record.passed())

    def on_row(row: Row) -> None:
        tried.add(row["name"])
        record.put(row)

    skip = context.out / "skip.json"
    for _ in range(20):
        write_json(sorted(tried), skip)
        before = len(tried)
        limit = context.need(20)
        end = run_child([*command, "--rows", "--skip-file", skip], context, log, limit, on_row)
        if end.begun and (not end.timed_out or end.begun_seconds > ROW_LIMIT_S):
            how = "timed out" if end.timed_out else f"ended the process with code {end.code}"
            on_row({"name": end.begun, "ok": False, "note": f"{how}: {end.tail(3)}"[:500]})
        if end.timed_out:
            raise Cut
        if end.code in (0, 1):
            if not record.rows:
                raise PartFailed(f"no row came out of it:\n{end.tail()}")
            return
        if len(tried) == before:
            raise PartFailed(f"it ended with code {end.code}:\n{end.tail()}")
    raise PartFailed("20 rows ended the process; the rest was not tried")
