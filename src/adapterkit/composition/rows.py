"""What each row of a batch runs, by the facts that the nodes of a composition state."""

import math

from .nodes import Composition, CompositionNode

__all__ = ["copies_of_rows", "divides_rows", "fixed_rows", "least_rows", "rows_of"]


def rows_of(composition: Composition | None, count: int) -> tuple[Composition | None, ...]:
    """Return for each of `count` rows of a batch what it runs: a composition that gives each row the same.

    For example `Stack("a", BatchSplit("b", "c"))` of two rows is `Stack("a", "b")` and `Stack("a", "c")`.

    Raises:
        CompatibilityError: the sizes in it do not sum to the rows, or there are no equal parts.
    """
    if not isinstance(composition, CompositionNode) or not divides_rows(composition):
        return (composition,) * count
    if _gives_rows(composition):
        # e.g. (2, 4) of six rows: the first child gets rows 0 and 1, the second the other four.
        sizes = composition.row_sizes(count)
        parts = (rows_of(child, size) for child, size in zip(composition.children, sizes, strict=True))
        return tuple(row for part in parts for row in part)
    # The node itself does not divide, something below it does: each row runs the node over that row's children.
    each = [rows_of(child, count) for child in composition.children]
    return tuple(composition.with_children(children) for children in zip(*each, strict=True))


def divides_rows(composition: Composition | None) -> bool:
    """Tell whether rows of one batch run different adapters."""
    if not isinstance(composition, CompositionNode):
        return False
    return _gives_rows(composition) or any(map(divides_rows, composition.children))


def copies_of_rows(composition: Composition | None) -> int:
    """Return how many times a composition runs the batch of the model's call: once for each child of a Parallel."""
    if not isinstance(composition, CompositionNode):
        return 1
    below = math.prod(map(copies_of_rows, composition.children))  # one child at most holds a Parallel
    return below * len(composition.children) if composition.child_gets == "a copy" else below


def fixed_rows(composition: Composition | None) -> int | None:
    """Return how many rows a composition needs; None if it takes any number that it can divide."""
    if not isinstance(composition, CompositionNode):
        return None
    if composition.own_rows is not None:
        return composition.own_rows
    # One child with a fixed number decides; if another disagrees, `rows_of` says so when the rows are dealt.
    fixed = next((rows for child in composition.children if (rows := fixed_rows(child)) is not None), None)
    # Without sizes of its own the node gives equal parts, so that each has as many rows as the one that is fixed.
    return fixed if fixed is None or not _gives_rows(composition) else fixed * len(composition.children)


def least_rows(composition: Composition | None) -> int:
    """Return the least number of rows that a composition without sizes can divide."""
    if not isinstance(composition, CompositionNode):
        return 1
    # e.g. children that need multiples of 2 and of 3: each gets 6 rows. A name divides into any number.
    unit = math.lcm(*map(least_rows, composition.children))
    return unit * len(composition.children) if _gives_rows(composition) else unit


def _gives_rows(node: CompositionNode) -> bool:
    """Tell whether the children of a node run different rows; the copies of a batch are rows of the repeated one."""
    return node.child_gets in ("rows", "a copy")
