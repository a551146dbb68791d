"""bench/gpu.py, the resumable GPU run, over fake parts and fake tools."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from braze.bench import gpu, gpu_parts, gpu_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tree that looks like a source checkout."""
    (tmp_path / "pyproject.toml").write_text('name = "braze"\nversion = "9.8.7"\n')
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text("")
    return tmp_path


FAKE = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from bench import gpu, gpu_parts, gpu_run
root, out, mode = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
child = '''
import json, os, pathlib, sys, time
out, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
skip = json.loads(pathlib.Path(sys.argv[sys.argv.index("--skip-file") + 1]).read_text())
for name in ("one", "two", "three", "four"):
    if name in skip:
        continue
    print("BEGIN", name, flush=True)
    with (out / "calls").open("a") as calls:
        calls.write(name + " ")
    if name == "three" and mode == "hang":
        time.sleep(60)
    if name == "three" and mode == "die":
        os.abort()
    row = {"name": name, "ok": not (name == "two" and mode == "fail")}
    print("ROW " + json.dumps(row), flush=True)
'''
def rows(context, record):
    gpu_run.run_rows([sys.executable, "-c", child, out, mode], context, record, "rows.log")
def broken(context, record):
    raise gpu_run.PartFailed("broken on purpose")
def after(context, record):
    record.put({"name": "after", "ok": True})
parts = {"rows": gpu_parts.Part("rows", rows, ("csrc/**/*",)),
         "broken": gpu_parts.Part("broken", broken, ()),
         "after": gpu_parts.Part("after", after, ())}
context = gpu_run.Context(root, out, "cpu", {"device": {"type": "cpu", "name": "fake"}})
if mode == "budget":
    context.deadline = time.monotonic() + 5
sys.exit(gpu.run(parts, context, sys.argv[5].split(",")))
"""


class FakeRun:
    """A run of the driver over fake parts, in a process of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        self.out.mkdir()
        (root / "fake.py").write_text(FAKE)

    def start(self, mode: str, parts: str = "rows") -> subprocess.Popen[str]:
        command = [sys.executable, str(self.root / "fake.py"), str(ROOT), str(self.root)]
        command += [str(self.out), mode, parts]
        (self.root / "sent").mkdir(exist_ok=True)
        environment = {**os.environ, "OUT": str(self.root / "sent")}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def run(self, mode: str, parts: str = "rows") -> tuple[int, str]:
        process = self.start(mode, parts)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    def calls(self) -> list[str]:
        path = self.out / "calls"
        return path.read_text().split() if path.exists() else []

    def rows(self, folder: str = "out") -> dict[str, Any]:
        data = json.loads((self.root / folder / "rows.json").read_text())
        return {row["name"]: row for row in data["rows"]}


@pytest.fixture
def fake(checkout: Path) -> FakeRun:
    return FakeRun(checkout)


def test_a_killed_run_keeps_its_rows_and_the_next_one_goes_on(fake: FakeRun) -> None:
    process = fake.start("hang")
    deadline = time.monotonic() + 30
    while "three" not in fake.calls() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    assert list(fake.rows()) == list(fake.rows("sent")) == ["one", "two"]
    code, _ = fake.run("fine")
    assert code == 0 and fake.calls() == ["one", "two", "three", "three", "four"]
    assert list(fake.rows("sent")) == ["one", "two", "three", "four"]
    code, out = fake.run("fine")
    assert code == 0 and "done before" in out and len(fake.calls()) == 5


def test_other_sources_are_measured_anew(fake: FakeRun) -> None:
    assert fake.run("fine")[0] == 0
    (fake.root / "csrc/cuda/a.cu").write_text("edited")
    assert fake.run("fine")[0] == 0
    assert fake.calls() == ["one", "two", "three", "four"] * 2
    assert (fake.out / "rows.previous.json").is_file()


def test_a_row_that_kills_its_process_is_recorded_and_the_rest_is_measured(fake: FakeRun) -> None:
    code, out = fake.run("die")
    assert code == 1 and "three: ended the process with code -6" in out
    assert {name: row["ok"] for name, row in fake.rows().items()} == {
        "one": True,
        "two": True,
        "three": False,
        "four": True,
    }


