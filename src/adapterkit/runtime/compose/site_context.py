"""Where at a site a composition is to act: what its lowering needs to know."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field, replace

from ...composition.nodes import Composition, CompositionNode
from ...nn.traits import takes_back
from ...placement.layers import in_layers
from ...structure.tracing.row_layout import Layouts
from ..site import AdapterSite, SiteEntry

__all__ = ["SiteContext"]


@dataclass(frozen=True)
class SiteContext:
    """One way of acting at one site, and what the tensor there looks like.

    Attributes:
        path: The host's path, for messages.
        site: The site.
        at: The name of the way of acting; see `ACTING`.
        row_axis: The axis of the rows that the model's modules say; None if they do not say.
        layouts: How rows were seen to lie in the host's tensors.
        merged: The adapters that are merged into the weights: those have no steps.
        why_unseen: Why `layouts` is empty, in brackets, for messages.
        dropped: The layers in which nothing acts, inside of a `Drop`.
        kinds: Map what `stacking_key` says of a module to a number, which hooks compare faster. Filled while lowering.
    """

    path: str
    site: AdapterSite
    at: str
    row_axis: int | None
    layouts: Layouts
    merged: Collection[str]
    why_unseen: str = ""
    dropped: tuple[int, ...] = ()
    kinds: dict[Hashable, int] = field(default_factory=dict)

    def entries(self, name: str) -> list[SiteEntry]:
        """Return the modules of an adapter that act here."""
        held = self.site.entries.get(name, ()) if name not in self.merged else ()  # merged, it is in the weights
        return [
            entry
            for entry in held
            if isinstance(entry, SiteEntry) and entry.spec.at == self.at and not in_layers(entry.spec.layer, self.dropped)
        ]

    def entries_of(self, composition: Composition | None) -> Iterator[SiteEntry]:
        """Yield the modules of all adapters that a composition names and does not drop here, in order; no fusions."""
        if isinstance(composition, CompositionNode):
            for child in composition.children:
                yield from self.inside(composition).entries_of(child)
        elif composition is not None:
            yield from self.entries(composition)

    def inside(self, node: CompositionNode) -> SiteContext:
        """Return the context as the children of a node see it: with the layers that it drops."""
        return replace(self, dropped=self.dropped + node.dropped_layers) if node.dropped_layers else self

    def undoes(self, entry: SiteEntry) -> bool:
        """Tell whether a module takes back what its adapter did elsewhere: of several the one that came last goes first."""
        return takes_back(self.site.get_submodule(entry.key))
