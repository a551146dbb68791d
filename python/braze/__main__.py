"""``python -m braze info | build | bench | demo``."""

from __future__ import annotations

import sys

USAGE = """usage: python -m braze COMMAND [options]

  info    what is built, and what runs where
  build   compile the CUDA kernels for the installed torch, if braze came without them
  bench   microbenchmarks against torch (python -m braze bench --help)
  demo    train a small CNN on real images, torch and braze side by side (python -m braze demo --help)
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; 2 for a command that does not exist."""
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    rest = arguments[1:]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "info":
        from braze.info import main as info

        return info()
    if command == "build":
        from braze.build import main as build

        return build(rest)
    if command == "bench":
        from braze.bench.__main__ import main as bench

        return bench(rest)
    if command == "demo":
        from braze.demo.cli import main as demo

        return demo(rest)
    print(f"braze: unknown command '{command}'; choose info, build, bench or demo", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
