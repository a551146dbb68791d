"""``python -m bench NAME``: a checkout's benchmarks with the braze that can be imported."""

from . import COMMANDS, command

if __name__ == "__main__":
    raise SystemExit(command.main(None, "bench", COMMANDS))
