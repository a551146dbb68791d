"""``--isa``: a benchmark with braze and torch held to the same instruction set, in a process of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

import braze
from braze._native import _C

# torch's name of each of braze's sets.
TORCHS = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "avx512_bf16": "avx512"}


def add_option(parser: argparse.ArgumentParser) -> None:
    """``--isa``, and its meaning around the ``run`` that the parser has."""
    sets = _C.available_instruction_sets()
    parser.add_argument(
        "--isa", choices=[*sets, "all"], help="instruction set of braze and torch (default: best)"
    )
    run = parser.get_default("run")
    parser.set_defaults(run=lambda arguments: _run(run, arguments, sets))


def _run(
    run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, sets: list[str]
) -> int:
    """Returns the code of the benchmark; for all sets the first that is not 0."""
    if arguments.isa == "all":
        codes = [_in_child(name, arguments) for name in sets]
        return next(filter(None, codes), 0)
    if arguments.isa is not None and not _environment(arguments.isa).items() <= os.environ.items():
        return _in_child(arguments.isa, arguments)
    print(f"instruction set: {braze.build_info()['instruction set']}")
    return run(arguments)


def _environment(name: str) -> dict[str, str]:
    return {"BRAZE_CPU_CAPABILITY": name, "ATEN_CPU_CAPABILITY": TORCHS[name]}


def _in_child(name: str, arguments: argparse.Namespace) -> int:
    """The same command line; of an option that is there twice, the last counts."""
    command = [*arguments.command_line, "--isa", name]
    if arguments.isa == "all" and arguments.json is not None:
        command += ["--json", str(arguments.json.with_stem(f"{arguments.json.stem}-{name}"))]
    sys.stdout.flush()
    return subprocess.call(command, env={**os.environ, **_environment(name)})
