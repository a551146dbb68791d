"""A command line whose commands are modules. Standard library only: it also builds braze."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping
from typing import Any, NoReturn


class Command(argparse.ArgumentParser):
    """The parser of one command, whose module is imported only when the command is chosen.

    The module may have ``add_arguments(parser)`` and ``run(arguments)``, which returns the exit code. A wrong
    argument ends the program with one line and code 2, and so does an ``argparse.ArgumentError`` that ``run``
    raises.
    """

    def __init__(self, *, module: str = "", **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._module = module
        self.set_defaults(run=self._tell, command=self)

    def _tell(self, _: object) -> int:
        self.print_help()
        return 0

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._module:
            module = importlib.import_module(self._module)
            self.description = module.__doc__
            self.set_defaults(run=getattr(module, "run", self.get_default("run")))
            getattr(module, "add_arguments", lambda parser: None)(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def add_commands(self, package: str, commands: Mapping[str, str]) -> None:
        """Commands by the names of their modules, with what --help says of them; of "" it says nothing."""
        add = self.add_subparsers(metavar="COMMAND").add_parser
        for name, text in commands.items():
            told: dict[str, Any] = {"help": text} if text else {}
            add(name, module=f"{package}.{name}", **told)


def main(argv: list[str] | None, package: str, commands: Mapping[str, str]) -> int:
    """Runs a command of ``python -m PACKAGE`` and returns its exit code. Raises SystemExit after --help and for
    wrong arguments."""
    parser = Command(
        prog=f"python -m {package}", description=importlib.import_module(package).__doc__
    )
    parser.add_commands(package, commands)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    arguments.command_line = [sys.executable, "-m", package, *argv]
    try:
        code: int = arguments.run(arguments)
    except argparse.ArgumentError as error:
        arguments.command.error(str(error))
    return code
