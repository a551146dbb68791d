"""The benchmarks' harness: clocks, rows, options, files, and what each suite claims of its cases."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from braze.__main__ import main
from braze.bench import (
    clock,
    conv,
    dropout,
    environment,
    harness,
    memory,
    norm,
    optim,
    peers,
    rows,
    session,
    view,
)
from braze.bench.clock import Samples
from braze.bench.harness import Built, Case, Part, Setting, Suite
from torch import nn

pytestmark = pytest.mark.cpu_only("runs the benchmark's own processes")
FAST = ["--seconds", "0"]
DROPOUT = ["bench", "dropout", "--filter", "add 1M fp32 forward", *FAST]


def setting(seconds: float = 0.0, copy: float = 1e9, **more: Any) -> Setting:
    return Setting(clock.Host(), copy, seconds, **more)


def case(ours: Callable[[], Any], theirs: Callable[[], Any] | None, **options: Any) -> Case:
    """One part; ``theirs`` None: nobody to compare with."""
    makers = {"torch": lambda: theirs} if theirs is not None else {}
    part = Part(lambda _: Built({**makers, "braze": lambda: ours}), options.pop("bytes", 1000))
    return Case("a case", {"dtype": options.pop("dtype", "fp32")}, (part,), **options)


def measured(one: Case, where: Setting | None = None) -> dict[str, Any]:
    return filled(
        Suite("suite", lambda _: [one], 0.0, {"cpu": "warm"}).work(one, where or setting())
    )


def filled(work: rows.Work) -> dict[str, Any]:
    """Of the CPU, whatever the clock is."""
    return rows.fill(session._told(work, {"device": "cpu"}, lambda: None))


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """Makes calls that take that many seconds of a clock of their own, whatever else the machine does."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def make(seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds

        return call

    return make


Spend = Callable[[float], Callable[[], None]]

# ------------------------------------------------------------------ a row


def test_a_row_says_how_much_faster_ours_is(spend: Spend) -> None:
    row = measured(case(spend(0.002), spend(0.006)), setting(0.2, copy=1e6))
    assert row["ok"] and row["theirs"] == "torch" and row["ratio"] == 3
    assert row["low"] == row["high"] == row["ratio_min"] == 3
    ours, theirs = (row["contenders"][name]["warm"] for name in ("braze", "torch"))
    assert len(ours["rounds_us"]) == len(theirs["rounds_us"]) >= 3
    assert ours["min_us"] <= ours["median_us"]
    # 1000 bytes at 1 MB/s are 1 ms, of 2 ms.
    assert row["floor_us"] == 1000 and row["of_floor"] == 0.5
    assert row["gb_s"] == pytest.approx(1000 / ours["median_us"] / 1e3, rel=1e-3)


def test_what_computes_something_else_is_not_timed() -> None:
    """A benchmark of a wrong kernel is worse than none."""
    x = torch.ones(8)
    for error, dtype, ok in ((1e-6, "fp32", True), (1e-3, "fp32", False), (1e-2, "bf16", True)):
        row = measured(case(lambda e=error: x * (1 + e), lambda: x, dtype=dtype))  # type: ignore[misc]
        assert row["ok"] is ok and row["difference"] == pytest.approx(error, rel=0.1)
        assert ("contenders" in row) is ok
    assert "differs from torch's by 1.0e-03" in measured(case(lambda: 1.001 * x, lambda: x))["note"]
    assert measured(case(lambda: x * math.nan, lambda: x))["ok"] is False


def test_parts_are_added_up_as_often_as_they_are_there(spend: Spend) -> None:
    def part(name: str, seconds: float, count: int) -> Part:
        calls = {"torch": 2 * seconds, "braze": seconds}
        makers = {n: lambda t=t: spend(t) for n, t in calls.items()}  # type: ignore[misc]
        return Part(lambda _: Built(makers), 100, None, 0, name, count)

    row = measured(Case("two", {"dtype": "fp32"}, (part("a", 0.004, 3), part("b", 0.002, 1))))
    assert [(p["name"], p["count"]) for p in row["parts"]] == [("a", 3), ("b", 1)]
    us = row["contenders"]["braze"]["warm"]["median_us"]
    assert us == pytest.approx(3 * row["parts"][0]["braze_us"] + row["parts"][1]["braze_us"], 0.05)
    assert row["bytes"] == 400 and row["flops"] is None and 1.5 < row["ratio"] < 2.5


