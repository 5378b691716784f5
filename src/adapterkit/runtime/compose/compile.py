"""What a composition becomes at one site: the steps of its hooks."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...composition.nodes import Average, Composition, Drop, Fuse, Split, Stack, multiplies_rows, to_json
from ...composition.rows import divides_rows, fixed_rows, row_kinds
from ...errors import CompatibilityError
from ...nn.traits import takes_back
from ...placement.layers import in_layers
from ...placement.spec import layout_of
from ...structure.tracing.row_layout import NO_ROWS, UNCLEAR, Layouts, RowLayout
from ..acting import acting_at
from ..site import AdapterSite, SiteEntry
from ..steps import AddDelta, AddProjected, AddsToTensor, Step
from .plan_nodes import ByRow, ByToken, Chain, ComposeStep, Fused, Leaf, Mean, PlanGroup, PlanNode, chain
from .stacked import kind_of

__all__ = ["SiteContext", "steps_at"]


@dataclass(frozen=True)
class SiteContext:
    """Where at a site steps act, and what the tensor there looks like."""

    path: str
    site: AdapterSite
    at: str
    row_axis: int | None
    layouts: Layouts
    merged: Collection[str]
    why_unseen: str = ""  # why `layouts` is empty, in brackets, for messages
    dropped: tuple[int, ...] = ()  # the layers in which nothing acts
    kinds: dict[Hashable, int] = field(default_factory=dict)  # numbers for what `kind_of` says

    def entries(self, name: str) -> list[SiteEntry]:
        """The modules of an adapter that act here."""
        held = self.site.entries.get(name, ()) if name not in self.merged else ()
        return [
            entry
            for entry in held
            if isinstance(entry, SiteEntry) and entry.spec.at == self.at and not in_layers(entry.spec.layer, self.dropped)
        ]

    def inside(self, composition: Composition) -> SiteContext:
        """The place as the children of a composition see it."""
        return replace(self, dropped=self.dropped + composition.layers) if isinstance(composition, Drop) else self


def steps_at(place: SiteContext, composition: Composition | None) -> tuple[Step, ...]:
    """The steps at one place. A name, and names one after the other, need none of the machinery for parts of tensors."""
    entries = list(_entries_in(place, composition))
    if composition is None or not entries:
        return ()
    in_order = _is_in_order(composition)
    acting = acting_at(place.at)
    if not in_order and acting.is_shared:
        changed = f"the Parameter {_parameters(entries)}" if place.at == "weight" else f"its {place.at}"
        raise CompatibilityError(
            f"{composition!r} cannot act on {place.path!r}: an adapter there changes {changed}, which all rows and tokens "
            "share. Stack such adapters, or adapt a layer"
        )
    if in_order:
        undoing = [entry for entry in entries if _undoes(place, entry)]
        ordered = [*(entry for entry in entries if entry not in undoing), *reversed(undoing)]
        steps = tuple(acting.step(entry, composition) for entry in ordered)
        # Those that read the host's own output after others, or a stream twice, need it kept.
        reads = [step.key for step in steps if isinstance(step, AddDelta) and step.handover is not None]
        if not any(isinstance(step, AddProjected) for step in steps[1:]) and len({*reads}) == len(reads):
            return steps
    node = _node(place, composition, composition)
    if not node.leaves:  # those that have modules here get no rows
        return ()
    _check_one_tensor(place, node, composition)
    if isinstance(node, ByRow) and len({*node.nodes}) == 1 and layout_of(place.layouts, node.readers[0].spec) == NO_ROWS:
        node = node.nodes[0]  # the same for all rows, as the tensor is
    return (ComposeStep(node, composition, _layout_at(place, node, composition)),)


def _layout_at(place: SiteContext, node: PlanNode, composition: Composition) -> RowLayout | None:
    """How rows lie in a place's tensor; None where their number is to tell it.

    Raises:
        CompatibilityError: it cannot tell, or the tensor is one for all rows.
    """
    seen = layout_of(place.layouts, node.readers[0].spec)
    said = None if place.row_axis is None else RowLayout(place.row_axis)
    if not _divides(node):
        return said or RowLayout(0)
    if seen is not None and seen.axis is None and _divides(node, ByRow):
        what = "holds no fixed number of tokens of each row" if seen == UNCLEAR else "is one for all rows of the batch"
        raise CompatibilityError(
            f"{composition!r} cannot act on {place.path!r}: its tensor there {what}. Exclude this place"
        )
    if seen is not None and seen.axis is not None:
        return seen
    if said is not None or multiplies_rows(composition):
        return said or RowLayout(0)
    if fixed_rows(composition) is None:
        raise CompatibilityError(
            f"{composition!r} cannot act on {place.path!r}: some modules of the model have the rows of the batch on axis 1 "
            f"(batch_first=False), and nothing says on which axis they are here{place.why_unseen}. Say how many there are, "
            "by Rows or by ak.BatchSplit(..., sizes=[...]), or exclude this place"
        )
    return None


def _divides(node: PlanNode, *kinds: type[PlanNode]) -> bool:
    """Whether a node is, or holds, one of these kinds; of those that divide rows or tokens, if none are named."""
    if isinstance(node, kinds or (ByRow, ByToken)):
        return True
    return isinstance(node, PlanGroup) and any(_divides(inner, *kinds) for inner in node.nodes)


def _is_in_order(composition: Composition | None) -> bool:
    """Whether a composition runs all of its adapters one after the other, on every row and token."""
    if composition is None or isinstance(composition, str):
        return True
    return isinstance(composition, (Stack, Drop)) and all(map(_is_in_order, composition.children))


def _entries_in(place: SiteContext, composition: Composition | None) -> Iterator[SiteEntry]:
    """The modules at a place of all adapters that a composition names, in order, but for those that it drops there."""
    if isinstance(composition, str):
        yield from place.entries(composition)
    elif composition is not None:
        for child in composition.children:
            yield from _entries_in(place.inside(composition), child)


def _node(place: SiteContext, composition: Composition | None, whole: Composition) -> PlanNode:
    """What a composition is at a place. `whole` is all of it, for messages."""
    if composition is None:
        return Chain(())
    if isinstance(composition, str):
        return chain([_leaf(place, entry, whole) for entry in place.entries(composition)])
    if divides_rows(composition):
        return _row_mix(place, composition, whole)
    nodes = [_node(place.inside(composition), child, whole) for child in composition.children]
    if not any(node.leaves for node in nodes):
        return Chain(())
    if isinstance(composition, (Stack, Drop)):
        undoing = [node for node in nodes if node.leaves and all(leaf.undoes for leaf in node.leaves)]
        return chain([*(node for node in nodes if node not in undoing), *reversed(undoing)])
    if isinstance(composition, Average):
        weights = composition.weights or (1.0,) * len(nodes)
        return Mean(tuple(nodes), tuple(weight / sum(weights) for weight in weights))
    if isinstance(composition, Split):
        _check_tokens(place, nodes, whole)
        return ByToken(tuple(nodes), composition.sizes, place.path)
    if isinstance(composition, Fuse):
        return _attend(place, composition, nodes, whole)
    raise TypeError(f"a {type(composition).__name__} is no plan of its own")  # Rows, BatchSplit, Parallel: above


def _row_mix(place: SiteContext, composition: Composition, whole: Composition) -> PlanNode:
    """What a composition that divides the rows is at a place."""
    kinds, is_parallel = row_kinds(composition), multiplies_rows(composition)
    nodes = tuple(_node(place, kind, whole) for kind in kinds)
    if is_parallel and len(set(nodes)) == 1:
        return nodes[0]  # for all children the same here, so that they may share it
    return ByRow(nodes, kinds, composition, place.path, is_parallel)


def _attend(place: SiteContext, composition: Fuse, nodes: Sequence[PlanNode], whole: Composition) -> PlanNode:
    """What a fusion is at a place."""
    entry = next(iter(place.entries(composition.fusion)), None)
    trained: Any = () if entry is None else getattr(entry.config, "children", ())
    others = [child for child in map(to_json, composition.children) if child not in trained]
    if entry is None or others:
        raise CompatibilityError(
            f"no fusion {composition.fusion!r} weighs {others or list(composition.children)} at {place.path!r}; "
            f"kit.add_fusion({composition!r}) makes one, to be trained"
        )
    return Fused(tuple(nodes), AddDelta(entry.key, whole, entry.spec, entry.handover))


def _leaf(place: SiteContext, entry: SiteEntry, whole: Composition) -> Leaf:
    step = acting_at(place.at).step(entry, whole)
    if not isinstance(step, AddsToTensor):
        raise CompatibilityError(f"{whole!r} cannot act on {place.path!r} with {type(step).__name__}")
    kind = kind_of(step, place.site.get_submodule(entry.key))
    return Leaf(step, place.kinds.setdefault(kind, len(place.kinds)), _undoes(place, entry))


def _undoes(place: SiteContext, entry: SiteEntry) -> bool:
    """Whether a module takes back what its adapter did elsewhere: of several the one that came last goes first."""
    return takes_back(place.site.get_submodule(entry.key))


def _check_tokens(place: SiteContext, nodes: Sequence[PlanNode], whole: Composition) -> None:
    """Raise CompatibilityError where what an adapter adds to a token depends on others, as in a convolution."""
    for leaf in (leaf for node in nodes for leaf in node.leaves):
        if leaf.step.spec.axis != -1:
            raise CompatibilityError(
                f"{whole!r} divides the sequence, and {place.path!r} ({leaf.step.spec.host}) has its features on axis "
                f"{leaf.step.spec.axis}: no sequence of tokens"
            )


def _check_one_tensor(place: SiteContext, node: PlanNode, whole: Composition) -> None:
    """Raise CompatibilityError where adapters change different tensors of one host's output or call."""
    specs = [leaf.step.spec for leaf in node.leaves]
    tensors = {(spec.input if spec.at == "input" else spec.output, spec.axis) for spec in specs}
    if len(tensors) > 1:
        raise CompatibilityError(
            f"{whole!r} cannot act on {place.path!r}: its adapters change different tensors there, "
            f"{sorted(map(str, tensors))}"
        )


def _parameters(entries: Sequence[SiteEntry]) -> str:
    return ", ".join(sorted({name for entry in entries for name in entry.spec.parameters}))
