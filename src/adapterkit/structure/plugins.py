"""Load what other packages bring by entry points, and say which package to mend where that fails."""

from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import ConfigError

__all__ = ["describe", "load", "points_in"]


def points_in(group: str) -> Iterator[EntryPoint]:
    """Yield the entry points of installed packages in a group, such as "adapterkit.hosts"."""
    yield from entry_points(group=group)


@cache
def load(point: EntryPoint) -> Any:
    """Return what an entry point leads to; it is imported once.

    Raises:
        ConfigError: importing it raised; names the package.
    """
    try:
        return point.load()
    except Exception as error:  # somebody else's module may raise anything
        raise ConfigError(f"{describe(point)} cannot be loaded: {error!r}. Mend or uninstall that package") from error


def describe(point: EntryPoint) -> str:
    """Name an entry point and its package, for messages."""
    owner = f" of the package {point.dist.name!r}" if point.dist is not None else ""
    return f"the entry point {point.value!r} in {point.group!r}{owner}"
