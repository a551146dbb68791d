"""bench/gpu.py, the resumable GPU run, over fake steps and fake tools, and rehearsed as it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from braze.bench import gpu_build, gpu_run, gpu_steps, gpu_tests, micro, rows, sanitize
from braze.bench.sources import find_root

pytestmark = [
    pytest.mark.cpu_only("runs the benchmark's own processes"),
    pytest.mark.slow("rehearses what only a GPU machine runs"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tree that looks like a source checkout."""
    (tmp_path / "pyproject.toml").write_text('name = "braze"\nversion = "9.8.7"\n')
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text("")
    return tmp_path


FAKE = """
import pathlib, sys, time
root, mode = pathlib.Path(sys.argv[2]), sys.argv[3]
sys.path.insert(0, sys.argv[1])
from bench import gpu, gpu_run, gpu_steps
gpu_steps.SOURCES.update(fake=("csrc/**/*",), broken=("csrc/**/*",))
def step(name, program, limit=60, row_limit=60):
    return gpu_steps.Step(name, program, ("rows",), (mode,), 1, limit, row_limit)
steps = {"rows": step("rows", "fake", 9 if mode == "slow" else 60, 0.8 if mode == "stuck" else 60),
         "broken": step("broken", "broken"), "build": step("build", "broken"),
         "after": gpu_steps.Step("after", "fake", (), ("after",), 1, 60)}
facts = {"device": {"type": "cpu", "name": "fake"}, "versions": {"torch": "2"}}
results = gpu_run.Results.open(root / "results" / "gpu.json", facts)
context = gpu.Run(root, root / "out", "cpu", results, gpu_run.Log([root / "out" / "gpu.log"]))
if mode == "budget":
    context.deadline = time.monotonic() + 5
sys.exit(gpu.run([steps[name] for name in sys.argv[4].split(",")], context))
"""
PROGRAM = """
import json, os, pathlib, sys, time
mode = sys.argv[1]
skip = json.loads(pathlib.Path(sys.argv[sys.argv.index("--skip-file") + 1]).read_text())
for name in ("one", "two", "three", "four") if mode != "after" else ("five",):
    if name in skip:
        continue
    print("BEGIN", name, flush=True)
    with open("calls", "a") as calls:
        calls.write(name + " ")
    if name == "three" and mode in ("hang", "stuck"):
        time.sleep(60)
    if name == "three" and mode == "slow":
        time.sleep(5 if pathlib.Path("calls").read_text().count("three") > 1 else 60)
    if name == "three" and mode == "die":
        os.abort()
    row = {"name": name, "ok": not (name == "two" and mode == "fail")}
    print("ROW " + json.dumps(row), flush=True)
"""


