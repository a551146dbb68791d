"""Tries a wheel with one torch and one Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .rows import Row, WheelError


class Trial:
    """An environment of its own for one row, in ``folder``, in which its torch is and the wheel is tried."""

    def __init__(self, row: Row, folder: Path, keep: bool) -> None:
        self.row, self.keep = row, keep
        self.home = folder / f"torch{row.torch.minor}-python{row.python.version}"
        self.python = self.home / "bin/python"

    def run(self, *command: str | Path) -> None:
        """Away from the sources. Raises WheelError."""
        environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BRAZE_JIT")}
        environ["BRAZE_CACHE_DIR"] = str(self.home / "cache")
        done = subprocess.run(
            list(map(str, command)), cwd="/", env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            words = " ".join(map(str, command))[:200]
            raise WheelError(f"{self.row}: {words} failed:\n{done.stdout}")

    def install(self, *what: str | Path) -> None:
        quiet = ("--quiet", "--disable-pip-version-check", "--no-compile")
        self.run(self.python, "-m", "pip", "install", *quiet, *what)

    def prepare(self) -> Trial:
        if not self.keep or not self.python.exists():
            shutil.rmtree(self.home, ignore_errors=True)
            self.run(self.row.python.executable, "-m", "venv", self.home)
        self.install(self.row.torch.requirement)
        return self

    def run_smoke_test(self, wheel: Path, cuda: bool) -> None:
        self.install("--no-deps", "--force-reinstall", wheel)
        kind = "cuda" if cuda and self.row.torch.cuda else "cpu"
        self.run(self.python, Path(__file__).with_name("smoke.py"), kind)
        self.run(self.python, "-m", "braze", "info")
        if not self.keep:
            shutil.rmtree(self.home)
