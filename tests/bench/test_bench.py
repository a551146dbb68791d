"""The benchmarks' tools: hashes of sources, debt, bit comparison, files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from braze.__main__ import main
from braze.bench import debt, files, golden, golden_cases, golden_passes, gpu_steps, sources

pytestmark = pytest.mark.cpu_only("runs the benchmark's own processes")
ROOT = Path(__file__).parents[2]
GOLDEN = ["bench", "golden"]
STEPS = [step for step in gpu_steps.STEPS if step.name != "build"]


# ------------------------------------------------------------------ hashes


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tree that looks like a source checkout."""
    (tmp_path / "pyproject.toml").write_text('name = "braze"\nversion = "9.8.7"\n')
    for name in ("cuda/a.cu", "cuda/deep/b.cuh", "math/m.h", "plan/p.h", "ops/x_cuda.cpp"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "csrc/ops/other.cpp").write_text("")
    return tmp_path


def test_hash_sees_every_change_that_matters_and_no_other(checkout: Path) -> None:
    globs = sources.FAMILIES["optimizer"]
    seen = {sources.digest(checkout, globs)}

    def changed() -> bool:
        new = sources.digest(checkout, globs)
        was_new = new not in seen
        seen.add(new)
        return was_new

    assert not changed()
    (checkout / "csrc/ops/other.cpp").write_text("not of this family")
    assert not changed()
    (checkout / "csrc/cuda/deep/b.cuh").write_text("edited")
    assert changed()
    (checkout / "csrc/cuda/new.cuh").write_text("")
    assert changed()
    (checkout / "csrc/math/m.h").rename(checkout / "csrc/math/n.h")
    assert changed()
    (checkout / "csrc/ops/x_cuda.cpp").unlink()
    assert changed()


def test_every_family_has_sources_here() -> None:
    for globs in sources.FAMILIES.values():
        assert sources.files_of(ROOT, globs)
        assert not any(p.suffix == ".pyc" for p in sources.files_of(ROOT, globs))


def test_root_is_found_from_below_and_its_absence_is_told(checkout: Path) -> None:
    assert sources.find_root(checkout / "csrc" / "cuda") == checkout
    (checkout / "pyproject.toml").write_text('name = "other"\n')
    with pytest.raises(FileNotFoundError, match="not inside a source checkout"):
        sources.find_root(checkout / "csrc")


# -------------------------------------------------------------------- debt


def result(root: Path, gpu_name: str, only: str = "", **changes: Any) -> None:
    """Steps' verdicts of that GPU; those of ``only`` one, or of all."""
    steps = {
        step.name: {
            "sources": step.sources(root),
            "device": gpu_name,
            "date": "2026-01-02T00:00:00+00:00",
            "complete": True,
            "ok": True,
            **(changes if step.name == only else {}),
        }
        for step in STEPS
        if only in ("", step.name) or "type" not in changes
    }
    data = {"device": {"type": changes.get("type", "cuda"), "name": gpu_name}, "steps": steps}
    files.write_json(data, root / "bench" / "results" / files.slug(gpu_name) / "gpu.json")


def test_no_debt(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(checkout, "NVIDIA H200")
    assert main(["bench", "debt", "--root", str(checkout)]) == 0
    assert "no debt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": "0" * 64}, "measured on other sources (newest: NVIDIA H200"),
        ({"ok": False}, "failed"),
        ({"complete": False}, "incomplete"),
        ({"available": False}, "not available"),
    ],
)
def test_debt(
    checkout: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    result(checkout, "NVIDIA H200", "bits", **changes)
    assert main(["bench", "debt", "--root", str(checkout)]) == 1
    out = capsys.readouterr().out
    assert f"bits: {words}" in out and out.count("NVIDIA H200") == 1 and "make gpu" in out


def test_debt_takes_the_newest_result_for_the_present_sources(checkout: Path) -> None:
    result(checkout, "NVIDIA H200")
    later = {"date": "2026-02-01"}
    result(checkout, "A100", "bits", sources="old", **later)
    assert debt.find_debt(checkout) == []
    result(checkout, "A100", "bits", available=False, **later)
    assert debt.find_debt(checkout) == []
    result(checkout, "A100", "bits", ok=False, **later)
    assert len(debt.find_debt(checkout)) == 1


def test_debt_of_convolutions(checkout: Path) -> None:
    """Their operators are theirs alone; a kernel's header is everybody's."""
    (checkout / "csrc/ops/conv.cpp").write_text("")
    result(checkout, "NVIDIA H200")
    assert debt.find_debt(checkout) == []
    (checkout / "csrc/ops/conv.cpp").write_text("edited")
    owed = {line.partition(":")[0] for line in debt.find_debt(checkout)}
    assert {"conv kernels", "conv kernels, all", "convolution", "bits", "memcheck"} <= owed
    assert not owed & {"optimizer", "dropout", "batch norm", "micro"}
    (checkout / "csrc/cuda/conv_gemm.cuh").write_text("")
    assert len(debt.find_debt(checkout)) == len(STEPS)


def test_debt_and_damaged_or_missing_results(checkout: Path) -> None:
    assert len(debt.find_debt(checkout)) == len(STEPS)
    result(checkout, "rehearsal", type="cpu")
    assert debt.find_debt(checkout)[0] == f"{STEPS[0].name}: no result of any GPU"
    result(checkout, "NVIDIA H200")
    (checkout / "bench/results/nvidia-h200/gpu.json").write_text('{"cut o')
    assert len(debt.find_debt(checkout)) == len(STEPS)


def test_debt_outside_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "debt", "--root", str(tmp_path)])
    assert "source checkout" in capsys.readouterr().err