def test_a_contender_that_fails_is_left_out_and_told_unless_it_is_ours() -> None:
    def broken() -> Any:
        raise ValueError("on purpose")

    makers = {"torch": lambda: lambda: None, "apex": broken, "braze": lambda: lambda: None}
    one = Case("c", {"dtype": "fp32"}, (Part(lambda _: Built(makers)),))
    row = measured(one)
    assert row["ok"] and row["failed"] == {"apex": "ValueError: on purpose"}
    assert view.notes([row]) == ["c: apex left out: ValueError: on purpose"]
    makers["braze"] = broken
    assert measured(one)["ok"] is False


def test_torchs_slow_modes_are_timed_once_and_the_fastest_counts(spend: Spend) -> None:
    calls = {"torch slow": 0.02, "torch fast": 0.002, "torch near": 0.0021, "braze": 0.001}
    makers = {n: lambda t=t: spend(t) for n, t in calls.items()}  # type: ignore[misc]
    row = measured(Case("c", {"dtype": "fp32"}, (Part(lambda _: Built(makers)),)))
    assert row["theirs"] in ("torch fast", "torch near")
    assert row["slower"]["torch slow"] > 19_000 and "torch slow" not in row["contenders"]


def test_what_does_not_fit_is_skipped() -> None:
    one = case(lambda: None, lambda: None)
    row = measured(replace(one, parts=(replace(one.parts[0], needs=2**60),)))
    assert row["ok"] is None and "GiB are free" in row["note"]


def test_nobody_to_compare_with() -> None:
    row = measured(case(lambda: None, None))
    assert row["ok"] and "ratio" not in row and row["gb_s"] > 0
    assert "braze" in session.line(row)


def test_control_is_braze_against_itself(spend: Spend) -> None:
    row = measured(harness.control(case(spend(0.003), spend(0.03))))
    assert row["theirs"] == "braze again" and row["ratio"] == 1


def test_repeated_rows_keep_all_turns() -> None:
    one = case(lambda: None, lambda: None)
    first, second = measured(one), measured(one)
    counts = [len(r["contenders"]["braze"]["warm"]["rounds_us"]) for r in (first, second)]
    least = min(r["contenders"]["braze"]["warm"]["min_us"] for r in (first, second))
    both = harness.merge(first, second)
    ours = both["contenders"]["braze"]["warm"]
    assert len(ours["rounds_us"]) == sum(counts) and ours["min_us"] == least
    assert harness.merge({"name": "failed", "ok": False}, second) is second


# ----------------------------------------------------------------- clocks


def test_turns_rotate_and_end() -> None:
    assert list(clock.turns("ab", 0.0)) == [["a", "b"], ["b", "a"], ["a", "b"]]
    assert len(list(clock.turns("a", 60.0, 5))) == 5


def test_cold_calls_find_nothing_in_the_caches() -> None:
    x = torch.ones(2**18)  # 1 MB: in the second cache when warm
    for _ in range(5):  # other programs may hide it
        seen = clock.sample(clock.Host(), {"sum": lambda: x.sum()}, 0.5, ("warm", "cold"))["sum"]
        assert seen["warm"].least <= seen["warm"].median
        if seen["cold"].median > 1.1 * seen["warm"].median:
            return
    pytest.fail(f"cold {seen['cold'].median}, warm {seen['warm'].median}")


