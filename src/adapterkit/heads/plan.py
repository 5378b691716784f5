"""Which heads a composition runs, and on which rows: the steps of heads at a site."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..composition.facts import CompositionFacts
from ..composition.nodes import Composition, CompositionNode
from ..errors import CompatibilityError
from ..runtime.lookup import sites_among
from ..runtime.site import AdapterSite, HeadEntry, root_of
from ..runtime.steps import Step
from ..structure.paths import SITE, ancestors
from .call import LABELS, SPAN, HeadRequest, masks_of
from .config import HeadConfig, MultipleChoiceHead, QuestionAnsweringHead
from .modules import InvertibleModule
from .steps import Head, Owned, RunHeads, UseHead, UseHeads, Way

__all__ = ["head_owner", "head_steps"]


def head_owner(composition: Composition | None, owners: Collection[str]) -> str | None:
    """Return whose head runs for rows that all run this composition; None for nobody's.

    Of adapters one after the other it is the last that owns one; of any others there may be one owner.

    Raises:
        CompatibilityError: several of those that act side by side own one.
    """
    if not isinstance(composition, CompositionNode):
        return composition if composition in owners else None
    # A head of the fusion itself was trained on what the fusion makes of its children.
    if composition.fusion in owners:
        return composition.fusion
    found = [owner for child in composition.children if (owner := head_owner(child, owners)) is not None]
    # Several children with heads of one owner are no question: it is the same head.
    if composition.head_from == "last" or len({*found}) < 2:
        return found[-1] if found else None
    raise CompatibilityError(
        f"{composition!r} cannot choose between the heads of {list(dict.fromkeys(found))}, which act on the same rows. "
        "Load or add all but one without heads, or put an adapter that owns the head last in a Stack around it"
    )


@dataclass(frozen=True)
class _Host:
    """A host with heads, and the composition that is to choose among them.

    Attributes:
        path: Its path.
        modules: All modules of the model, by path.
        facts: Those of the composition.
        row_axis: The axis of the rows of the batch in what heads read.
    """

    path: str
    modules: Mapping[str, nn.Module]
    facts: CompositionFacts
    row_axis: int

    def owners(self, entries: Collection[str]) -> list[str | None]:
        """Return for each kind of row whose head runs, of the adapters that `entries` names. Raises: see `head_owner`."""
        return [head_owner(kind.composition, entries) for kind in self.facts.row_kinds]

    @property
    def kinds(self) -> tuple[Composition | None, ...]:
        """The different compositions that rows run."""
        return tuple(kind.composition for kind in self.facts.row_kinds)


def head_steps(
    path: str, modules: Mapping[str, nn.Module], site: AdapterSite, facts: CompositionFacts, *, row_axis: int
) -> tuple[Step, ...]:
    """Return the steps of the heads at a host, for the rows of each adapter that owns one there.

    Raises:
        CompatibilityError: see `head_owner`.
    """
    in_place: dict[str, HeadEntry] = {}  # an adapter has at most one head in the place of a host
    on_output: dict[str, list[HeadEntry]] = {}
    for name, entries in site.entries.items():
        for entry in (entry for entry in entries if isinstance(entry, HeadEntry)):
            if entry.spec.above is None:
                in_place[name] = entry
            else:
                on_output.setdefault(name, []).append(entry)
    if not in_place and not on_output:  # as at nearly every site
        return ()
    host = _Host(path, modules, facts, row_axis)
    # A host may have both: the last layer of an nn.Sequential yields the model's output. First its output is made.
    return (*_steps_in_place(host, in_place), *_steps_on_output(host, on_output))


def _steps_in_place(host: _Host, entries: Mapping[str, HeadEntry]) -> Iterator[Step]:
    """Yield the step that runs heads in the place of the host, if any row has one. `entries` has one for each adapter."""
    if not entries:
        return
    # One for each kind of row.
    keys = tuple(None if owner is None else entries[owner].key for owner in host.owners(entries))
    # All rows with one head need no dealing of rows; rows without any keep what the host made.
    if len({*keys}) > 1:
        yield UseHeads(keys, host.kinds, host.facts.composition, host.row_axis, host.path)
    elif keys[0] is not None:
        yield UseHead(keys[0], host.facts.composition)


def _steps_on_output(host: _Host, entries: Mapping[str, list[HeadEntry]]) -> Iterator[Step]:
    """Yield the step that runs heads on the model's output, if any row has one. `entries` has those of each adapter."""
    owners = host.owners(entries) if entries else []
    running = [entry for owner in dict.fromkeys(owners) if owner is not None for entry in entries[owner]]
    if not running:
        return
    root = root_of(host.path, running[0])
    request = _request_of([entry.spec.config for entry in running], host.facts.composition, host.modules[root])
    kinds = host.kinds
    owned = tuple(
        None if owner is None else Owned(owner, tuple(_head(entry, kind, root, host.modules) for entry in entries[owner]))
        for owner, kind in zip(owners, host.facts.row_kinds, strict=True)
    )
    if len(set(owned)) == 1:  # rows run different adapters but the same heads, which then run once on all rows
        owned, kinds = owned[:1], kinds[:1]
    yield RunHeads(owned, kinds, host.facts.composition, host.row_axis, host.facts.copies, request)


