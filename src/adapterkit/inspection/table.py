"""Write rows of text as a table, and long lists in short."""

from collections.abc import Iterable, Sequence

__all__ = ["in_short", "table"]

_SHOWN = 3


def table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as lines, with columns as wide as their widest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def in_short(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Return the first texts of a list, and how many more there are: "a, b, c and 45 more"."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
