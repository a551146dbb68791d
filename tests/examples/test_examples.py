"""Every file of examples/, run as a user runs it: it shows what its docstring says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# Runs a file where torchvision, which timm and lightning import, is not built for this torch.
WITH_TORCHVISION = """
import runpy, sys
from braze.bench import models
models._import_torchvision()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PYTHON = (sys.executable,)
TORCHVISION = (*PYTHON, "-c", WITH_TORCHVISION)
TWO_PROCESSES = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# What an import is installed as, if that is not its own name.
PACKAGES = {"sklearn": "scikit-learn"}
pytestmark = pytest.mark.cpu_only("runs programs of their own")


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def output_of(folder: Path, name: str, *arguments: str, command: tuple[str, ...] = PYTHON) -> str:
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """What the pattern's groups are, wherever it is found."""
    found = [float(group) for match in re.finditer(pattern, text) for group in match.groups()]
    assert found, f"no {pattern!r} in {text!r}"
    return found


def test_each_is_short_and_tested_and_says_what_it_needs() -> None:
    """A file that no test runs, or whose pip command lacks what it imports."""
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 7
    for file in files:
        text = file.read_text()
        assert text.count("\n") < 60, file.name
        assert f"test_{file.stem}" in globals(), file.name
        tree = ast.parse(text)
        docstring = ast.get_docstring(tree) or ""
        assert f" examples/{file.name}" in docstring
        needed = {"braze", "torch", *docstring.partition("Needs: pip install ")[2].split()}
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
                assert PACKAGES.get(name, name) in needed, f"{file.name} imports {name}"


@needs("sklearn")
@pytest.mark.parametrize("library", ["braze", "torch"])
def test_mnist_import_swap(tmp_path: Path, library: str) -> None:
    """A program that learns with one library only."""
    shown = output_of(tmp_path, "mnist_import_swap", *["--torch"] * (library == "torch"))
    assert shown.endswith(f"optimizer: {library}\n")
    assert numbers(r"accuracy (\S+)", shown)[-1] > 0.96


@pytest.mark.slow("three groups of two processes, each of which imports torch")
def test_ddp_restart(tmp_path: Path) -> None:
    """A restart within a window that ends in other weights than a run that nobody stopped."""

    def run(folder: Path, *arguments: str) -> list[str]:
        folder.mkdir(exist_ok=True)
        shown = output_of(folder, "ddp_restart", *arguments, command=TWO_PROCESSES)
        found = re.fullmatch(r"steps (\S+), loss .*: (\w{16}) \2\n", shown)  # two of the same
        assert found, shown
        return list(found.groups())

    restarted = tmp_path / "restarted"
    with ThreadPoolExecutor() as beside:
        never_stopped = beside.submit(run, tmp_path / "whole")
        stopped = run(restarted, "--stop-after", "5")
        assert [file.name for file in restarted.iterdir()] == ["ddp_restart.pt"]
        resumed = run(restarted)
        whole = never_stopped.result()
    assert not [*restarted.iterdir(), *(tmp_path / "whole").iterdir()]
    assert [steps for steps, _ in (stopped, resumed, whole)] == ["0-5", "5-20", "0-20"]
    assert resumed[1] == whole[1] != stopped[1]


@needs("lightning", "torchvision", "sklearn")
@pytest.mark.slow("imports lightning")
def test_lightning_module(tmp_path: Path) -> None:
    """A fused network that the Trainer does not train, averages that are not swapped in."""
    shown = output_of(tmp_path, "lightning_module", command=TORCHVISION)
    last, averaged = (numbers(rf"{name} ([\d.]+)", shown)[0] for name in ("accuracy", "weights"))
    assert last > 0.94 and averaged > 0.94 and last != averaged
    assert "2 batch norms: 2 fused with what follows" in shown


@needs("accelerate", "sklearn")
def test_accelerate_loop(tmp_path: Path) -> None:
    """An unchanged loop whose parts stay torch's after braze.install()."""
    shown = output_of(tmp_path, "accelerate_loop")
    assert shown.endswith("uses braze.optim.adamw\nuses braze.nn.batch_norm\n")
    assert numbers(r"accuracy (\S+)", shown)[-1] > 0.94


@needs("timm", "torchvision", "sklearn")
@pytest.mark.slow("imports timm")
def test_timm_fused(tmp_path: Path) -> None:
    """A checkpoint of a fused network with which timm's own computes something else."""
    shown = output_of(tmp_path, "timm_fused", command=TORCHVISION)
    assert "15 batch norms: 15 fused with what follows" in shown
    losses = numbers(r"loss (\S+)", shown)
    assert losses[-1] < 0.5 * losses[0]
    assert numbers(r"largest difference (\S+)", shown)[0] < 1e-4
    assert shown.endswith("same digits: True\n")


def test_inference_fold(tmp_path: Path) -> None:
    """Folded convolutions whose results differ. How much faster they are is no test's business."""
    shown = output_of(tmp_path, "inference_fold")
    assert 0 < numbers(r"largest difference (\S+)", shown)[0] < 1e-4  # 0: nothing is folded
    assert min(numbers(r"torch (\S+) ms, braze (\S+) ms\nratio (\S+)", shown)) > 0
    assert "13 batch norms: 12 fused with what follows, 1 with their convolution" in shown


@needs("sklearn")
def test_amp_one_pass(tmp_path: Path) -> None:
    """One pass that learns something else than torch's recipe."""
    shown = output_of(tmp_path, "amp_one_pass")
    theirs, their_average, ours, our_average = numbers(
        r": accuracy (\S+), of the average (\S+)", shown
    )
    assert min(theirs, their_average) > 0.9
    assert (ours, our_average) == pytest.approx((theirs, their_average), abs=0.01)
    assert theirs != their_average
    assert numbers(r"gradient (\S+)", shown)[0] > 0
