"""Find the block of its stack that each branch lies in.

A block is told by the numbers in paths, as repeated blocks have them: `encoder.layer.3.attention` lies in
`encoder.layer.3`. Models number other things, too, so a number may stand for a sub-layer or for an item of a list; and some
have no numbers at all.
"""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from ..hosts import is_called
from ..paths import ancestors
from ..tracing.flow import Flow, bits
from .additions import up_to_number
from .branches import Branch
from .description import Kind

__all__ = ["find_blocks", "template_of", "within"]


def find_blocks(flow: Flow, modules: dict[str, nn.Module], branches: list[Branch]) -> None:
    """Set each branch's block: the path of its addition up to its last number.

    - In a list of unlike items, such as [norm, attention, addition], the list is the block (x-transformers).
    - Where numbers beside one another stand for one sub-layer each, of different kinds (T5's `layer.0`, `layer.1`), the
      last number but one is the block's.
    - Where what holds the blocks adds, the branch's path says which block it is.
    - Without a number, a block is a module of a class that has others with additions.
    - In a model without any of these, the block is what holds all additions.
    """
    numbered = {id(branch): _numbered(flow, modules, branch) for branch in branches}
    beside: dict[str, dict[str, list[Kind]]] = {}
    for branch in branches:
        path = numbered[id(branch)]
        beside.setdefault(path.rpartition(".")[0], {}).setdefault(path, []).append(branch.kind)
    for branch in branches:
        block = numbered[id(branch)]
        # T5: beside "block.0.layer.0" (attention) lies "block.0.layer.1" (feed-forward), each with one kind of branch.
        kinds = list(beside[block.rpartition(".")[0]].values())
        around = up_to_number(block.rpartition(".")[0])
        if around and all(len(found) == 1 for found in kinds) and len({found[0] for found in kinds}) > 1:
            block = around
        branch.block = None if not block or _spans_several(flow, branch, block) else block
    _find_unnumbered(modules, branches)


def template_of(path: str) -> str:
    """Return the path with `*` for its numbers: "layers.*.mlp"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def within(path: str, block: str | None) -> bool:
    """Tell whether a module is a block, or in it; every module is in the whole model, the block '' or None."""
    return not block or path == block or path.startswith(f"{block}.")


def _find_unnumbered(modules: dict[str, nn.Module], branches: list[Branch]) -> None:
    """Set the blocks of branches that no number told of: by classes that have several modules with additions."""
    paths = {id(branch): _adding_path(branch) for branch in branches}
    around = {path for adding in paths.values() for path in ancestors(adding)}
    classes = Counter(type(modules[path]) for path in around if is_called(modules[path]))
    unnumbered = [branch for branch in branches if branch.block is None]
    has_blocks = len(unnumbered) < len(branches)
    common = _common_ancestor(list(paths.values()))
    for branch in unnumbered:
        alike = [p for p in reversed(ancestors(paths[id(branch)])) if classes[type(modules[p])] > 1]
        # The outermost of them. If none is alike, the branch lies beside the numbered blocks, in a stem or a head; where
        # there are none, the whole model is one block.
        branch.block = next(iter(alike), None if has_blocks else common)


def _common_ancestor(paths: list[str]) -> str:
    """Return the innermost module around all; '' if there are no paths."""
    return next(path for path in ancestors(paths[0]) if all(within(other, path) for other in paths)) if paths else ""


def _numbered(flow: Flow, modules: dict[str, nn.Module], branch: Branch) -> str:
    """Return the path of a branch up to its last number, or that of the list in which that number counts unlike items."""
    block = up_to_number(_path(branch))
    items = {block, *_beside(flow, branch, block)} if block else set()
    are_unlike = len({type(modules[path]) for path in items}) == len(items) > 1
    return (are_unlike and up_to_number(block.rpartition(".")[0])) or block


def _spans_several(flow: Flow, branch: Branch, block: str) -> bool:
    """Tell whether a branch runs through more than one repetition of what would be its block."""
    return len(_beside(flow, branch, block)) > 1


def _beside(flow: Flow, branch: Branch, block: str) -> set[str]:
    """Return the modules that a branch computes in whose path is this one but for its numbers."""
    template, depth = template_of(block), len(block.split("."))
    calls = [flow.nodes[i].call for i in bits(branch.inside & flow.endings)]
    through = {".".join((call.path or "").split(".")[:depth]) for call in calls if call is not None}
    return {path for path in through if template_of(path) == template}


def _adding_path(branch: Branch) -> str:
    """Return the path of the module that adds a branch."""
    call = branch.addition.node.call
    return (call.path if call else None) or ""


def _path(branch: Branch) -> str:
    """Return the path that tells a branch's block: of what adds it or, where that has no number, of what yields it."""
    path = _adding_path(branch)
    if branch.call is None or any(part.isdigit() for part in path.split(".")):
        return path
    return branch.call[0].path or ""
