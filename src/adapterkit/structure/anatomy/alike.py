"""Compare blocks that are built alike: what a role names in one of them, it names in all.

A block in which fewer sub-layers are found than in its like is no smaller block: something in it was not understood.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from ..paths import SITE
from ..tracing.flow import Flow
from .description import Sublayer, Unlike

__all__ = ["unlike"]

_OUTSIDE = "a module outside of it"
# What is compared: by the second word of a role, the modules of a sub-layer.
_WHAT: dict[str, Callable[[Sublayer], Sequence[str]]] = {
    "out": lambda s: (s.out.path if s.out else "",),
    "q": lambda s: s.query,
    "k": lambda s: s.key,
    "v": lambda s: s.value,
    "first": lambda s: s.first,
    "last": lambda s: s.last,
}


def unlike(
    flow: Flow, modules: dict[str, nn.Module], sublayers_in: Mapping[str, Sequence[Sublayer]], parts: Collection[str]
) -> Iterator[Unlike]:
    """Yield what differs between blocks of equal build: same classes and shapes, module by module.

    Args:
        sublayers_in: Map the path of each block → its sub-layers, as they run.
        parts: The paths of all blocks, and of the parts of those that no one module holds.
    """
    ran = {call.path for call in flow.calls}
    alike: dict[object, list[str]] = {}
    for block in (*sublayers_in, *_beside(sublayers_in, parts, modules, ran)):
        alike.setdefault(_build(modules[block]), []).append(block)
    for blocks in alike.values():
        kept = blocks
        for what in _WHAT:
            found = {block: _found(what, block, sublayers_in.get(block, ()), modules) for block in kept}
            if what == "out":  # what makes the stream of its block is added to nothing
                usual = _usual(found)
                missing = {block: [n for n in usual if n not in here] for block, here in found.items()}
                kept = [
                    block
                    for block in kept
                    if not missing[block]
                    or not all(_makes_stream(flow, block, n, sublayers_in.get(block, ())) for n in missing[block])
                ]
                found = {block: found[block] for block in kept}
            yield from _odd(what, found, ran)


def _beside(
    blocks: Collection[str], parts: Collection[str], modules: dict[str, nn.Module], ran: Collection[str | None]
) -> Iterator[str]:
    """Yield the modules beside blocks, and of their classes, that ran and in which nothing was found at all."""
    known = {id(modules[path]) for path in parts}
    for holder, kind in {(block.rpartition(".")[0], type(modules[block])) for block in blocks}:
        for name, child in modules[holder]._modules.items():
            path = f"{holder}.{name}".lstrip(".")
            if type(child) is kind and path in ran and id(child) not in known:
                yield path


def _odd(what: str, found: dict[str, tuple[str, ...]], ran: Collection[str | None]) -> Iterator[Unlike]:
    """Yield the blocks in which something else is found than in most of them."""
    if not found:
        return
    usual = _usual(found)
    like = next(block for block, here in found.items() if here == usual)
    for block, here in found.items():
        # A projection that does not run here, as keys that are those of another block, is missing for that reason.
        missing = [name for name in usual if name not in here and (what == "out" or _path(block, name) in ran)]
        if missing or any(name not in usual for name in here):
            yield Unlike(block, like, what, here, usual)


def _usual(found: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return what is found in most blocks; of what is found in as many, the most."""
    counts = Counter(found.values())
    return max(counts, key=lambda here: (counts[here], len(here)))


def _makes_stream(flow: Flow, block: str, name: str, sublayers: Sequence[Sublayer]) -> bool:
    """Tell whether what a block first adds to comes of its inputs through one module alone: that makes the stream."""
    made = sum({1 << i for call in flow.calls if call.path == _path(block, name) for _, i in call.outputs})
    taken = sum({1 << i for call in flow.calls if call.path == block for _, i in call.inputs})
    if not sublayers or not made or not taken:  # of a block that is a list, no call tells what it takes
        return False
    operands = flow.nodes[sublayers[0].addition[1]].inputs[:2]
    return any(not flow.nearest(i, taken, (1 << len(flow.nodes)) - 1, made) for i in operands)


def _found(what: str, block: str, sublayers: Sequence[Sublayer], modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """List what has a role in a block, as "kind: path", by paths from the block on, under which tied modules lie, too.

    What lies outside of the block has no such path: that it does is all that is compared.
    """
    held = {id(module): f".{path}" for path, module in modules[block].named_modules() if path}

    def name(path: str) -> str:
        if path == block or path.startswith(f"{block}."):
            return path[len(block) :]
        return held.get(id(modules.get(path)), _OUTSIDE if path else "")

    return tuple(f"{s.kind}: {name(path)}" for s in sublayers for path in _WHAT[what](s))


def _path(block: str, name: str) -> str:
    """Return the path of a module that `_found` lists."""
    return f"{block}{name.partition(': ')[2]}"


def _build(block: nn.Module) -> object:
    """Return what a block is made of: the classes of its modules and the shapes of their Parameters."""
    return tuple(
        (path, type(module), *((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None))
        for path, module in block.named_modules()
        if SITE not in path.split(".")
    )