def _request_of(configs: Sequence[HeadConfig], composition: Composition | None, root: nn.Module) -> HeadRequest:
    """Return what the heads of a composition take off the call of the model `root`.

    Raises:
        CompatibilityError: heads of different numbers of choices, of which the inputs can have one only.
    """
    spans = SPAN if any(isinstance(config, QuestionAnsweringHead) for config in configs) else ()
    choices = {config.num_choices for config in configs if isinstance(config, MultipleChoiceHead)}
    if len(choices) > 1:
        raise CompatibilityError(f"{composition!r} has heads of {sorted(choices)} choices; a batch has one number of them")
    return HeadRequest((LABELS, *spans), next(iter(choices), None), masks_of(root))


def _head(entry: HeadEntry, kind: CompositionFacts, root: str, modules: Mapping[str, nn.Module]) -> Head:
    """Return what a step knows of a head that rows of this kind run."""
    spec = entry.spec
    config: Any = spec.config
    if not config.has_vocabulary:
        return Head(config.name, entry.key, spec.width, config.output, spec.takes_mask)
    embedding = None if spec.embedding is None else _way(spec.embedding)
    undoes = tuple(_ways_undone(kind, root, modules))
    return Head(config.name, entry.key, spec.width, config.output, spec.takes_mask, embedding, undoes)


def _ways_undone(kind: CompositionFacts, root: str, modules: Mapping[str, nn.Module]) -> Iterator[Way]:
    """Yield the ways from the model to the adapters of its embedding that a head with the vocabulary undoes, last first.

    The head reads hidden states as embeddings, and invertible adapters changed those on the way in.

    Raises:
        CompatibilityError: they are not one after the other, so that there is no order to undo them in.
    """
    ways: dict[str, Way] = {}
    for path, _, site in sites_among(modules):
        # Only below the model that the head reads: an adapter outside of it did not change its embeddings.
        if root in ancestors(path):
            for name, key in _undone_at(site, kind.names):
                # The first of an adapter: where several say so, they are one and the same change.
                ways.setdefault(name, (*_way(path[len(root) :].lstrip(".")), SITE, key))
    if ways and not kind.is_in_order:  # layers that a Drop leaves out are not the embedding's
        raise CompatibilityError(
            f"{kind.composition!r} has invertible adapters of the embedding, {sorted(ways)}, side by side: a head with the "
            "vocabulary cannot undo them. Stack them"
        )
    # One that the composition names twice acted twice, and is undone twice.
    yield from (ways[name] for name in reversed(kind.names) if name in ways)


def _undone_at(site: AdapterSite, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each adapter at a site that is to be undone, with its module's name among the site's children."""
    for name in {*names} & site.entries.keys():
        for entry, module in site.modules_of(name):
            if isinstance(module, InvertibleModule) and module.is_undone:
                yield name, entry.key


def _way(path: str) -> Way:
    """Return a path as the names on the way there; none for the model itself, whose path is ""."""
    return tuple(path.split(".")) if path else ()
