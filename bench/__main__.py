"""Chooses a benchmark by name."""

from __future__ import annotations

import sys

USAGE = """usage: python -m braze bench NAME [options]

  optim   one optimizer step, against every mode of torch.optim (python -m braze bench optim --help)
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark and returns its exit code; 2 for a name that does not exist."""
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name == "optim":
        from .optim import main as optim

        return optim(arguments[1:])
    print(f"braze bench: unknown benchmark '{name}'; choose optim", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
