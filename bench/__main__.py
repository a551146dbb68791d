"""``python -m bench NAME``: a checkout's benchmarks with the braze that can be imported."""

from braze.__main__ import main

from . import COMMANDS

if __name__ == "__main__":
    raise SystemExit(main(package="bench", commands=COMMANDS))
