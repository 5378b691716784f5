"""The nodes of a tree: modules, and runs of identical ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Mark", "TreeNode"]


@dataclass(frozen=True)
class Mark:
    """An adapter at a module.

    Attributes:
        name: The adapter.
        at: Whether it adapts the module's output, its input or a Parameter, or owns a copy that runs in the module's place
            ("head").
        is_active: Whether it is the active adapter.
    """

    name: str
    at: str
    is_active: bool


@dataclass(frozen=True)
class TreeNode:
    """A module, or `count` modules of the same build side by side. All numbers and children are those of one of them.

    Attributes:
        label: Its name in the module around it: "attention", "encoder.layer.0-11".
        type: The name of its class.
        paths: Its path in the model; one for each of `count`.
        roles: What a config's `targets` may call it: "@attention.out".
        notes: What else it is: "pre-norm block", "MoE", "parallel".
        width: Features that it returns; None if neither a trace nor its type tells.
        input_width: Features that it takes.
        shapes: Of its own parameters: name, shape and dtype of each.
        parameters: Numbers in its parameters and those of all modules in it; tied ones count where they come first.
        size_bytes: What these take.
        trainable: How many of them train.
        tied_to: A module that came before and is this very one, or whose weight it uses.
        hidden: Lines for what is in it that are left out, below the depth asked for.
        adapters: Those at it; with those in the modules not shown.
    """

    label: str
    type: str
    paths: tuple[str, ...]
    roles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    width: int | None = None
    input_width: int | None = None
    shapes: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    parameters: int = 0
    size_bytes: int = 0
    trainable: int = 0
    tied_to: str | None = None
    hidden: int = 0
    adapters: tuple[Mark, ...] = ()
    children: tuple[TreeNode, ...] = ()

    @property
    def count(self) -> int:
        """How many modules it stands for."""
        return len(self.paths)

    @property
    def is_plain(self) -> bool:
        """Tell whether there is nothing to say about it but what its children say."""
        return not (self.roles or self.notes or self.shapes or self.adapters or self.tied_to)

    @property
    def is_shown(self) -> bool:
        """Tell whether it, or something in it, is worth a line: a dropout or an activation without a role is not."""
        return not self.is_plain or bool(self.children)

    def walk(self) -> Iterator[TreeNode]:
        """This node and all below it, in order."""
        yield self
        for child in self.children:
            yield from child.walk()
