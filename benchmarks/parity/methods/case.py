"""What is compared, and how tensors are called while it is: by our names and in our shapes, whoever holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = ["ASPECTS", "NAME", "SHARED", "Case", "Key", "Leaf", "Peer", "Place", "by_pattern", "same"]

NAME = "parity"
# What is compared of a case. "restored" are the outputs after merging and unmerging, against those before.
ASPECTS = ("outputs", "gradients", "merged", "restored")


class Place(NamedTuple):
    """Where an adapter sits.

    Attributes:
        path: Of the host's module, or of its parameter; of a block, for a bottleneck; "" for what sites share.
        part: Of a fused projection: "q", "k" or "v"; of a block: the sub-layer; "" for the whole.
        at: "output" or "input" of the module, for what scales activations.
    """

    path: str
    part: str = ""
    at: str = "output"


SHARED = Place("")


class Key(NamedTuple):
    """One tensor of an adapter."""

    place: Place
    name: str


def same(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


@dataclass(frozen=True)
class Leaf:
    """A tensor of a peer's adapter.

    Attributes:
        parameter: Theirs.
        view: From their layout to ours: linear, so that it holds for gradients, too.
        offset: What of it is not the adapter's: the base value, where they train a copy and we a difference.
        is_trained: Whether a gradient is to be compared.
        within: What of theirs may be other than zero: a mask, where their shape holds more than the method has.
    """

    parameter: Tensor
    view: Callable[[Tensor], Tensor] = same
    offset: Tensor | None = None
    is_trained: bool = True
    within: Tensor | None = None

    def value(self) -> Tensor:
        """In our layout, a copy."""
        value = self.view(self.parameter.detach())
        return (value if self.offset is None else value - self.offset.detach()).clone()


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        peer: "adapters" or "peft".
        method: The row of the table.
        host: Which model, by its name in `hosts.py`.
        setting: What is set, in words.
        config: The same in our words: `rank`, `alpha`, `use_rslora`, `use_dora`, `bias`, `reduction_factor`, ...
        there: What else the peer's config takes: its targets.
        here: What else ours takes: our targets, where they are not just the paths that the peer adapted.
    """

    peer: str
    method: str
    host: str
    setting: str
    config: Mapping[str, Any] = field(default_factory=dict)
    there: Mapping[str, Any] = field(default_factory=dict)
    here: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.peer} {self.method} on {self.host}: {self.setting}"


class Peer(Protocol):
    """A copy of a model, adapted by another library with random weights."""

    model: nn.Module
    leaves: Mapping[Key, Leaf]

    def merge(self) -> None:
        """Put the adapter into the model's weights."""

    def unmerge(self) -> None:
        """Take it out again."""

    def combine(self, others: Mapping[str, float], how: str) -> None:
        """Activate a combination of the adapters "parity" and "other", made anew."""


def by_pattern(value: Any, path: str) -> Any:
    """A setting for this path: the value, or of a map the last entry whose key ends the path, else its "default"."""
    if not isinstance(value, Mapping):
        return value
    found = [entry for key, entry in value.items() if f".{path}".endswith(f".{key}")]
    return found[-1] if found else value["default"]