class FakeRun:
    """A run of the driver over fake programs, in a process of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "fake.py").write_text(FAKE)
        (root / "bench").mkdir()
        start = (
            "import runpy, sys; runpy.run_module(f'bench.{sys.argv.pop(1)}', run_name='__main__')"
        )
        (root / "bench" / "__main__.py").write_text(start)
        (root / "bench" / "fake.py").write_text(PROGRAM)
        (root / "bench" / "broken.py").write_text("raise SystemExit('broken on purpose')")
        (root / "sent").mkdir()

    def start(self, mode: str, steps: str = "rows") -> subprocess.Popen[str]:
        command = [sys.executable, str(self.root / "fake.py"), str(ROOT), str(self.root)]
        environment = {**os.environ, "OUT": str(self.root / "sent"), "PYTHONPATH": ""}
        return subprocess.Popen(
            [*command, mode, steps],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def run(self, mode: str, steps: str = "rows") -> tuple[int, str]:
        process = self.start(mode, steps)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text().split() if path.exists() else []

    def rows(self, folder: str = "results") -> dict[str, Any]:
        data = json.loads((self.root / folder / "gpu.json").read_text())
        return {row["name"]: row for row in data["rows"]}


@pytest.fixture
def fake(checkout: Path) -> FakeRun:
    return FakeRun(checkout)


def test_a_killed_run_keeps_its_rows_and_the_next_one_goes_on(fake: FakeRun) -> None:
    process = fake.start("hang")
    deadline = time.monotonic() + 30
    # The driver reads behind its child, and the copy is written last.
    sent = fake.root / "sent" / "gpu.json"
    while time.monotonic() < deadline:
        if "three" in fake.calls() and sent.exists() and "two" in fake.rows("sent"):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    assert list(fake.rows()) == list(fake.rows("sent")) == ["one", "two"]
    assert fake.rows()["one"]["device"] == "fake"
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


@pytest.mark.parametrize(
    ("mode", "how"), [("die", "ended the process (-6)"), ("stuck", "too long")]
)
def test_a_row_that_ends_its_process_has_failed_and_the_rest_is_measured(
    fake: FakeRun, mode: str, how: str
) -> None:
    code, out = fake.run(mode)
    assert code == 1 and "three: " in out and how in out
    ok = {name: row["ok"] for name, row in fake.rows().items()}
    assert ok == {"one": True, "two": True, "three": False, "four": True}


def test_failed_rows_are_tried_again_and_passed_ones_are_not(fake: FakeRun) -> None:
    assert fake.run("fail")[0] == 1
    assert fake.run("fine")[0] == 0
    assert fake.calls() == ["one", "two", "three", "four", "two"]


def test_a_failing_step_does_not_stop_the_later_ones(fake: FakeRun) -> None:
    code, out = fake.run("fine", "broken,after")
    assert code == 1 and "broken on purpose" in out and "five" in fake.calls()


def test_nothing_runs_without_the_build(fake: FakeRun) -> None:
    code, out = fake.run("fine", "build,rows")
    assert code == 1 and "nothing else can run" in out and not fake.calls()


def test_what_its_own_limit_cut_short_goes_on_after_the_others(fake: FakeRun) -> None:
    """One step that hangs or takes longer than thought must not starve the later ones."""
    code, _ = fake.run("slow", "rows,after")
    assert code == 0 and fake.calls() == ["one", "two", "three", "five", "three", "four"]


def test_a_budget_starts_nothing_it_cannot_end(fake: FakeRun) -> None:
    code, out = fake.run("budget", "rows,after")
    assert code == 3 and "no time" in out and "run the same command again" in out
    assert fake.calls() == []


def test_a_child_over_its_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    log = gpu_run.Log([tmp_path / "log"])
    began = time.monotonic()
    command = ["sh", "-c", "echo begun; sleep 50 | sleep 50"]
    end = gpu_run.run_child(command, tmp_path, os.environ, log, 0.5)
    assert end.code is None and end.tail.strip() == "begun" and time.monotonic() - began < 10
    assert "begun" in (tmp_path / "log").read_text()
    assert gpu_run.run_child(["true"], tmp_path, os.environ, log, 10).code == 0


def test_the_plan() -> None:
    """Nine minutes: every step can end in its limit, and the first call's steps fit in one."""
    assert {step.program for step in gpu_steps.STEPS} == set(gpu_steps.SOURCES)
    for step in gpu_steps.STEPS:
        assert step.sources(ROOT) and step.limit_s >= 0.9 * step.expected_s
    names = [step.name for step in gpu_steps.STEPS]
    first = gpu_steps.STEPS[: names.index("memcheck") + 1]
    assert sum(step.expected_s for step in first) < 560 and len(set(names)) == len(names)


def test_the_rehearsal(tmp_path: Path) -> None:
    """Every program as the driver calls it, small and on the CPU: what it would cost a GPU to find out."""
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--installed"]
    environment = {k: v for k, v in os.environ.items() if k != "OUT"}
    run = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    data = json.loads((tmp_path / "results" / "rehearsal" / "gpu.json").read_text())
    assert all(row["ok"] is not False for row in data["rows"])
    # No sanitizer and no registers without a GPU; all else gave figures.
    unable = {row["name"] for row in data["rows"] if row["ok"] is None}
    assert unable == {"tools", "kernels"}
    assert {row["program"] for row in data["rows"]} == set(gpu_steps.SOURCES) - {"gpu_build"}


# -------------------------------------------------------------------- rows


def test_rows_tell_what_went_wrong_and_keep_what_was_measured() -> None:
    def broken(row: dict[str, Any]) -> None:
        row["figure"] = 1
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    row = rows.fill(rows.Work("name", broken))
    assert row["figure"] == 1 and row["ok"] is False and rows.is_fatal(row["note"])
    assert not rows.is_fatal("CUDA out of memory. Tried to allocate")
    assert not rows.is_fatal("CUDA error: operation not permitted when stream is capturing")