def test_failed_rows_are_tried_again_and_passed_ones_are_not(fake: FakeRun) -> None:
    assert fake.run("fail")[0] == 1
    assert fake.run("fine")[0] == 0
    assert fake.calls() == ["one", "two", "three", "four", "two"]


def test_a_failing_part_does_not_stop_the_later_ones(fake: FakeRun) -> None:
    code, out = fake.run("fine", "broken,after")
    assert code == 1 and "broken on purpose" in out and "after     ok" in out


def test_a_budget_starts_nothing_it_cannot_end(fake: FakeRun) -> None:
    code, out = fake.run("budget", "rows,after")
    assert code == 3 and "cut short" in out and "run the same command again" in out
    assert fake.calls() == []


def test_a_child_over_its_limit_is_killed_with_its_children(checkout: Path) -> None:
    context = gpu_run.Context(checkout, checkout / "out")
    began = time.monotonic()
    end = gpu_run.run_child(["sh", "-c", "echo begun; sleep 50 | sleep 50"], context, "log", 0.5)
    assert end.timed_out and end.text == "begun\n" and time.monotonic() - began < 10


def test_a_child_killed_because_the_run_stops_is_no_result(checkout: Path) -> None:
    context = gpu_run.Context(checkout, checkout / "out")
    with ThreadPoolExecutor() as pool:
        child = pool.submit(gpu_run.run_child, ["sleep", "50"], context, "log", 40)
        while not gpu_run._children:
            time.sleep(0.01)
        gpu_run.stop_children()
        assert isinstance(child.exception(timeout=10), gpu_run.Cut)
    gpu_run.stop_children(False)
    assert gpu_run.run_child(["true"], context, "log", 10).code == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 1 error", 1),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)", 3),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
        ("Device not supported", None),
    ],
)
def test_sanitizer_summaries(text: str, count: int | None) -> None:
    assert gpu_parts.errors_reported(text) == count


SANITIZER = """#!{python}
import sys
tool, program = sys.argv[sys.argv.index("--tool") + 1], sys.argv[-2:]
clean = program[-1] == "clean" or "--short" in sys.argv
found = 0 if clean or {blind} else 1
print("Device not supported" if {refuses} else f"========= ERROR SUMMARY: {{found}} errors")
sys.exit(99 if found and not {refuses} else 0)
"""


@pytest.mark.parametrize(
    ("blind", "refuses", "expected"),
    [(False, False, (True, True)), (True, False, (False, True)), (False, True, (True, False))],
)
def test_sanitizers_must_find_their_bug(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    blind: bool,
    refuses: bool,
    expected: tuple[bool, bool],
) -> None:
    """A tool that reports nothing fails; one that refuses the device is "not available"."""
    tools = checkout / "cuda" / "bin"
    tools.mkdir(parents=True)
    texts = {
        "compute-sanitizer": SANITIZER.format(python=sys.executable, blind=blind, refuses=refuses),
        "nvcc": "#!/bin/sh\ntrue\n",
    }
    for name, text in texts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tools.parent))
    monkeypatch.delenv("OUT", raising=False)
    facts = {"device": {"type": "cuda", "name": "fake"}}
    context = gpu_run.Context(checkout, checkout / "out", "cuda", facts)
    part = gpu_parts.PARTS["sanitize"]
    gpu.run({"sanitize": part}, context, ["sanitize"])
    data = json.loads((checkout / "bench/results/fake/sanitize.json").read_text())
    assert (data["ok"], data["available"]) == expected
    if expected == (True, True):
        assert len(data["rows"]) == 3 * len(gpu_parts.TOOLS)


def test_pytest_reports_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "r.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    assert gpu_parts._counts(report) == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "failures": ["b"],
        "why_skipped": ["no GPU"],
    }
    report.write_text("<testsuites><testsu")
    assert gpu_parts._counts(report) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "build,nonsense"], "no part 'nonsense'"),
        (["--redo", "nonsense"], "no part 'nonsense'"),
        (["--budget-s", "0"], "must be positive"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_bad_arguments_of_the_gpu_run(arguments: list[str], words: str) -> None:
    # As a plain script, which is how make gpu calls it.
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert run.returncode == 2 and words in run.stderr
