"""``python -m braze``."""

from __future__ import annotations

import sys

from braze.bench.command import main as run

COMMANDS = {
    "info": "what is built, and what runs where",
    "build": "compile what braze came without for the installed torch: its binding, the CUDA kernels",
    "bench": "measure against torch",
    "demo": "train a small CNN on real images, torch and braze side by side",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Raises SystemExit after --help and for wrong arguments."""
    code: int = run(argv, "braze", COMMANDS)
    return code


if __name__ == "__main__":
    sys.exit(main())
