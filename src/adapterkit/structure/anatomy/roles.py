"""Roles: names that mean the same in every transformer, such as `@attention.out`, and the modules that have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from ...errors import TargetError
from ..paths import ancestors
from .description import Anatomy, ModuleOutput, Product, Sublayer

__all__ = ["LINEAR", "ROLES", "check_whole", "role_paths", "role_places", "role_products"]

_KINDS = ("attention", "crossattention", "feedforward", "convolution", "mixer")
# The second word of a role: maps it to the modules of a sub-layer that it names.
_MODULES: dict[str, Callable[[Sublayer], Iterable[str]]] = {
    "out": lambda s: (s.out.path,) if s.out else (),
    "first": lambda s: s.first,
    "last": lambda s: s.last,
    "q": lambda s: s.query,
    "k": lambda s: s.key,
    "v": lambda s: s.value,
}

# Every linear layer of the blocks, whatever it is for.
LINEAR = "@linear"
_OUTPUTS = ("@sublayer.out", *(f"@{kind}.out" for kind in _KINDS))
ROLES = (
    *(f"@{kind}.{word}" for kind in _KINDS for word in _MODULES if word not in "qkv" or kind.endswith("attention")),
    "@sublayer.out",
    "@block.last",
    "@block.out",
    LINEAR,
    "@embedding",
    "@output_embedding",
)
# What is said of something in a block that is not understood.
_AFTER_ALL = (
    "{path!r} comes after all that tracing understands of the block {block!r}, and what it computes is not added to the "
    "stream in a way that it knows, so that the block's last sub-layer is not known"
)
_MIXED_IN = (
    "the attention that {path!r} computes in the block {block!r} is not added to the stream, but mixed with it in a way "
    "that tracing does not know (by a gated unit, say)"
)
_ADDED_TO_NOTHING = "the attention that {path!r} computes in the block {block!r} is added to nothing"
# Roles of the whole model, not of its sub-layers.
_OF_MODEL: dict[str, Callable[[Anatomy], tuple[ModuleOutput, ...]]] = {
    "@block.out": lambda anatomy: anatomy.blocks,
    "@embedding": lambda anatomy: anatomy.embeddings,
    "@output_embedding": lambda anatomy: anatomy.output_embeddings,
}


def role_paths(role: str, anatomy: Anatomy, *, at_sum: bool = False) -> list[str]:
    """List the modules that have a role in this model, in the order in which they run; empty if none has.

    Args:
        at_sum: Whether the sum behind a branch is meant: then one that no module returns is named by a last projection.

    Raises:
        TargetError: there is no such role, or no hook can be where it lies.
    """
    if role in _OF_MODEL:
        return list(dict.fromkeys(output.path for output in _OF_MODEL[role](anatomy)))
    sublayers, word = _sublayers(role, anatomy), role.partition(".")[2]
    if role == LINEAR:
        return list(dict.fromkeys(product.path for product in role_products(role, anatomy)))
    if role in (*_OUTPUTS, "@block.last"):
        # "@block.last" is the output of the last sub-layer, where "@attention.last" is a projection.
        _check_found(role, [s for s in sublayers if not (at_sum and s.last)])
        return list(dict.fromkeys(s.out.path if s.out else s.last[0] for s in sublayers))
    return list(dict.fromkeys(path for sublayer in sublayers for path in _MODULES[word](sublayer)))


def role_places(role: str, anatomy: Anatomy) -> tuple[ModuleOutput, ...]:
    """Return where in the modules' outputs the tensors of a role lie; empty for a role that is a projection."""
    if role in _OF_MODEL:
        return _OF_MODEL[role](anatomy)
    if role in (*_OUTPUTS, "@block.last"):
        return tuple(s.out for s in _sublayers(role, anatomy) if s.out is not None)
    return ()


def role_products(role: str, anatomy: Anatomy) -> list[Product]:
    """List what the blocks multiply by that a role speaks of; empty for a role that is no projection's.

    Raises:
        TargetError: there is no such role.
    """
    if role == LINEAR:
        return list(anatomy.products)
    part = role.partition(".")[2]
    if part not in ("first", "last") or role == "@block.last":
        return []
    paths = role_paths(role, anatomy)
    return [product for product in anatomy.products if product.path in paths and part in product.parts]


