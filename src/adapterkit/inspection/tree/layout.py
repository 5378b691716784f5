"""Columns of a tree as lines that fit a width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .cells import COLUMNS, Cell, Cells, cells
from .nodes import TreeNode

__all__ = ["Line", "lines"]

_NUMERIC = {"width", "parameters", "size"}
_DROPPED_FIRST = ("type", "size", "width", "trains")  # where there is no room for all
_ROLE = 12  # columns that are left to roles at least
_GAP = "  "

Line = tuple[Cell, ...]


def lines(root: TreeNode, width: int | None = None) -> Iterator[Line]:
    """Yield the lines of a tree: headings, then a line for each node.

    Args:
        root: What to show.
        width: Columns of the screen: the less telling columns are left out, and lines cut, to fit. None: no limit.
    """
    heading = {name: [Cell(name, "dim")] for name in COLUMNS}
    rows = list(cells(root))
    widths = _widths([heading, *rows], _telling_columns(rows), width)
    for row in (heading, *rows):
        yield tuple(_cut(_joined(row, widths), width))


def _telling_columns(rows: Sequence[Cells]) -> list[str]:
    """Return the columns that tell something: not an empty one, nor what is the same for all and written below the tree."""
    telling = [name for name in COLUMNS if any(_length(row[name]) for row in rows)]
    states = {cell.text for row in rows for cell in row["trains"] if cell.text}
    return [name for name in telling if name != "trains" or len(states) > 1]


def _widths(table: Sequence[Cells], names: Iterable[str], width: int | None) -> dict[str, int]:
    """Map the columns for which there is room to their widths. What is too long then is cut in the role."""
    widths = {name: max(_length(row[name]) for row in table) for name in names}
    if width is None:
        return widths
    # One after the other, and only as long as the lines are too wide.
    for name in _DROPPED_FIRST:
        if _total(widths) > width:
            widths.pop(name, None)
    if "role" in widths:
        # What is still missing is taken from the roles. Below `_ROLE` whole lines are cut instead.
        widths["role"] = max(_ROLE, widths["role"] - max(0, _total(widths) - width))
    return widths


def _total(widths: dict[str, int]) -> int:
    return sum(widths.values()) + len(_GAP) * (len(widths) - 1)


def _length(cells: Sequence[Cell]) -> int:
    return sum(len(cell.text) for cell in cells)


def _joined(row: Cells, widths: dict[str, int]) -> Iterator[Cell]:
    """Yield the cells of a row, each column as wide as it should be."""
    for i, (name, wide) in enumerate(widths.items()):
        cells = list(_cut(row[name], wide))
        space = Cell(" " * (wide - _length(cells)))
        yield Cell(_GAP if i else "")
        yield from [space, *cells] if name in _NUMERIC else [*cells, space]


def _cut(cells: Iterable[Cell], width: int | None) -> Iterator[Cell]:
    """Yield the cells up to a width, without what is empty at the end."""
    kept = [cell for cell in cells if cell.text]
    while kept and not kept[-1].text.strip():
        kept.pop()
    length = _length(kept)
    left = length if width is None else width
    is_long = length > left
    for cell in kept:
        # A cell that ends exactly at the edge is marked with "…", too: there is more behind it.
        text = cell.text if len(cell.text) < left or not is_long else f"{cell.text[: left - 1]}…"
        yield Cell(text, cell.style)
        left -= len(text)
        if left <= 0:
            return
