"""The command line: `adapterkit inspect MODEL`. A new command is a file here and a line in COMMANDS."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from ..errors import AdapterKitError
from .command import Command
from .inspect import Inspect

__all__ = ["COMMANDS", "main"]

COMMANDS: tuple[Command, ...] = (Inspect(),)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 for input that it could not use, said on stderr.

    Args:
        arguments: Those of the command line; of this process if None.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the lines of a tree are not in every encoding
    options = _parser().parse_args(arguments)
    command: Command = options.command
    try:
        command.run(options)
        # Here, not when Python ends: a pipe that nobody reads any more shows on writing.
        sys.stdout.flush()
    except AdapterKitError as error:
        sys.stderr.write(f"adapterkit {command.name}: {error}\n")
        return 2  # as argparse exits for arguments that it cannot use
    except BrokenPipeError:  # `| head`: nobody reads on, nor will what Python flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adapterkit", description="Adapt any PyTorch model with small trained modules.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.summary, description=command.description)
        command.add_arguments(sub)
        sub.set_defaults(command=command)  # `main` reads which command was named off the options
    return parser
