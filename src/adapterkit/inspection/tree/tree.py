"""The tree of a model as a value: `print` it, or let rich print it in colour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from .cells import Cell, number
from .layout import Line, lines
from .nodes import TreeNode

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

__all__ = ["AdapterLine", "Tree"]

_NOTE = 160  # characters of a note that are printed


@dataclass(frozen=True)
class AdapterLine:
    """One adapter: its name and method, how many sites and parameters it has, the latter also in percent of the base."""

    name: str
    method: str
    sites: int
    parameters: int
    percent: float
    is_active: bool
    is_training: bool


@dataclass(frozen=True, repr=False)
class Tree:
    """What a model is made of. `print` it for plain text; rich prints it in colour, as wide as the screen.

    Attributes:
        root: The model, without what adapterkit added.
        adapters: Those in it.
        note: Why roles are missing; None if they are not.
    """

    root: TreeNode
    adapters: tuple[AdapterLine, ...] = ()
    note: str | None = None

    def text(self, width: int | None = None) -> str:
        """The tree as plain text, in at most so many columns."""
        below = ["".join(cell.text for cell in line) for line in self._below()]
        return "\n".join(["".join(cell.text for cell in line) for line in lines(self.root, width)] + below)

    def as_dict(self) -> dict[str, Any]:
        """The tree as plain values, for JSON."""
        return {"tree": _plain(self.root), "adapters": [asdict(line) for line in self.adapters], "note": self.note}

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
        """What is said once, below the tree."""
        root = self.root
        share = 100 * root.trainable / max(1, root.parameters)
        state = {0: "frozen", root.parameters: "all train"}.get(root.trainable, f"{share:.3g} % train")
        yield (Cell(f"base: {number(root.parameters)} parameters, {state}", "dim"),)
        for line in self.adapters:
            mark, state = ("●", "active") if line.is_active else ("○", "not active")
            numbers = f"{number(line.parameters)} parameters ({line.percent:.2f} % of the base)"
            said = (
                f": {line.method} at {line.sites} sites, {numbers}, {state}, {'trains' if line.is_training else 'frozen'}"
            )
            yield Cell(f"{mark} {line.name}", "bold green" if line.is_active else "green"), Cell(said)
        if self.note:
            yield (Cell(shorten(self.note, _NOTE, placeholder=" …"), "yellow"),)


def _plain(node: TreeNode) -> dict[str, Any]:
    return {**asdict(node), "count": node.count, "children": [_plain(child) for child in node.children]}
