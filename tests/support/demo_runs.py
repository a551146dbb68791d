"""Quick runs of the demo, for the tests of its networks; they need what the demo needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from braze.demo.cli import main

QUICK = ["--batch-size", "64", "--threads", "1"]
# Networks with dropout see other masks than torch's; batch norm's rounding is all the others see.
WITH_DROPOUT = ("alexnet", "googlenet")


def run_demo(out: Path, *arguments: str) -> dict[str, Any]:
    assert main([*QUICK, "--out", str(out), *arguments]) == 0
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result
