"""Name the blocks of a model, and find the stacks that they make up.

`turns_of` says which branches make up a block; here each gets a path: that of the module, or list, which holds the block
and nothing of others. Where none does, as attentions and feed-forwards may lie in lists of their own, each of its branches
has a path of its own.
"""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from ..tracing.flow import Flow, bits
from .branches import Branch, Turn
from .turns import Place, common, home_of, is_item, trail_of, turns_of

__all__ = ["Stacks", "find_blocks", "stacks_of", "template_of", "within"]

Stacks = tuple[tuple[tuple[str, ...], ...], ...]
"""Of each stack, of each of its blocks in the order in which they run: the paths of what holds it."""


def find_blocks(flow: Flow, modules: dict[str, nn.Module], branches: list[Branch]) -> list[Turn]:
    """Set each branch's block and turn; return the turns that are blocks."""
    turns = [turn for turn in turns_of(flow, modules, branches) if turn.is_block]
    homes = {id(branch): home_of(flow, branch) for turn in turns for branch in turn.branches}
    inside = Counter(place for home in homes.values() for place in home)
    for turn in turns:
        path = _path_of(turn.branches, homes, inside, modules, is_only=len(turns) == 1)
        for branch in turn.branches:
            own = path if path is not None else _path_of([branch], homes, inside, modules, is_only=False)
            branch.turn = turn
            branch.block = own if own is not None else _last_module(flow, branch)
    return turns


def template_of(path: str) -> str:
    """Return the path with `*` for its numbers: "layers.*.mlp"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def within(path: str, block: str | None) -> bool:
    """Tell whether a module is a block, or in it; every module is in the whole model, the block '' or None."""
    return not block or path == block or path.startswith(f"{block}.")


def stacks_of(flow: Flow, modules: dict[str, nn.Module], turns: list[Turn]) -> Stacks:
    """Return the stacks that blocks make up: those of an encoder and of its decoder are two, those of stages are one.

    A block goes on a stack if it computes from what the stack's last block returned, and lies beside it: in the same list,
    or in modules of the same class (`stage1`, `stage2`).
    """
    stacks: list[list[Turn]] = []
    for turn in turns:
        before = (stack for stack in reversed(stacks) if _goes_on(flow, modules, stack[-1], turn))
        found = next(before, None)  # None: it is the first of its stack
        if found is None:
            stacks.append([turn])
        else:
            found.append(turn)
    # A module that runs several times is one block.
    paths = [[tuple(dict.fromkeys(b.block or "" for b in turn.branches)) for turn in stack] for stack in stacks]
    return tuple(tuple(dict.fromkeys(stack)) for stack in paths)


def _goes_on(flow: Flow, modules: dict[str, nn.Module], before: Turn, turn: Turn) -> bool:
    """Tell whether a block computes from what another returned, and lies beside it."""
    end, start = before.branches[-1].addition.node.index, turn.branches[0].addition.stream
    if end != start and not flow.leads_to(end, start):
        return False
    one, other = before.branches[0].block or "", turn.branches[0].block or ""
    names, others = one.split("."), other.split(".")
    same = next((n for n, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1]), None)
    if same is None:  # one module, which runs again; or one in the other
        return one == other
    # What holds them, beside one another: an item each of one list, or attributes.
    left, right = ".".join(names[: same + 1]), ".".join(others[: same + 1])
    if is_item(left, modules) and is_item(right, modules):
        return True
    kinds = {type(modules[path]) for path in (left, right)}
    is_block = {left, right} & {one, other}
    return len(kinds) == 1 or (bool(is_block) and type(modules[one]) is type(modules[other]))


def _path_of(
    branches: list[Branch],
    homes: dict[int, tuple[Place, ...]],
    inside: Counter[Place],
    modules: dict[str, nn.Module],
    *,
    is_only: bool,
) -> str | None:
    """Return the path of what holds these branches and no others; None if nothing does.

    Args:
        homes: Of each branch, by `id`, the places around it.
        inside: Counts the branches in each place.
        is_only: Whether there is one block alone, which everything around it holds.

    Of several places it is one in which the branches are added, too, if there are any: of these the innermost item of a
    list or, as blocks need not lie in lists, the outermost place.
    """
    shared = common([homes[id(branch)] for branch in branches])
    own = [place for place in shared if inside[place] == len(branches)]
    adding = {place for branch in branches[:1] for place in trail_of(branch.addition.node.call)}
    for branch in branches[1:]:
        adding &= {*trail_of(branch.addition.node.call)}
    around = [place for place in own if place in adding]
    places = around or own
    items = [place for place in places if is_item(place[1], modules)]
    if items:
        return items[-1 if around else 0][1]
    return places[-1 if is_only else 0][1] if places else None


def _last_module(flow: Flow, branch: Branch) -> str:
    """Return the path of the module in which a branch ends."""
    last = max(bits(branch.inside & flow.endings))
    return trail_of(flow.nodes[last].call)[-1][1]
