"""Write to the terminal."""

import os

from ..errors import MissingExtraError

__all__ = ["show"]


def show(value: object) -> None:
    """Write a value to stdout: in colour and as wide as the screen, in plain text and full width to a pipe or file.

    Raises:
        MissingExtraError: rich is not installed.
    """
    try:
        from rich.console import Console  # noqa: PLC0415  # of the extra `cli`
    except ImportError as error:
        raise MissingExtraError(
            "the command line needs the package 'rich', which is not installed: pip install \"adapterkit[cli]\""
        ) from error
    # Of NO_COLOR rich itself would keep bold and dim.
    console = Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
    if console.is_terminal:
        console.print(value)
    else:
        console.file.write(f"{value}\n")
