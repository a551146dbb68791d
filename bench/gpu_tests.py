"""The test suite on a device: pytest, whose results leave it file by file as rows, so that a kill costs little.

Which tests are about a device is the suite's own business (BRAZE_TEST_DEVICE, tests/conftest.py). As a plugin
(-p bench.gpu_tests) it ends a worker whose CUDA context an error has spoilt; pytest-xdist starts another.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from .rows import Row, add_options, choose, emit, is_fatal
from .sources import find_root

# Widest first: what a run that is cut short should have seen.
FIRST = (
    "test_ops_generic",
    "test_cuda_",
    "test_batch_norm",
    "test_dropout",
    "test_fold",
    "test_nn_",
    "test_optim_db",
    "test_numerics",
)
HANGS_S = 120


def in_order(names: list[str]) -> list[str]:
    """Test files by what they tell of a device."""

    def rank(name: str) -> int:
        return next((i for i, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))

    return sorted(names, key=lambda name: (rank(name), name))


class Rows:
    """Collects what pytest reports; every second what has changed goes out."""

    def __init__(self) -> None:
        self.left: dict[str, set[str]] = {}
        self.running: dict[str, set[str]] = {}
        self.rows: dict[str, Row] = {}
        self.changed: set[str] = set()
        self.sent = time.monotonic()

    def _collected(self, ids: list[str]) -> None:
        for test in ids:
            file = _file_of(test)
            if file not in self.rows:
                self.rows[file] = {"name": file, "ok": None, "passed": 0, "skipped": 0}
                self.rows[file] |= {"failures": {}, "why_skipped": [], "seconds": 0.0}
                self.left[file], self.running[file] = set(), set()
            self.left[file].add(test)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        if not self.rows:
            self._collected(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            name = _file_of(report.nodeid) or "collection"
            note = str(report.longrepr)[-400:]
            emit({"name": name, "ok": False, "note": note})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[_file_of(nodeid)].add(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = _file_of(report.nodeid)
        row = self.rows[file]
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        if report.failed:
            row["failures"].setdefault(report.nodeid.partition("::")[2], _message(report))
        elif report.skipped:
            row["skipped"] += 1
            why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            if why[:120] not in row["why_skipped"]:
                row["why_skipped"].append(why[:120])
        elif report.when == "call":
            row["passed"] += 1
        if report.when not in ("setup", "call", "teardown"):  # of a worker that is no more
            self.pytest_runtest_logfinish(report.nodeid)
        self.changed.add(file)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        file = _file_of(nodeid)
        self.left[file].discard(nodeid)
        self.running[file].discard(nodeid)
        self.changed.add(file)
        if time.monotonic() - self.sent > 1 or not self.left[file]:
            self.send()

    def pytest_sessionfinish(self) -> None:
        self.send()

    def send(self) -> None:
        for file in sorted(self.changed):
            row, left = self.rows[file], self.left[file]
            failures = row["failures"]
            row["failed"] = len(failures)
            row["ok"] = False if failures else None if left else True
            row["left"] = len(left)
            row["running"] = sorted(self.running[file])[:4]
            few = dict(list(failures.items())[:40])
            notes = [f"{len(failures)} failed: {next(iter(failures))}"] if failures else []
            notes += [f"{len(left)} not run"] if left else []
            emit({**row, "failures": few, "note": "; ".join(notes)})
        self.changed.clear()
        self.sent = time.monotonic()


def _file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)[:300]


_spoilt = False


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Remembers an error after which every later test of this process would fail."""
    global _spoilt
    yield
    if call.excinfo is not None and is_fatal(str(call.excinfo.value)):
        _spoilt = True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends such a worker, once the test's own report is out."""
    if _spoilt and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(70)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = max(1, min(8, (os.cpu_count() or 1) // 2))
    parser.add_argument("--jobs", type=int, default=default, help=f"processes (here {default})")
    add_options(parser, ("cuda", "fake", "emulated"))


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 or 1 as the tests passed, 3 where pytest could not go on."""
    tests = find_root(Path(__file__).parent) / "tests"
    skip = set(json.loads(arguments.skip_file.read_text()) if arguments.skip_file else [])
    paths = {path.stem: path for path in tests.rglob("test_*.py")}
    files = [name for name in choose(in_order([*paths]), arguments.filter) if name not in skip]
    if not files:
        return 0
    os.environ |= {"BRAZE_TEST_DEVICE": arguments.device, "BRAZE_TEST_ALL": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    options = ["-p", "bench.gpu_tests", "-p", "no:cacheprovider", "-v", "--tb=short"]
    options += ["-o", f"faulthandler_timeout={HANGS_S}", f"--rootdir={tests.parent}"]
    # Workers even if it is one: only a worker can be replaced.
    options += ["-n", str(arguments.jobs), "--dist", "load", "--maxschedchunk", "20"]
    options += ["--max-worker-restart", "40"]
    plugin = Rows()
    code = pytest.main([*options, *(str(paths[name]) for name in files)], plugins=[plugin])
    # 5: every test of these files is about something else than a device.
    return {0: 0, 1: 1, 5: 0}.get(int(code), 3)
