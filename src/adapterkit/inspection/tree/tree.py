"""The tree of a model as a value: `print` it, or let rich print it in colour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ..summary import AdapterRow, open_or_frozen
from .cells import Cell, number
from .layout import Line, lines
from .nodes import TreeNode

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

__all__ = ["Tree"]

_NOTE = 160  # characters of a note that are printed


@dataclass(frozen=True, repr=False)
class Tree:
    """What a model is made of. `print` it for plain text; rich prints it in colour, as wide as the screen.

    Attributes:
        root: The model, without what adapterkit added.
        adapters: Those in it, as in `kit.summary()`.
        note: Why roles are missing; None if they are not.
        unknown: Operations that are not understood: the module, the operation, and why.
    """

    root: TreeNode
    adapters: tuple[AdapterRow, ...] = ()
    note: str | None = None
    unknown: tuple[str, ...] = ()

    def text(self, width: int | None = None) -> str:
        """Return the tree as plain text.

        Args:
            width: Columns that a line may have; no limit if not given.
        """
        below = ["".join(cell.text for cell in line) for line in self._below()]
        return "\n".join(["".join(cell.text for cell in line) for line in lines(self.root, width)] + below)

    def as_dict(self) -> dict[str, Any]:
        """Return the tree as plain values, for JSON."""
        adapters = [asdict(line) for line in self.adapters]
        return {"tree": _plain(self.root), "adapters": adapters, "note": self.note, "unknown": list(self.unknown)}

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Tree({self.root.label}, {sum(1 for _ in self.root.walk())} nodes)"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text  # noqa: PLC0415  # of the extra `cli`; only rich itself calls this

        for line in lines(self.root, options.max_width):
            yield Text.assemble(*((cell.text, cell.style) for cell in line), no_wrap=True, overflow="ellipsis")
        for line in self._below():
            yield Text.assemble(*((cell.text, cell.style) for cell in line))

    def _below(self) -> Iterator[Line]:
        """Yield what is said once, below the tree: the base, each adapter, the note."""
        root = self.root
        state = open_or_frozen(root.trainable, root.parameters)
        yield (Cell(f"base: {number(root.parameters)} parameters, {state}", "dim"),)
        for row in self.adapters:
            mark, state = ("●", "active") if row.is_active else ("○", "not active")
            numbers = f"{number(row.parameters)} parameters ({row.percent:.2f} % of the base)"
            weights = "open" if row.is_training else "frozen"
            text = f": {row.method} at {row.sites} sites, {numbers}, {state}, {weights}"
            yield Cell(f"{mark} {row.name}", "bold green" if row.is_active else "green"), Cell(text)
        for one in self.unknown:
            yield (Cell(f"unknown: {one}", "yellow"),)
        if self.note:
            yield (Cell(shorten(self.note, _NOTE, placeholder=" …"), "yellow"),)


def _plain(node: TreeNode) -> dict[str, Any]:
    # `asdict` leaves out properties, `count` among them, and goes into children by itself: those are made anew here.
    return {**asdict(node), "count": node.count, "children": [_plain(child) for child in node.children]}
