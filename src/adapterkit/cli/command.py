"""What a command of the command line is."""

import argparse
from typing import Protocol

__all__ = ["Command"]


class Command(Protocol):
    """One command: its name, what it does in a few words and in a few lines, its arguments, and what it runs."""

    # e.g. "inspect"; a few words for the list of commands; a few lines for its own --help
    name: str
    summary: str
    description: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""

    def run(self, options: argparse.Namespace) -> None:
        """Do it, and write to stdout. Raises AdapterKitError for what it cannot use."""
