"""What the rest of the package asks of a composition, answered once for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from .nodes import Composition, CompositionNode, Fuse, Parallel, drops_in, fusions_in, names_always, names_in, parallel_in
from .rows import copies_of_rows, divides_rows, fixed_rows, least_rows, rows_of

__all__ = ["CompositionFacts", "facts_of"]


@dataclass(frozen=True)
class CompositionFacts:
    """The answers about one composition. Each is found when it is first asked for, and kept.

    Found late, since not every composition has every answer: sizes that contradict one another are an error only where
    rows are divided.
    """

    composition: Composition | None  # a name, a node, or None for the base alone

    @cached_property
    def children(self) -> tuple[CompositionFacts, ...]:
        """The facts of the children; () for a name."""
        node = self.composition
        return tuple(map(facts_of, node.children)) if isinstance(node, CompositionNode) else ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The adapters that it names, and each fusion after what it weighs; in order, with repetitions."""
        return tuple(names_in(self.composition))

    @cached_property
    def names_always(self) -> frozenset[str]:
        """The adapters that act on every row and token, in full."""
        return names_always(self.composition)

    @cached_property
    def fusions(self) -> tuple[Fuse, ...]:
        """The fusions in it."""
        return tuple(fusions_in(self.composition))

    @cached_property
    def drops(self) -> tuple[CompositionNode, ...]:
        """The nodes in it that drop layers."""
        return tuple(drops_in(self.composition))

    @cached_property
    def is_in_order(self) -> bool:
        """Tell whether it runs all of its adapters one after the other, on every row and token."""
        node = self.composition
        return not isinstance(node, CompositionNode) or (
            # All the way down: a Stack with an Average in it does not run all of its adapters in turn.
            node.is_in_order and all(child.is_in_order for child in self.children)
        )

    @cached_property
    def parallel(self) -> Parallel | None:
        """The Parallel in it; None if there is none."""
        return parallel_in(self.composition)

    @cached_property
    def copies(self) -> int:
        """How many times it runs the batch that the model is called with."""
        return copies_of_rows(self.composition)

    @cached_property
    def divides_rows(self) -> bool:
        """Tell whether rows of one batch run different adapters."""
        return divides_rows(self.composition)

    @cached_property
    def divides(self) -> bool:
        """Tell whether rows or tokens of one batch run different adapters, so that it must be known where they lie."""
        node = self.composition
        if not isinstance(node, CompositionNode):
            return False
        return node.child_gets != "everything" or any(child.divides for child in self.children)

    @cached_property
    def fixed_rows(self) -> int | None:
        """How many rows it needs; None if it takes any number that it can divide."""
        return fixed_rows(self.composition)

    @cached_property
    def row_kinds(self) -> tuple[CompositionFacts, ...]:
        """The facts of the different compositions that rows of a batch run, in order; itself alone if all run the same.

        Raises:
            CompatibilityError: sizes in it contradict one another.
        """
        if not self.divides_rows:
            return (self,)
        # Any number of rows that it takes will do, the fewest at best: more rows repeat the same kinds.
        count = least_rows(self.composition) if self.fixed_rows is None else self.fixed_rows
        return tuple(map(facts_of, dict.fromkeys(rows_of(self.composition, count))))


# Serving activates a few compositions in turn; a training with `random_drop` one for each depth. A `Rows` for each batch is
# another one every time, so there is a bound.
@lru_cache(maxsize=1024)
def facts_of(composition: Composition | None) -> CompositionFacts:
    """Return the facts of a composition; equal ones share them."""
    return CompositionFacts(composition)
