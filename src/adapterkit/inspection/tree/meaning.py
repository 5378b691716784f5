"""What a model's parts are, in words, from its anatomy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...structure.anatomy.description import Anatomy, Sublayer

__all__ = ["Meaning", "meanings"]

_WORDS = {
    "attention": "attention",
    "crossattention": "cross-attention",
    "feedforward": "feed-forward",
    "mixer": "mixer",
    "convolution": "convolution",
}


@dataclass(frozen=True)
class Meaning:
    """What one module is: the roles that a config may call it by, and what else there is to say."""

    roles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def meanings(anatomy: Anatomy) -> dict[str, Meaning]:
    """Map the path of each module to what it is. Modules of which there is nothing to say are left out."""
    roles, notes = _by_path(_roles(anatomy)), _by_path(_notes(anatomy))
    return {path: Meaning(roles.get(path, ()), notes.get(path, ())) for path in {**roles, **notes}}


def _by_path(texts: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Map each path to its texts, each once, in order."""
    found: dict[str, dict[str, None]] = {}
    for path, what in texts:
        found.setdefault(path, {})[what] = None
    return {path: tuple(what) for path, what in found.items()}


def _roles(anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    """Yield each role with the path of its module, one by one, so that a branch without a module hides no other."""
    for place in anatomy.embeddings:
        yield place.path, "@embedding"
    for s in anatomy.sublayers:
        parts = {"out": (s.out.path,) if s.out else (), "q": s.query, "k": s.key, "v": s.value}
        for part, paths in {**parts, "first": s.first, "last": s.last}.items():
            yield from ((path, f"@{s.kind}.{part}") for path in paths)
    for place in anatomy.blocks:
        yield place.path, "@block.out"
    for place in anatomy.output_embeddings:
        yield place.path, "@output_embedding"


def _notes(anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    """Yield what else there is to say, with the path of its module: norms, mixtures of experts, parallel branches."""
    blocks: dict[str, list[Sublayer]] = {}
    for sublayer in anatomy.sublayers:
        blocks.setdefault(sublayer.block or "", []).append(sublayer)
    for path, sublayers in blocks.items():
        yield path, _block(sublayers)
    for s in (*anatomy.sublayers, *anatomy.others):
        # Where functions compute the end of a branch, no module returns it: its last projection is the nearest to point at.
        for branch in [s.out.path] if s.out else s.last[:1]:
            yield from ((branch, note) for note in _branch(s))
        if s.post_norm is not None:
            yield s.post_norm.path, "post-norm"


def _block(sublayers: list[Sublayer]) -> str:
    """Say what a block is: "pre-norm block", "post-norm parallel block"."""
    norms = "/".join(dict.fromkeys(s.norm for s in sublayers if s.norm != "none"))
    words = [f"{norms}-norm" if norms else "", "parallel" if any(s.is_parallel for s in sublayers) else "", "block"]
    return " ".join(filter(None, words))


def _branch(sublayer: Sublayer) -> Iterator[str]:
    """Yield what there is to say of a branch; its kind, too, where no role says it (outside of repeated blocks)."""
    if sublayer.block is None:
        yield _WORDS[sublayer.kind]
    if sublayer.is_moe:
        yield "MoE"
    if sublayer.is_parallel:
        yield "parallel"
    if sublayer.scales:
        yield "scaled"