# ------------------------------------------------------------------- build


def test_a_built_module_travels(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = checkout / "sent"
    sent.mkdir()
    monkeypatch.setenv("OUT", str(sent))
    out = checkout / "build"
    package = out / "site" / "braze"
    package.mkdir(parents=True)
    wanted = gpu_build.key(checkout, "90")
    (package / gpu_build.KEY).write_text(wanted)
    (package / "_C.so").write_text("module")
    gpu_build.pack(out)
    other = checkout / "other"
    other.mkdir()
    (sent / gpu_build.ARCHIVE).rename(other / gpu_build.ARCHIVE)
    assert gpu_build.unpack(other, wanted)
    assert (other / "site" / "braze" / "_C.so").read_text() == "module"
    assert not gpu_build.unpack(other, gpu_build.key(checkout, "80"))
    (checkout / "csrc" / "cuda" / "a.cu").write_text("edited")
    assert not gpu_build.unpack(other, gpu_build.key(checkout, "90"))
    (other / gpu_build.ARCHIVE).write_bytes(b"cut off")
    assert not gpu_build.unpack(other, wanted)
    assert not gpu_build.unpack(checkout, wanted)


def test_the_build_needs_no_braze() -> None:
    code = "import runpy, sys; sys.modules['braze'] = None; runpy.run_module('bench')"
    code = code.replace("'bench'", "'bench', run_name='__main__', alter_sys=True")
    for program, fails in (("gpu_build", False), ("golden", True)):
        command = [sys.executable, "-c", code, program, "--help"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert ("braze" in run.stderr) == (run.returncode != 0) == fails, run.stderr


def test_an_archive_cannot_write_elsewhere(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / gpu_build.ARCHIVE, "w:gz") as archive:
        archive.add(__file__, arcname="../escaped")
    assert not gpu_build.unpack(tmp_path, "key")
    assert not (tmp_path.parent / "escaped").exists() and not (tmp_path / "escaped").exists()


def test_python_is_the_checkouts(tmp_path: Path) -> None:
    package = tmp_path / "braze"
    package.mkdir()
    (package / "_build.py").write_text("")
    for _ in range(2):
        gpu_build.link_python(ROOT, tmp_path)
        assert (package / "optim").resolve() == ROOT / "python" / "braze" / "optim"
        assert (package / "bench").resolve() == ROOT / "bench"
        assert not (package / "_build.py").is_symlink()


# ------------------------------------------------------------------- tests


def test_pytest_leaves_rows(tmp_path: Path) -> None:
    """One file a row; a test that kills its worker fails, and the others are run all the same."""
    (tmp_path / "pyproject.toml").write_text('name = "braze"\n')
    for folder in ("csrc", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "import os, pytest\n"
        "def test_fine(): pass\n"
        "def test_skipped(): pytest.skip('no second device')\n"
        "def test_dies(): os._exit(3)\n"
        "def test_after(): pass\n"
    )
    (tmp_path / "tests" / "test_b.py").write_text(
        "import os\n"
        "before = []\n"
        "def test_spoilt():\n"
        "    before.append(os.getpid())\n"
        "    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_in_a_new_process(): assert not before\n"
    )
    (tmp_path / "tests" / "test_c.py").write_text("def test_fine(): pass\n")
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    skip = tmp_path / "skip.json"
    skip.write_text('["test_c"]')
    code = (
        "import sys, bench.gpu_tests as t, pathlib\n"
        f"t.find_root = lambda start: pathlib.Path({str(tmp_path)!r})\n"
        "from bench import command\n"
        "sys.exit(command.main(['gpu_tests', *sys.argv[1:]], 'bench', {'gpu_tests': ''}))"
    )
    command = [sys.executable, "-c", code, "--jobs", "2", "--rows", "--skip-file", str(skip)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    lines = [text[4:] for text in run.stdout.splitlines() if text.startswith("ROW ")]
    last = {row["name"]: row for row in map(json.loads, lines)}
    assert run.returncode == 1 and set(last) == {"test_a", "test_b"}, run.stdout + run.stderr
    a, b = last["test_a"], last["test_b"]
    assert (a["passed"], a["failed"], a["skipped"], a["left"]) == (2, 1, 1, 0)
    assert "test_dies" in a["failures"] and a["ok"] is False
    assert "no second device" in a["why_skipped"][0]
    assert (b["passed"], b["failed"], b["left"]) == (1, 1, 0)
    assert "illegal memory access" in b["failures"]["test_spoilt"]


def test_widest_tests_come_first() -> None:
    names = gpu_tests.in_order([path.stem for path in (ROOT / "tests").rglob("test_*.py")])
    assert names[0] == "test_ops_generic" and names.index("test_batch_norm") < 25
    for start in gpu_tests.FIRST:
        assert any(name.startswith(start) for name in names), f"there is no {start}"


# -------------------------------------------------------------- sanitizers


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
    assert sanitize.errors_reported(text) == count


SANITIZER = """#!{python}
import sys, time
tool, program = sys.argv[sys.argv.index("--tool") + 1], sys.argv[-2:]
clean = program[-1] == "clean" or "--short" in sys.argv
if "{mode}" == "hangs" and not clean:
    time.sleep(30)
found = 0 if clean or "{mode}" == "blind" else 1
print("Device not supported" if "{mode}" == "refuses" else f"========= ERROR SUMMARY: {{found}} errors")
sys.exit(99 if found and "{mode}" != "refuses" else 0)
"""


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("finds", [True, True, True]),
        ("hangs", [True, True, True]),
        ("blind", [False, True, False]),
        ("refuses", [None, None, None]),
    ],
)
def test_sanitizers_must_find_their_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, expected: list[bool | None]
) -> None:
    """A tool that reports nothing fails, and says nothing of the kernels; one that refuses the device is "not
    available"; a seeded bug that hangs is found."""
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(SANITIZER.format(python=sys.executable, mode=mode))
    checker.chmod(0o755)
    monkeypatch.setattr(sanitize, "compile_control", lambda *_: tmp_path / "control")
    monkeypatch.setattr(sanitize, "CONTROL_S", 1)
    work = sanitize.work_of("synccheck", str(checker), "nvcc", "sm_90")
    assert [rows.fill(one)["ok"] for one in work] == expected