# ------------------------------------------------------------------ golden


def test_golden_runs_are_deterministic_and_a_flipped_bit_is_seen() -> None:
    assert golden.self_check() == ""
    case = next(c for c in golden_cases.CASES if c.name == "AdamW/strided/bf16")
    assert golden.digest(case.run("cpu")) == golden.digest(case.run("cpu"))


def test_golden_self_check_fails_if_the_comparison_is_blind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(golden, "difference", lambda ours, theirs: "")
    assert "flipped bit" in golden.self_check()


def test_golden_tells_where_bits_differ() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    y = torch.tensor([1.0, 2.5, -3.0])
    text = golden.difference({"p0": x}, {"p0": y})
    assert "2 of 3" in text and "first [1] 2.0 != 2.5" in text
    assert golden.difference({"p0": torch.tensor(0.0)}, {"p0": torch.tensor(-0.0)})
    assert golden.difference({"p0": x}, {"p1": x}) and golden.difference({"p0": x}, {})


def test_golden_inputs_do_not_depend_on_torch() -> None:
    x = golden_cases.values("key", (4,), torch.float32)
    assert [float(v).hex() for v in x] == [
        "0x1.64dbd80000000p-1",
        "-0x1.3601380000000p-7",
        "0x1.0cb1000000000p-4",
        "0x1.88cf040000000p-7",
    ]
    many = golden_cases.values("many", (4096,), torch.float32)
    assert many.isfinite().all() and (many == 0).any() and many.abs().max() <= 2
    assert golden_cases.values("c", (2, 3), torch.complex64).shape == (2, 3)


def test_golden_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "goldens.json"
    assert main([*GOLDEN, "--filter", "CAG/all", "--write", str(file)]) == 0
    arguments = [*GOLDEN, "--filter", "CAG/all", "--goldens", str(file)]
    assert main(arguments) == 0
    data = json.loads(file.read_text())
    data["cases"]["CAG/all/bf16"] = "0" * 64
    file.write_text(json.dumps(data))
    capsys.readouterr()
    assert main(arguments) == 1
    assert "FAIL CAG/all/bf16" in capsys.readouterr().out
    for bad in (["--filter", "nonsense"], ["--goldens", str(tmp_path / "missing.json")]):
        with pytest.raises(SystemExit, match="2"):
            main([*GOLDEN, *bad])


def test_golden_cases_cover_what_they_claim() -> None:
    cases = golden_cases.CASES
    assert len({c.name for c in cases}) == len(cases)
    known = json.loads((ROOT / "bench" / "goldens.json").read_text())["cases"]
    assert set(known) == {c.name for c in golden.EVERY if c.tolerance is None}
    kinds = {c.name.partition("/")[0] for c in golden_passes.PASSES if c.short}
    assert kinds == {"dropout", "dropped", "batch_norm"}
    assert {c.dtype for c in cases} >= {torch.float32, torch.float64, torch.bfloat16, torch.half}
    assert {c.layout for c in cases} == set(golden_cases.LAYOUTS)
    assert 20 <= sum(c.short for c in cases) <= 60
    strided = golden_cases.LAYOUTS["strided"][0](torch.ones(3, 2))
    misaligned = golden_cases.LAYOUTS["misaligned"][0](torch.ones(8))
    assert not strided.is_contiguous() and misaligned.data_ptr() % 16 != 0


def test_golden_tolerance_is_of_the_largest_element() -> None:
    x = {"y": torch.tensor([1000.0, 1.0])}
    near, far = {"y": x["y"] + 0.009}, {"y": x["y"] + 0.011}
    assert golden.distance(near, x, 1e-5) == "" and "off by" in golden.distance(far, x, 1e-5)
    assert golden.distance({"y": x["y"] * math.nan}, x, 1e-5) and golden.distance({}, x, 1.0)


@pytest.mark.parametrize("name", ["SGD/sizes/fp32", "CAG/all/fp16", "dropout", "dropped", "conv/"])
def test_this_machine_computes_the_committed_bits(name: str) -> None:
    assert main([*GOLDEN, "--filter", name, "--goldens", str(ROOT / "bench/goldens.json")]) == 0


@pytest.mark.slow("all the golden cases on the emulator; the emulator's own smoke run is quick")
def test_the_emulated_device_computes_the_committed_bits() -> None:
    emulated = pytest.importorskip("emulated")
    if (reason := emulated.why_not()) is not None:
        pytest.skip(reason)
    goldens = ["--goldens", str(ROOT / "bench/goldens.json"), "--device", "emulated"]
    for name in ("misaligned/bf16", "dropout/1000/", "dropped", "batch_norm", "conv/3x3"):
        goldens += ["--filter", name]
    assert main([*GOLDEN, *goldens]) == 0


# ------------------------------------------------------------------- files


def test_results_survive_and_are_sent_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.slug("NVIDIA H200 NVL") == "nvidia-h200-nvl"
    path = tmp_path / "deep" / "x.json"
    files.write_json({"a": 1}, path)
    assert files.read_json(path) == {"a": 1} and os.listdir(path.parent) == ["x.json"]
    monkeypatch.setenv("OUT", str(tmp_path))
    assert files.collect_folder() == tmp_path
    monkeypatch.setenv("OUT", str(tmp_path / "missing"))
    assert files.collect_folder() is None