def _sublayers(role: str, anatomy: Anatomy) -> list[Sublayer]:
    """List the sub-layers that a role speaks of.

    Raises:
        TargetError: there is no such role; or it speaks of transformer blocks, and the model has none.
    """
    if role not in ROLES:
        raise TargetError(f"{role!r} is not a role; there are {', '.join(ROLES)}")
    kind = role[1:].partition(".")[0]
    if kind in _KINDS:
        return [s for s in anatomy.sublayers if s.kind == kind]
    # "@sublayer" and "@block" speak of transformer blocks; a CNN has residual branches, too, and they are not meant.
    blocks = anatomy.transformer_blocks
    if not anatomy.sublayers:
        others = [s.out.path if s.out else s.addition[0] for s in anatomy.others]
        raise TargetError(
            f"{role!r} speaks of transformer blocks; tracing finds no block that adds what it computes to a stream, so "
            f"that presets have no place here. Name modules by pattern{f', such as {others[:3]}' if others else ''}"
        )
    if not blocks:
        raise TargetError(
            f"{role!r} speaks of transformer blocks; tracing finds {len(anatomy.sublayers)} residual branches, which are "
            "convolutions all: this is a CNN. Target '@convolution.out', or name its modules by pattern"
        )
    inside = [s for s in anatomy.sublayers if s.block in blocks]
    if kind == "sublayer":  # one more branch of a decoder is not what the presets adapt: ask for it by its own role
        return [s for s in inside if s.kind != "crossattention"]
    return [s for s in inside if s.is_last]  # one for each block and stream


def check_whole(role: str, anatomy: Anatomy, excluded: Set[str]) -> None:
    """Raise TargetError where a role that speaks of every block would leave out something in silence.

    Args:
        excluded: The modules that the config leaves out.
    """
    _check_alike(role, anatomy, excluded)
    _check_explained(role, anatomy, excluded)
    if role == LINEAR:
        _check_idle(role, [path for path in anatomy.unread if excluded.isdisjoint(ancestors(path))])
    if role in ("@sublayer.out", "@block.last", LINEAR):
        _check_idle(role, sorted({*anatomy.idle} - excluded))


def _check_explained(role: str, anatomy: Anatomy, excluded: Set[str]) -> None:
    """Raise TargetError where a block computes something that is not understood, so that the role would leave it out."""
    speaks_of_attention = role.partition(".")[0] in ("@attention", "@crossattention")
    is_preset = role in ("@sublayer.out", "@block.last")
    found = [(block, path, _AFTER_ALL) for block, path in anatomy.unexplained if is_preset]
    for block, path, is_mixed in anatomy.stray:
        # A preset leaves out what makes the stream; and the last sub-layer of a block is known, whatever was before.
        if speaks_of_attention or (is_mixed and role == "@sublayer.out"):
            found.append((block, path, _MIXED_IN if is_mixed else _ADDED_TO_NOTHING))
    for block, path, reason in found:
        if block in anatomy.transformer_blocks and not {block, path} & excluded:
            raise TargetError(
                f"{role!r}: {reason.format(path=path, block=block)}. Name modules by pattern, or set exclude=[{path!r}] to "
                "go without it"
            )


def _check_idle(role: str, idle: list[str]) -> None:
    """Raise TargetError if there are modules that the role speaks of, and that did not run."""
    if idle:
        what = "are linear layers of the blocks" if role == LINEAR else "are built as the blocks beside them"
        raise TargetError(
            f"{role!r}: {idle} {what}, but did not run on the example inputs. Wrap the model with inputs on which they "
            f"run, or set exclude={idle}"
        )


def _check_alike(role: str, anatomy: Anatomy, excluded: Set[str]) -> None:
    """Raise TargetError where a role names something in one block that it does not in another of the same build."""
    kind, _, word = role[1:].partition(".")
    is_any = role in ("@sublayer.out", "@block.last")
    for odd in anatomy.unlike:
        if odd.block in excluded or odd.what != ("out" if is_any else word):
            continue
        here, there = (
            [name for name in names if is_any or name.startswith(f"{kind}: ")] for names in (odd.here, odd.there)
        )
        if here != there:
            raise TargetError(
                f"{role!r}: the blocks {odd.block!r} and {odd.like!r} are built alike, but tracing finds {here} in the "
                f"first and {there} in the second, so that something in one of them is not understood. Name modules by "
                f"pattern, or set exclude=[{odd.block!r}] to go on with what was found"
            )


def _check_found(role: str, sublayers: list[Sublayer]) -> None:
    """Raise TargetError if a sub-layer's output is no module's, so that the role would leave it out in silence."""
    lost = [sublayer for sublayer in sublayers if sublayer.out is None]
    if lost:
        raise TargetError(
            f"{role!r}: no module returns what is added in {lost[0].addition[0]!r} (its {lost[0].kind} is computed by "
            f"functions, or by a module that several branches share), so that no hook can adapt it; name a module "
            f"inside it, such as {list(lost[0].last) or 'its last projection'}"
        )
