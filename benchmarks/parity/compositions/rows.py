"""Which composition without rows in it each row of the outputs runs: rows are computed one by one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import adapterkit as ak

__all__ = ["Row", "rows_of"]


class Row(NamedTuple):
    """One row of the outputs.

    Attributes:
        source: Its row of the inputs.
        composition: What it runs.
        is_nested: Whether that stands in a composition that prepares what its children read, other than a Stack.
    """

    source: int
    composition: Any
    is_nested: bool = False


def rows_of(composition: Any, rows: list[int]) -> list[Row]:
    """What each row of the outputs runs, given these rows of the inputs."""
    if isinstance(composition, str) or not composition.children:
        return [Row(row, composition) for row in rows]
    if isinstance(composition, ak.Rows):
        return [Row(row, child, True) for row, child in zip(rows, composition.children, strict=True)]
    if isinstance(composition, (ak.BatchSplit, ak.Parallel)):
        parts = _parts(composition, rows)
        return [
            row._replace(is_nested=not isinstance(child, str))
            for child, part in zip(composition.children, parts, strict=True)
            for row in rows_of(child, part)
        ]
    each = [rows_of(child, rows) for child in composition.children]
    count = max(map(len, each))
    each = [own * (count // len(own)) for own in each]
    found = []
    for at in zip(*each, strict=True):
        children = [_child(composition, *pair) for pair in zip(composition.children, at, strict=True)]
        found.append(Row(at[0].source, composition.with_children(children)))
    return found


def _child(parent: Any, child: Any, row: Row) -> Any:
    """A child with its rows taken apart; still a composition, if it was one."""
    is_single = isinstance(row.composition, str) and not isinstance(child, str)
    return ak.Stack(row.composition) if is_single and not isinstance(parent, ak.Stack) else row.composition


def _parts(composition: Any, rows: list[int]) -> list[list[int]]:
    if isinstance(composition, ak.Parallel):
        return [rows] * len(composition.children)
    starts = [sum(composition.sizes[:n]) for n in range(len(composition.sizes) + 1)]
    return [rows[start:stop] for start, stop in pairwise(starts)]
