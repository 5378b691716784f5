"""The text of each node of a tree, column by column, with its style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...runtime.acting import acting_at
from .fold import without_place
from .nodes import Mark, TreeNode

__all__ = ["COLUMNS", "Cell", "Cells", "cells", "number", "size"]

COLUMNS = ("module", "type", "role", "width", "parameters", "size", "trains", "adapters")
# Styles are rich's; roles are told apart by colour as well as by name.
_ROLE_STYLES = (
    ("@attention", "cyan"), ("@crossattention", "magenta"), ("@feedforward", "yellow"), ("@mixer", "green"),
    ("@convolution", "green"), ("@embedding", "blue"),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A piece of text in one style."""

    text: str
    style: str = ""


Cells = dict[str, list[Cell]]


def cells(root: TreeNode) -> Iterator[Cells]:
    """Yield, for each node that gets a line, a map from each column to its text."""
    return (_cells(row) for row in _rows(root))


def number(count: int) -> str:
    """Write a count of numbers in short: 768, 590.6K, 109.5M."""
    return _scaled(count, 1000, ("", "K", "M", "B", "T"))


def size(count: int) -> str:
    """Write a count of bytes in short: 437.9 MB."""
    return _scaled(count, 1000, (" B", " KB", " MB", " GB", " TB"))


def _scaled(count: int, step: int, units: Sequence[str]) -> str:
    scaled, unit = float(count), 0
    # Rounded first, as it will be printed: 999,960 is "1.0M", and not "1000.0K".
    while round(scaled, 1) >= step and unit + 1 < len(units):
        scaled, unit = scaled / step, unit + 1
    return f"{scaled:.1f}{units[unit]}" if unit else f"{count}{units[0]}"


@dataclass(frozen=True)
class _Row:
    """A node on its line.

    Attributes:
        node: What the line is of.
        guide: What is drawn before its name.
        asides: Where to look for what is not said here.
    """

    node: TreeNode
    guide: str
    asides: tuple[str, ...]


def _rows(root: TreeNode) -> Iterator[_Row]:
    """Yield the nodes that get a line, in order. What is in one of a build that was shown before is not shown again."""
    shown: dict[TreeNode, str] = {}
    paths = [path for node in root.walk() for path in node.paths]

    def asides(node: TreeNode, like: str) -> Iterator[str]:
        if node.tied_to is not None:
            yield f"tied to {_short(node.tied_to, paths)}"
        if like != node.paths[0]:
            yield f"like {_short(like, paths)}"
        if node.hidden:
            yield f"… {node.hidden} more"

    def rows(node: TreeNode, above: str, guide: str, below: str) -> Iterator[_Row]:
        # The first node of each build is drawn in full, and `like` is its path. A single child is as short as a reference.
        like = shown.setdefault(without_place(node), node.paths[0]) if len(node.children) > 1 else node.paths[0]
        yield _Row(node, above + guide, tuple(asides(node, like)))
        for child in node.children if like == node.paths[0] else ():
            is_last = child is node.children[-1]
            yield from rows(child, above + below, *(("└─ ", "   ") if is_last else ("├─ ", "│  ")))

    yield from rows(root, "", "", "")


def _short(path: str, paths: Sequence[str]) -> str:
    """Return the end of a path that tells it from all others. It begins with a name: a number alone tells little."""
    parts = path.split(".")
    # Shortest first: "0.attention" begins with a number and is passed over, "layer.0.attention" is tried.
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)) if not parts[-n].isdecimal())
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in paths) == 1), path)


def _cells(row: _Row) -> Cells:
    """Map each column to its text in one line."""
    node, guide = row.node, row.guide
    times = f"{node.count} × " if node.count > 1 else ""  # noqa: RUF001  # the sign for times
    is_block = any("block" in note for note in node.notes)
    numbers = (number(node.parameters), size(node.size_bytes)) if node.parameters else ("", "")
    return {
        "module": [Cell(guide, "dim"), Cell(node.label, "bold" if is_block or not guide else "")],
        "type": [Cell(node.type if guide else "", "dim")],
        "role": list(_role(node, row.asides)),
        "width": [Cell(_width(node))],
        "parameters": [Cell(times and numbers[0] and times, "bold"), Cell(numbers[0])],
        "size": [Cell(times and numbers[1] and times, "dim"), Cell(numbers[1], "dim")],
        "trains": [_trains(node)],
        "adapters": list(_adapters(node.adapters)),
    }


def _role(node: TreeNode, asides: Sequence[str]) -> Iterator[Cell]:
    """Yield what a node is: its roles, notes, and where to look for what is in it."""
    parts = [Cell(role, next((s for start, s in _ROLE_STYLES if role.startswith(start)), "")) for role in _telling(node)]
    parts += [Cell(note, "bold" if note.endswith("block") else "") for note in node.notes if not _is_implied(note, node)]
    parts += [Cell(aside, "dim") for aside in asides]
    for i, part in enumerate(parts):
        yield Cell(", " if i else "")
        yield part


def _telling(node: TreeNode) -> Iterator[str]:
    """Yield the roles of a node, in short, without those that others imply."""
    parts: dict[str, list[str]] = {}
    for role in node.roles:
        kind, _, part = role.partition(".")
        parts.setdefault(kind, []).append(part)
    for kind, names in parts.items():
        # Queries, keys and values are made by first projections. Where a last projection itself returns the branch, "out"
        # says more than "last".
        implied = {"first"} if {"q", "k", "v"} & {*names} else set()
        implied |= {"last"} if "out" in names else set()
        kept = [name for name in names if name not in implied]
        if kind != "@block" or not any(note.endswith("block") for note in node.notes):
            # e.g. "@attention.q/k/v" of a fused projection. "@embedding" has nothing behind a dot, which is then stripped.
            yield f"{kind}.{'/'.join(kept)}".rstrip(".")


def _is_implied(note: str, node: TreeNode) -> bool:
    # A post-norm that ends its block returns what the block does.
    return note == "post-norm" and "@block.out" in node.roles


def _width(node: TreeNode) -> str:
    if node.width is None or node.input_width in (None, node.width):
        return "" if node.width is None else str(node.width)
    return f"{node.input_width} → {node.width}"


def _trains(node: TreeNode) -> Cell:
    if not node.parameters:
        return Cell("")
    if node.trainable in (0, node.parameters):
        return Cell("trains", "green") if node.trainable else Cell("frozen", "blue")
    return Cell(f"{100 * node.trainable / node.parameters:.3g} %", "green")


def _adapters(marks: Sequence[Mark]) -> Iterator[Cell]:
    for i, mark in enumerate(marks):
        label = "(head)" if mark.at == "head" else acting_at(mark.at).label
        where = f" {label}" if label else ""
        yield Cell(", " if i else "")
        yield Cell(f"{'●' if mark.is_active else '○'} {mark.name}{where}", "bold green" if mark.is_active else "green")