# ------------------------------------------------------------------- micro


def test_resnet50s_convolutions() -> None:
    shapes = micro.shapes()
    assert shapes.total() == 53 and len({micro.name_of(conv) for conv in shapes}) == len(shapes)
    # 4.09 GFLOP multiply-adds an image, as its paper has it, but for the linear layer.
    assert sum(micro.flops_of(c, 1) * n for c, n in shapes.items()) == pytest.approx(
        2 * 4.09e9, rel=0.01
    )
    conv = micro.Convolution(8, 16, 3, 2, 9)
    calls = micro.calls(conv, 2, "cpu")
    assert calls["forward"]().shape == (2, 16, conv.out, conv.out)
    assert (calls["fused_relu"]() >= 0).all()
    dx, dw, _ = calls["dgrad"]()
    assert dx.shape == (2, 8, 9, 9) and dw is None
    assert calls["wgrad"]()[1].shape == (16, 8, 3, 3)


def test_the_micro_program_compiles_for_gpus(tmp_path: Path) -> None:
    nvcc = sanitize.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    source = find_root(ROOT) / "bench" / "micro.cu"
    command = [nvcc, "-std=c++20", "-arch=sm_90", "-Werror=all-warnings", "-o", tmp_path / "micro"]
    subprocess.run([*command, source], check=True)
    for control in (ROOT / "tests" / "sanitizer_controls").glob("*.cu"):
        sanitize.compile_control(control.stem, nvcc, "sm_90")


def test_cudnn_refusing_a_convolution_costs_one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    calls = {"forward": lambda: torch.zeros(1), "fused_relu": refuse}
    monkeypatch.setattr(micro, "calls", lambda *_: calls)
    clock = micro.open_clock("cpu")
    row: dict[str, Any] = {}
    micro.measure(micro.Convolution(8, 8, 1, 1, 4), 1, clock, 1, row)
    assert row["forward_us"] > 0 and "unable" in row["failed"]["fused_relu"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "build;nonsense"], "no step 'nonsense'"),
        (["--redo", "nonsense"], "no step 'nonsense'"),
        (["--budget-s", "0"], "must be positive"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_bad_arguments_of_the_gpu_run(arguments: list[str], words: str) -> None:
    # As a plain script, which is how make gpu calls it.
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert run.returncode == 2 and words in run.stderr