class FakeEvent:
    """On the stream's clock, which is the host's; ``done`` is what query() says."""

    done = False

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.time - self.time) * 1e3


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> clock.Cuda:
    """The CUDA clock over a stand-in for torch.cuda, so that its code runs without a GPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    properties = SimpleNamespace(name="fake", multi_processor_count=1, L2_cache_size=60 << 20)
    for name, value in {
        "Event": FakeEvent,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "_sleep": lambda cycles: time.sleep(1e-4),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda: (2**31, 2**31),
        "set_sync_debug_mode": lambda mode: None,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "graph": lambda g: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(clock.Cuda, "name", "cpu")
    monkeypatch.setattr(clock, "_FLUSH_BYTES", 4096)
    return clock.Cuda()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_cuda_clock(fake_cuda: clock.Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    small = next(c for c in optim.CASES if c.name == "AdamW / 1 x 64")
    where = Setting(fake_cuda, 1e12, 0.0)
    row = measured(small, where)
    ours = row["contenders"]["braze"]
    assert row["ok"] and ours["device"]["median_us"] > 0 and ours["host"]["median_us"] > 0
    assert row["host_waits"] is False
    assert {"torch fused", "braze fused", "braze graph", "torch graph"} <= {
        *row["contenders"],
        *row["slower"],
    }
    counted = optim._more(argparse.Namespace(filter=["SGD / 1000 x 1024"]), where)
    launches = rows.fill(counted[0])
    assert launches["ok"] and "copies" in launches["launches"]["braze"]
    assert len(fake_cuda.cold(lambda: None, 3, 1e-3)) == 3
    # A spin that ended too early leaves nothing to measure but the whole.
    monkeypatch.setattr(FakeEvent, "done", True)
    assert math.isnan(fake_cuda.queued(lambda: None, 3, 1e-3).host)
    assert fake_cuda.cold(lambda: None, 3, 1e-3) == []
    suite = replace(optim.SUITE, figure={"cpu": "device"})
    row = filled(suite.work(small, where))
    assert row["figure"] == "warm" and "too slow" in row["note"] and row["ratio"] > 0
    json.dumps(row, allow_nan=False)


def test_a_slow_host_is_given_more_time(
    fake_cuda: clock.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def cold(call: Any, count: int, expected: float) -> list[float]:
        asked.append(expected)
        return [1e-3] * count if len(asked) > 2 else []

    monkeypatch.setattr(fake_cuda, "cold", cold)
    seen = clock.sample(fake_cuda, {"only": lambda: None}, 0.0, ("warm", "cold"))["only"]["cold"]
    assert asked[2] == 4 * asked[0] and seen.median == 1e-3
    assert [math.isnan(value) for value in seen.rounds] == [True, True, False]
    assert math.isnan(Samples().median)


def test_waiting_is_seen(fake_cuda: clock.Cuda) -> None:
    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert fake_cuda.waits(waits) and not fake_cuda.waits(lambda: None)


def test_busy_processors_are_seen() -> None:
    code = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        try:
            time.sleep(0.1)
            assert environment.wait_until_idle(0.0) > environment.IDLE
        finally:
            other.kill()


def test_where_it_was_measured() -> None:
    assert environment._generation(25, 17) == "Zen 4" and environment._generation(25, 1) == "Zen 3"
    assert environment._generation(26, 2) == "Zen 5" and environment._generation(6, 1) == ""
    facts = environment.describe(0.0)
    json.dumps(facts)
    assert facts["gpu"] is None or facts["gpu"]["name"]
    assert facts["cores"] >= 1 and environment.last_cache() >= 2**20


# ---------------------------------------------------------------- commands


def test_one_shape_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table = tmp_path / "deep" / "rows.json", tmp_path / "rows.csv"
    assert main([*DROPOUT, "--json", str(file), "--csv", str(table), "--repeat", "2"]) == 0
    data = json.loads(file.read_text())
    assert data["format"] == session.FORMAT and data["command"][0] == "dropout"
    assert {"cpu", "torch", "commit", "sources", "busy"} <= set(data["environment"])
    control, row = data["rows"][:2]
    assert control["name"].startswith("A/A ") and row["name"].startswith("add 1M fp32")
    assert (row["suite"], row["device"], row["isa"]) == ("dropout", "cpu", control["isa"])
    (roof,) = data["roofs"].values()
    assert roof["copy_gb_s"] > 0 and f"{row['isa']}/{row['threads']}" in data["roofs"]
    # Twice over all rows: one row each, with the turns of both.
    assert len({r["name"] for r in data["rows"]}) == len(data["rows"])
    assert len(row["contenders"]["braze"]["warm"]["rounds_us"]) == 6
    lines = table.read_text().splitlines()
    assert lines[0].split(",") == session.CSV and len(lines) == 1 + len(data["rows"])
    out = capsys.readouterr().out
    assert "middle half" in out and "of floor" in out


def test_isa_holds_braze_and_torch_to_one_set(tmp_path: Path) -> None:
    """And all variants are in one file."""
    file = tmp_path / "rows.json"
    show = "import sys, torch; print(torch.backends.cpu.get_cpu_capability())"
    environ = {**os.environ, **session.Variant("baseline", None).environment()}
    seen = subprocess.run([sys.executable, "-c", show], env=environ, capture_output=True, text=True)
    assert seen.stdout.strip() in ("DEFAULT", "NO AVX")
    options = ["--isa", "baseline", "--threads", "1,2", "--json", str(file)]
    assert main([*DROPOUT, *options]) == 0
    data = json.loads(file.read_text())
    assert {(r["isa"], r["threads"]) for r in data["rows"]} == {("baseline", 1), ("baseline", 2)}
    assert set(data["roofs"]) == {"baseline/1", "baseline/2"}


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "braze", "bench", "dropout", "--json", str(file), *FAST]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "what was measured is kept" in err
    assert json.loads(file.read_text())["rows"] and "of floor" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--filter", "zzz"], "no row's name contains 'zzz'"),
        (["--isa", "abacus"], "'abacus' is not an instruction set"),
        (["--threads", "0"], "must be at least 1"),
        (["--against", "nobody"], "'nobody' is nobody to compare with"),
        (["--device", "tpu"], "invalid choice"),
        (["--json", "/proc/nowhere/rows.json"], "cannot write"),
        (["--repeat", "x"], "invalid"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "norm", *arguments])
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_missing_package_is_told_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(view.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(DROPOUT)
    assert "pip install 'braze[bench]'" in capsys.readouterr().err


def test_peers_that_are_not_installed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "ghost", peers.Peer("ghost_package", "g", {"SGD": "SGD"}))
    assert peers.missing(["torch", "ghost"]) == [
        "ghost_package is not installed: left out (pip install ghost_package)"
    ]
    assert peers.optimizers(["torch", "ghost"], "SGD", [], {}) == {}
    monkeypatch.setitem(peers.PEERS, "ghost", peers.Peer("torch", "torch.optim", {"SGD": "SGD"}))
    makers = peers.optimizers(["ghost"], "SGD", [torch.zeros(1)], {"lr": 1.0})
    assert callable(makers["ghost"]())


def test_a_driver_gets_rows_in_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    skip = tmp_path / "skip.json"
    skip.write_text(json.dumps(["A/A add 1M fp32 forward"]))
    assert main([*DROPOUT, "--rows", "--skip-file", str(skip)]) == 0
    lines = capsys.readouterr().out.splitlines()
    begun = [line[6:] for line in lines if line.startswith("BEGIN ")]
    kept = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    assert begun == [row["name"] for row in kept] and "A/A add 1M fp32 forward" not in begun
    assert all(row["isa"] and row["ok"] for row in kept)


# ------------------------------------------------------------------ suites


def names(device: str) -> argparse.Namespace:
    return argparse.Namespace(device=device, quick=False, filter=[])


@pytest.mark.parametrize("suite", [optim.SUITE, norm.SUITE, dropout.SUITE, conv.SUITE])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_data(suite: Suite, device: str) -> None:
    cases = suite.cases(names(device))
    assert len({one.name for one in cases}) == len(cases)
    assert any(one.quick for one in cases) or device == "cuda"
    for one in cases:
        assert one.tags["dtype"] in harness.DTYPES
        assert all(part.bytes or part.flops for part in one.parts)


def test_optimizers_cells() -> None:
    shapes = optim.resnet50_shapes()
    assert len(shapes) == 161 and sum(torch.Size(s).numel() for s in shapes) == 25_557_032
    by_name = {one.name: one for one in optim.CASES}
    assert by_name["AdamW / 1000 x 1024"].parts[0].bytes == 1000 * 1024 * 28
    assert by_name["SGD / bf16 100M"].parts[0].bytes == 1_000_000_000
    # Clipping reads the gradients once more; the average is read and written.
    step = by_name["AdamW / fp32 100M"].parts[0].bytes
    assert by_name["AdamW clip+amp+ema / fp32 100M"].parts[0].bytes == step + 3 * 400_000_000
    assert optim.GROUPS.group_each and optim.LARGE.small().numel <= 2**20 + 3
    assert optim.RESNET50.small().numel > 2**20


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Lion", optim.CLIP])
def test_optimizers_are_checked_before_they_are_timed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, cell = setting(), optim.Cell("x", ((33,), (5, 7)))
    recipe = (
        optim.Recipe(clip=True, amp=True, ema=True) if name in ("AdamW", "SGD") else optim.Recipe()
    )
    assert optim._check(cell, name, recipe, where) < 1e-5
    if name != optim.CLIP:
        monkeypatch.setitem(optim.OPTIONS, name, {**optim.OPTIONS[name], "lr": 1e-3})
        right = optim._braze_recipe
        monkeypatch.setattr(
            optim,
            "_braze_recipe",
            lambda groups, *rest: [p.data.mul_(1.01) for p in groups] and right(groups, *rest),
        )
        assert optim._check(cell, name, recipe, where) > 1e-3


def test_goals_on_cuda_are_judged() -> None:
    def of(one: str, **figures: Any) -> list[bool]:
        timed = {
            "warm": {"median_us": figures.pop("wall")},
            "device": {"median_us": figures["dev"]},
        }
        row = {"name": one, "device": "cuda", "contenders": {"braze": timed}, "ratio": 1.0}
        row |= {"floor_us": 100.0, "of_floor": 0.9, "host_waits": False, **figures}
        case = next(c for c in optim.CASES if c.name == one)
        assert case.goals is not None
        return [goal["met"] for goal in case.goals(row)]

    assert of("AdamW / 1000 x 1024", wall=61.0, dev=1.0) == [False]
    assert of("Adam / 1000 x 1024", wall=61.0, dev=1.0) == []
    assert of("SGD / 465 groups of 64", wall=1.0, dev=1.0, ratio=120.0) == [True]
    assert of("SGD / fp32 100M", wall=1.0, dev=104.0) == [True]
    assert of("SGD / fp32 100M", wall=1.0, dev=120.0) == [False]
    assert of("SGD clip+amp / ResNet-50", wall=1.0, dev=1.0, host_waits=True) == [False]
    relu = norm.cases(names("cuda"))[0]
    assert relu.goals is not None
    row = {"name": "r", "device": "cuda", "ratio": 1.7, "of_floor": 0.8}
    assert [goal["met"] for goal in relu.goals(row)] == [True, False]


def test_norms_cover_resnet50() -> None:
    layers = norm.resnet50_layers()
    assert sum(layer.count for layer in layers) == 53 and sum(layer.joins for layer in layers) == 16
    # Elements of one image, as many as its convolutions put out.
    assert sum(layer.channels * layer.side**2 * layer.count for layer in layers) == 11_113_984
    assert len(layers) == 12 and set(norm.QUICK) < {layer.name for layer in layers}
    kind = norm.Kind("bf16", "NHWC", "relu", join=True)
    assert sum(layer.count for layer in kind.layers()) == 16 and kind.passes("backward") == 6


@pytest.mark.parametrize("join", [False, True])
def test_norms_compute_the_same(join: bool) -> None:
    kind, layer = norm.Kind("fp32", "NHWC", "silu", 2, join), norm.Layer(8, 5, 1, 1)
    assert kind.input(layer, "cpu").is_contiguous(memory_format=torch.channels_last)
    for direction in norm.PASSES:
        makers = norm.build(kind, layer, direction, setting()).makers
        found = [makers[name]()() for name in ("braze", "torch", "braze, no reuse")]
        assert harness.difference(found[0], found[1]) < 1e-5
        assert harness.difference(found[2], found[0]) == 0


def test_stored_bytes_are_counted_once() -> None:
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    assert memory.stored_bytes(nn.Sequential(nn.SiLU(), nn.SiLU()), x) == 2 * x.nbytes
    assert memory.stored_bytes(nn.ReLU(), x) == x.nbytes
    assert memory.stored_bytes(nn.Identity(), x) == 0


def test_masks_that_are_no_dropout_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64, 32, 8)
    for name in dropout.OPERATIONS:
        assert dropout.check(name, x) is None
    forgets = replace(dropout.OPERATIONS["relu"], braze=lambda x: x.relu())
    monkeypatch.setitem(dropout.OPERATIONS, "relu", forgets)
    with pytest.raises(RuntimeError, match="standard deviation of braze's results"):
        dropout.check("relu", x)


def test_convolutions_compute_the_same() -> None:
    small = conv.Convolution(8, 16, 3, 1, 6)
    for training in (True, False):
        makers = conv.build(small, "fp32", "NHWC", training, setting()).makers
        assert harness.difference(makers["braze"]()(), makers["torch"]()()) < 1e-4
    assert conv.flops_of(small, 2) == 2 * 2 * 36 * 16 * 8 * 9
