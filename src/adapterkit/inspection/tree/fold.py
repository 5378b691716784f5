"""Make a tree small: fold siblings of the same build, merge chains, cut below a depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from .nodes import Mark, TreeNode

__all__ = ["cut", "folded", "numbers_as_text", "without_place"]

_NUMBERED = re.compile(r"(.*?)(\d+)")  # "layer.11" is ("layer.", "11"): the first group is lazy
_RANGES = 3  # that a label spells out


def folded(siblings: Iterable[TreeNode]) -> tuple[TreeNode, ...]:
    """Return siblings with one node in place of all that are of the same build and differ in the number at their end.

    The same build: equal in all but name and place, down to the leaves.
    """
    groups: dict[object, list[TreeNode]] = {}
    for node in siblings:
        match = _NUMBERED.fullmatch(node.label)
        # A name without a number is never folded: paths are unique, so its group is itself.
        key = (match[1], without_place(node)) if match else node.paths
        groups.setdefault(key, []).append(node)
    return tuple(_merged(_together(nodes)) for nodes in groups.values())


def cut(node: TreeNode, depth: int | None) -> TreeNode:
    """Return the tree without what lies more than `depth` levels below its root; adapters there move to what is left."""
    if depth is None:
        return node
    if depth > 0 or not node.children:
        return replace(node, children=tuple(cut(child, depth - 1) for child in node.children))
    return replace(node, children=(), hidden=sum(_lines(child) for child in node.children), adapters=_marks(node))


def numbers_as_text(numbers: Sequence[int]) -> str:
    """Write rising numbers in short: "0-11", "0, 2, …, 10", "0-2, 4-6, 8-10, …"."""
    steps = {after - before for before, after in pairwise(numbers)}
    # Evenly spaced, such as every second block. A step of 1 is a range, which is written below.
    if len(steps) == 1 and steps != {1} and len(numbers) > 3:
        return f"{numbers[0]}, {numbers[1]}, …, {numbers[-1]}"
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    texts = ["-".join(map(str, ends)) for ends in ranges]
    # One more than `_RANGES` is written out: with the last range at the end, "…" would stand for nothing.
    return ", ".join(texts if len(texts) <= _RANGES + 1 else [*texts[:_RANGES], f"…, {texts[-1]}"])


def _together(nodes: list[TreeNode]) -> TreeNode:
    """Return one node for several of the same build."""
    if len(nodes) == 1:
        return nodes[0]
    first = nodes[0]
    matches = [match for node in nodes if (match := _NUMBERED.fullmatch(node.label))]
    label = matches[0][1] + numbers_as_text(sorted(int(match[2]) for match in matches))
    return replace(first, label=label, paths=tuple(path for node in nodes for path in node.paths))


def _merged(node: TreeNode) -> TreeNode:
    """Return a node about which there is nothing to say and its only child as one; any other node as it is."""
    # The chained comparison: one line cannot say that 12 modules hold 4 others each.
    if not node.is_plain or len(node.children) != 1 or node.count > 1 < node.children[0].count:
        return node
    child = node.children[0]
    paths = child.paths if node.count == 1 else node.paths
    return replace(child, label=f"{node.label}.{child.label}", paths=paths)


def without_place(node: TreeNode, around: str | None = None) -> TreeNode:
    """Return the node without its name and path: nodes of the same build are equal then."""
    root = node.paths[0] if around is None else around
    return replace(
        node,
        label="" if around is None else node.label,
        # Empty, but as many: a run of 3 blocks is not of the same build as a run of 4.
        paths=("",) * node.count,
        # From the root on: a tie within each block is the same in all of them.
        tied_to=node.tied_to.removeprefix(f"{root}.") if node.tied_to else None,
        children=tuple(without_place(child, root) for child in node.children),
    )


def _lines(node: TreeNode) -> int:
    """Return how many modules a node stands for, with all that are in it."""
    return node.count * (1 + sum(_lines(child) for child in node.children))


def _marks(node: TreeNode) -> tuple[Mark, ...]:
    """Return the adapters at a node and below it, each once."""
    return tuple(dict.fromkeys(mark for below in node.walk() for mark in below.adapters))
