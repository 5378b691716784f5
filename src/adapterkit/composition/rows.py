"""Which adapter each row of a batch runs, and each part of a sequence: the sizes that compositions speak of."""

import math

from ..errors import CompatibilityError
from .nodes import BatchSplit, Composition, CompositionNode, Parallel, Rows

__all__ = ["copies_of_rows", "divides_rows", "fixed_rows", "least_rows", "row_kinds", "rows_of", "sizes_of"]


def rows_of(composition: Composition | None, count: int) -> tuple[Composition | None, ...]:
    """What each of so many rows of a batch runs, a composition that gives each row the same.

    Raises:
        CompatibilityError: the sizes in it do not sum to the rows, or there are no equal parts.
    """
    if not isinstance(composition, CompositionNode) or not divides_rows(composition):
        return (composition,) * count
    if isinstance(composition, Rows):
        if len(composition.children) != count:
            raise CompatibilityError(
                f"Rows names {len(composition.children)} rows, and the batch has {count}; name one for each, None for "
                "the base"
            )
        return composition.children
    if isinstance(composition, (BatchSplit, Parallel)):
        given = composition.sizes if isinstance(composition, BatchSplit) else None
        sizes = sizes_of(given, len(composition.children), count, "the batch")
        parts = (rows_of(child, size) for child, size in zip(composition.children, sizes, strict=True))
        return tuple(row for part in parts for row in part)
    each = [rows_of(child, count) for child in composition.children]
    return tuple(composition.with_children(children) for children in zip(*each, strict=True))


def divides_rows(composition: Composition | None) -> bool:
    """Whether rows of one batch run different adapters."""
    if not isinstance(composition, CompositionNode):
        return False
    return isinstance(composition, (Rows, BatchSplit, Parallel)) or any(map(divides_rows, composition.children))


def copies_of_rows(composition: Composition | None) -> int:
    """How many times a composition runs the batch that the model is called with: once for each child of a Parallel."""
    if not isinstance(composition, CompositionNode):
        return 1
    below = math.prod(map(copies_of_rows, composition.children))  # one child at most holds a Parallel
    return below * len(composition.children) if isinstance(composition, Parallel) else below


def row_kinds(composition: Composition | None) -> tuple[Composition | None, ...]:
    """The different compositions that rows of a batch run, in order.

    Raises:
        CompatibilityError: sizes in it contradict one another.
    """
    fixed = fixed_rows(composition)
    return tuple(dict.fromkeys(rows_of(composition, least_rows(composition) if fixed is None else fixed)))


def fixed_rows(composition: Composition | None) -> int | None:
    """How many rows a composition needs; None if it takes any number that it can divide."""
    if isinstance(composition, Rows):
        return len(composition.children)
    if isinstance(composition, BatchSplit) and composition.sizes is not None:
        return sum(composition.sizes)
    if not isinstance(composition, CompositionNode):
        return None
    fixed = next((rows for child in composition.children if (rows := fixed_rows(child)) is not None), None)
    is_divided = isinstance(composition, (BatchSplit, Parallel))
    return fixed if fixed is None or not is_divided else fixed * len(composition.children)


def least_rows(composition: Composition | None) -> int:
    """The least number of rows that a composition without sizes can divide."""
    if not isinstance(composition, CompositionNode):
        return 1
    unit = math.lcm(*map(least_rows, composition.children))
    return unit * len(composition.children) if isinstance(composition, (BatchSplit, Parallel)) else unit


def sizes_of(sizes: tuple[int, ...] | None, count: int, whole: int, what: str) -> tuple[int, ...]:
    """The sizes of the parts of something; equal ones if none are given.

    Raises:
        CompatibilityError: they do not sum to it, or it has no equal parts.
    """
    if sizes is None and whole % count == 0:
        return (whole // count,) * count
    if sizes is None or sum(sizes) != whole:
        asked = f"{count} equal parts" if sizes is None else f"parts of {list(sizes)}, which are {sum(sizes)}"
        raise CompatibilityError(f"{what} has {whole}, and is to be divided into {asked}; give sizes= that sum to it")
    return sizes
