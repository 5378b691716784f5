"""Which heads a composition runs, and on which rows: the steps of heads at a site."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ..composition.nodes import Composition, CompositionNode, Fuse, Stack, names_in
from ..composition.rows import copies_of_rows, divides_rows, row_kinds
from ..errors import CompatibilityError
from ..runtime.site import AdapterSite, HeadEntry, root_of
from ..runtime.steps import Step
from ..structure.paths import SITE, ancestors
from .call import LABELS, SPAN, HeadRequest, masks_of
from .config import MultipleChoiceHead, QuestionAnsweringHead
from .modules import InvertibleModule
from .steps import Head, Owned, RunHeads, UseHead, UseHeads, Way

__all__ = ["head_owner", "head_steps"]


def head_owner(composition: Composition | None, owners: Collection[str]) -> str | None:
    """Whose head runs for rows that all run this composition; None for nobody's.

    Of adapters one after the other it is the last that owns one; of any others there may be one owner.

    Raises:
        CompatibilityError: several of those that act side by side own one.
    """
    if not isinstance(composition, CompositionNode):
        return composition if composition in owners else None
    if isinstance(composition, Fuse) and composition.fusion in owners:
        return composition.fusion
    found = [owner for child in composition.children if (owner := head_owner(child, owners)) is not None]
    if isinstance(composition, Stack) or len({*found}) < 2:
        return found[-1] if found else None
    raise CompatibilityError(
        f"{composition!r} cannot choose between the heads of {list(dict.fromkeys(found))}, which act on the same rows. "
        "Load or add all but one without heads, or put an adapter that owns the head last in a Stack around it"
    )


def head_steps(
    path: str, modules: Mapping[str, nn.Module], site: AdapterSite, composition: Composition | None, row_axis: int
) -> tuple[Step, ...]:
    """The steps of the heads at a host, for the rows of each adapter that owns one there.

    Raises:
        CompatibilityError: see `head_owner`.
    """
    in_place: dict[str, HeadEntry] = {}  # an adapter has at most one head in the place of a host
    on_output: dict[str, list[HeadEntry]] = {}
    for name, entries in site.entries.items():
        for entry in entries:
            if isinstance(entry, HeadEntry) and entry.spec.above is None:
                in_place[name] = entry
            elif isinstance(entry, HeadEntry):
                on_output.setdefault(name, []).append(entry)
    if not in_place and not on_output:
        return ()
    kinds = row_kinds(composition) if divides_rows(composition) else (composition,)
    steps: list[Step] = []
    if in_place:
        steps += _in_place(path, in_place, composition, kinds, row_axis)
    if on_output:
        steps += _on_output(path, modules, on_output, composition, kinds, row_axis)
    return tuple(steps)


def _in_place(
    path: str,
    entries: Mapping[str, HeadEntry],
    composition: Composition | None,
    kinds: tuple[Composition | None, ...],
    row_axis: int,
) -> Iterator[Step]:
    owners = [head_owner(kind, entries) for kind in kinds]
    keys = tuple(None if owner is None else entries[owner].key for owner in owners)
    if len({*keys}) == 1:
        if keys[0] is not None:
            yield UseHead(keys[0], composition)
    else:
        yield UseHeads(keys, kinds, composition, row_axis, path)


def _on_output(
    path: str,
    modules: Mapping[str, nn.Module],
    entries: Mapping[str, list[HeadEntry]],
    composition: Composition | None,
    kinds: tuple[Composition | None, ...],
    row_axis: int,
) -> Iterator[Step]:
    owners = [head_owner(kind, entries) for kind in kinds]
    running = [entry for owner in dict.fromkeys(owners) if owner is not None for entry in entries[owner]]
    if not running:
        return
    root = root_of(path, running[0])
    owned = tuple(
        None if owner is None else Owned(owner, tuple(_head(entry, kind, root, modules) for entry in entries[owner]))
        for owner, kind in zip(owners, kinds, strict=True)
    )
    configs = [entry.spec.config for entry in running]
    spans = any(isinstance(config, QuestionAnsweringHead) for config in configs)
    choices = {config.num_choices for config in configs if isinstance(config, MultipleChoiceHead)}
    if len(choices) > 1:
        raise CompatibilityError(f"{composition!r} has heads of {sorted(choices)} choices; a batch has one number of them")
    wants = HeadRequest((LABELS, *(SPAN if spans else ())), next(iter(choices), None), masks_of(modules[root]))
    if len(set(owned)) == 1:  # all rows run the same
        owned, kinds = owned[:1], kinds[:1]
    yield RunHeads(owned, kinds, composition, row_axis, copies_of_rows(composition), wants)


def _head(entry: HeadEntry, kind: Composition | None, root: str, modules: Mapping[str, nn.Module]) -> Head:
    """What a step knows of a head that rows of this kind run."""
    spec = entry.spec
    config: Any = spec.config
    if not config.has_vocabulary:
        return Head(config.name, entry.key, spec.width, config.output, spec.takes_mask)
    embedding = None if spec.embedding is None else tuple(spec.embedding.split(".") if spec.embedding else ())
    undoes = tuple(_undoes(kind, root, modules))
    return Head(config.name, entry.key, spec.width, config.output, spec.takes_mask, embedding, undoes)


def _undoes(kind: Composition | None, root: str, modules: Mapping[str, nn.Module]) -> Iterator[Way]:
    """Ways from the model to the adapters of its embedding that a head with the vocabulary undoes, the last one first.

    Raises:
        CompatibilityError: they are not one after the other, so that there is no order to undo them in.
    """
    ways: dict[str, Way] = {}
    for path, module in modules.items():
        site = module._modules[SITE] if SITE in module._modules else None  # noqa: SIM401  # TorchScript's has no get
        if not isinstance(site, AdapterSite) or root not in ancestors(path):
            continue
        below = path[len(root) :].lstrip(".")
        for name in {*names_in(kind)} & site.entries.keys():
            for entry, held in site.modules_of(name):
                if isinstance(held, InvertibleModule) and held.is_undone:
                    ways.setdefault(name, (*(below.split(".") if below else ()), SITE, entry.key))
    if ways and not _is_chain(kind):
        raise CompatibilityError(
            f"{kind!r} has invertible adapters of the embedding, {sorted(ways)}, side by side: a head with the vocabulary "
            "cannot undo them. Stack them"
        )
    yield from (ways[name] for name in reversed(list(names_in(kind))) if name in ways)


def _is_chain(composition: Composition | None) -> bool:
    """Whether a composition is adapters one after the other."""
    if not isinstance(composition, CompositionNode):
        return True
    return isinstance(composition, Stack) and all(map(_is_chain, composition.children))
