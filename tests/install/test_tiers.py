"""Tests that are marked slow are left out of make test, which says so, and not of make test-all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only("is about which tests run")

TESTS = """
import pytest
def test_quick(): pass
@pytest.mark.slow("why")
def test_slow(): pass
"""


@pytest.mark.parametrize(("every", "passed"), [("", 1), ("1", 2)])
def test_tiers(tmp_path: Path, every: str, passed: int) -> None:
    (tmp_path / "test_two.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "-n", "1", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "BRAZE_TEST_ALL": every},
        capture_output=True,
        text=True,
    )
    assert f"{passed} passed" in run.stdout, run.stdout + run.stderr
    assert ("left out: 1 tests, slow, make test-all: why" in run.stdout) == (passed == 1)
