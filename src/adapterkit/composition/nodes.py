"""Compositions: how several adapters act together, as values.

    Stack("de", "ner")                         one after the other
    Average("a", "b", weights=(0.7, 0.3))      the weighted mean of what they add
    Split("a", "b", sizes=(3, 5))              each its part of the sequence
    BatchSplit("a", "b", sizes=(2, 4))         each its part of the batch
    Rows(("a", "b", "a", None))                each row its adapter; None is the base
    Drop("a", layers=range(5))                 not in these layers, AdapterDrop
    Parallel("a", "b")                         the whole batch through each, side by side
    Fuse("a", "b")                             weighed by a trained attention, AdapterFusion

They are frozen, hashable, equal if they say the same, `eval(repr(c)) == c`, and have a JSON form. They nest where that has
a meaning, to any depth, and say why not where it has none. Names may repeat.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..errors import ConfigError
from .names import check_name

__all__ = [
    "Average",
    "BatchSplit",
    "Composition",
    "CompositionNode",
    "Drop",
    "Fuse",
    "Parallel",
    "Rows",
    "Split",
    "Stack",
    "drops_in",
    "expanded",
    "from_json",
    "fusions_in",
    "multiplies_rows",
    "names_always",
    "names_in",
    "parallel_in",
    "to_json",
]


@dataclass(frozen=True, init=False, repr=False)
class CompositionNode:
    """Base of all compositions.

    Attributes:
        children: What is composed: adapter names and other compositions.
    """

    children: tuple[Composition, ...]

    holds: ClassVar[frozenset[str]] = frozenset()  # the compositions that it may hold
    least: ClassVar[int] = 1  # children
    most: ClassVar[float] = math.inf  # one, or any number
    what_for: ClassVar[str] = ""  # why it holds no others
    example: ClassVar[str] = ""

    def _set(self, children: Sequence[Any], **settings: Any) -> None:
        """Set all fields, checked."""
        if len(children) < self.least:
            raise ConfigError(f"{type(self).__name__} takes at least {self.least} children; found {list(children)}")
        if len(children) > self.most:
            raise ConfigError(f"{type(self).__name__} takes one child, as in {self.example}; found {list(children)}")
        object.__setattr__(self, "children", tuple(self._checked(child) for child in children))
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        if sum(map(multiplies_rows, self.children)) > 1:
            raise ConfigError(f"{self!r}: {Parallel.what_for}")

    def _checked(self, child: Any) -> Composition:
        """The child, if it may be one."""
        if not isinstance(child, CompositionNode):
            return check_name(child)
        if any(type(block).__name__ not in self.holds for block in _blocks_in(child)):
            allowed = ", ".join(["adapter names", *sorted(self.holds)])
            raise ConfigError(f"{type(self).__name__} cannot hold {child!r}: {self.what_for}. It holds {allowed}")
        return child

    def with_children(self, children: Sequence[Any]) -> Composition | None:
        """The same with other children, of which None is the base."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "children"}
        composition: Composition = object.__new__(type(self))
        object.__setattr__(composition, "children", tuple(children))
        for name, value in settings.items():
            object.__setattr__(composition, name, value)
        return composition

    def __repr__(self) -> str:
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "children"}
        given = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
        return f"{type(self).__name__}({', '.join([*map(repr, self.children), *given])})"


Composition = str | CompositionNode

_ONE_ROW = frozenset({"Stack", "Average", "Split", "Drop", "Fuse"})  # what gives each row the same adapters
_SAME_BATCH = _ONE_ROW | {"BatchSplit", "Rows"}


@dataclass(frozen=True, init=False, repr=False)
class Stack(CompositionNode):
    """One after the other, in this order; the changes of weights add up.

    Reference: Pfeiffer et al. 2020, arXiv:2005.00052 (MAD-X).
    """

    holds = _SAME_BATCH | {"Parallel"}

    def __init__(self, *children: Composition) -> None:
        self._set(children)


@dataclass(frozen=True, init=False, repr=False)
class Average(CompositionNode):
    """The weighted mean of what the children add at each place.

    Args:
        weights: One for each child; they are divided by their sum. Equal if not given.

    Reference: Wang et al. 2021, arXiv:2109.04877 (ensembles of language adapters).
    """

    weights: tuple[float, ...] | None

    holds = _SAME_BATCH
    what_for = "Parallel multiplies the batch, and a mean needs the same rows of each child"

    def __init__(self, *children: Composition, weights: Sequence[float] | None = None) -> None:
        if weights is not None:
            weights = tuple(float(weight) for weight in _numbers(weights, "weights", len(children)))
            if not all(map(math.isfinite, weights)) or sum(weights) == 0:
                raise ConfigError(f"weights must be finite, and their sum not zero; found {list(weights)}")
        self._set(children, weights=weights)


@dataclass(frozen=True, init=False, repr=False)
class Split(CompositionNode):
    """Each child on its part of the sequence.

    Args:
        sizes: Tokens of each part, in order; they sum to the length of the sequence. Equal parts if not given.
    """

    sizes: tuple[int, ...] | None

    holds = _SAME_BATCH
    what_for = "Parallel multiplies the batch; put it around the Split"

    def __init__(self, *children: Composition, sizes: Sequence[int] | None = None) -> None:
        self._set(children, sizes=_sizes(sizes, len(children)))


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(CompositionNode):
    """Each child on its part of the batch.

    Args:
        sizes: Rows of each part, in order; they sum to the batch. Equal parts if not given.
    """

    sizes: tuple[int, ...] | None

    holds = _SAME_BATCH
    what_for = "Parallel multiplies the batch; put it around the BatchSplit"

    def __init__(self, *children: Composition, sizes: Sequence[int] | None = None) -> None:
        self._set(children, sizes=_sizes(sizes, len(children)))


@dataclass(frozen=True, init=False, repr=False)
class Rows(CompositionNode):
    """Each row of the batch its own adapter, in one pass.

    Args:
        rows: For each row an adapter's name or a composition; None is the base alone.
    """

    children: tuple[Composition | None, ...]  # type: ignore[assignment]  # None is the base

    holds = _ONE_ROW
    what_for = "a row is one row, which nothing can divide or multiply"

    def __init__(self, rows: Sequence[Composition | None]) -> None:
        if isinstance(rows, (str, CompositionNode)) or not isinstance(rows, Sequence):
            raise ConfigError(f"Rows takes one sequence with a name (or None) for each row; found {rows!r}")
        self._set(rows)

    def _checked(self, child: Any) -> Any:
        return None if child is None else super()._checked(child)

    def __repr__(self) -> str:
        return f"Rows({self.children!r})"


@dataclass(frozen=True, init=False, repr=False)
class Drop(CompositionNode):
    """The child, but not in these layers, where it changes nothing; places outside of repeated blocks keep it.

    Args:
        layers: Indices into the repeated blocks, negative ones from the end, as in a config: `range(5)` drops the child
            in the five lowest. None of them drops nothing.

    Reference: Rücklé et al. 2021, arXiv:2010.11918 (AdapterDrop), section 3.
    """

    layers: tuple[int, ...]

    holds = _SAME_BATCH | {"Parallel"}
    most = 1
    example = 'Drop("a", layers=range(5))'

    def __init__(self, *children: Composition, layers: Sequence[int]) -> None:
        self._set(children, layers=_layers(layers))


@dataclass(frozen=True, init=False, repr=False)
class Parallel(CompositionNode):
    """The whole batch through each child, side by side: outputs of the first child, then of the second, and so on.

    Args:
        shared: Arguments of the model's call, by keyword or position, that are no part of a row (a mask over the tokens of
            all rows), where that is not plain from their shapes.

    Reference: Rücklé et al. 2021, arXiv:2010.11918 (AdapterDrop).
    """

    shared: tuple[str | int, ...] | None

    holds = _SAME_BATCH
    what_for = "the batch can be multiplied once only; name all children in one Parallel"

    def __init__(self, *children: Composition, shared: Sequence[str | int] | None = None) -> None:
        if isinstance(shared, str):
            raise ConfigError(f"shared is a list of arguments; found {shared!r}")
        self._set(children, shared=None if shared is None else tuple(shared))


@dataclass(frozen=True, init=False, repr=False)
class Fuse(CompositionNode):
    """What the children add, weighed for each token by a trained attention (AdapterFusion).

    The fusion of the same name, or trained over the same children, does it; some of its children may be left out.

    Args:
        name: The fusion's name; the children's, with commas between them, if not given.

    Reference: Pfeiffer et al. 2021, arXiv:2005.00247.
    """

    name: str | None

    holds = frozenset({"Stack", "Average", "Drop"})
    least = 2
    what_for = "a fusion is trained over adapters that see the same tokens of every row"

    def __init__(self, *children: Composition, name: str | None = None) -> None:
        self._set(children, name=None if name is None else check_name(name))

    @property
    def fusion(self) -> str:
        """The name of the fusion that weighs the children."""
        return ",".join(map(str, self.children)) if self.name is None else self.name


_TYPES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Stack, Average, Split, BatchSplit, Rows, Drop, Parallel, Fuse)
}


def _blocks_in(composition: Composition | None) -> Iterator[CompositionNode]:
    """The compositions in one, itself first."""
    if isinstance(composition, CompositionNode):
        yield composition
        for child in composition.children:
            yield from _blocks_in(child)


def drops_in(composition: Composition | None) -> Iterator[Drop]:
    """The Drops in a composition, itself one of them if it is."""
    return (block for block in _blocks_in(composition) if isinstance(block, Drop))


def multiplies_rows(composition: Composition | None) -> bool:
    """Whether a composition holds, or is, a Parallel."""
    return parallel_in(composition) is not None


def parallel_in(composition: Composition | None) -> Parallel | None:
    """The Parallel that a composition holds, or is, if any."""
    return next((block for block in _blocks_in(composition) if isinstance(block, Parallel)), None)


def names_always(composition: Composition | None) -> frozenset[str]:
    """The adapters that act on every row and token, in full: at all of their places."""
    if not isinstance(composition, CompositionNode):
        return frozenset() if composition is None else frozenset({composition})
    if isinstance(composition, Stack) or (isinstance(composition, Drop) and not composition.layers):
        return frozenset().union(*map(names_always, composition.children))
    return frozenset()


def names_in(composition: Composition | None) -> Iterator[str]:
    """The adapters that a composition names, and the fusions after what they weigh, in order, with repetitions."""
    if isinstance(composition, CompositionNode):
        for child in composition.children:
            yield from names_in(child)
        if isinstance(composition, Fuse):
            yield composition.fusion
    elif composition is not None:
        yield composition


def fusions_in(composition: Composition | None) -> Iterator[Fuse]:
    """The fusions in a composition."""
    yield from (block for block in _blocks_in(composition) if isinstance(block, Fuse))


def expanded(composition: Composition | None, meant: Mapping[str, Composition]) -> Composition | None:
    """The composition with what some of its names stand for in their place.

    Raises:
        ConfigError: that may not stand there.
    """
    if not isinstance(composition, CompositionNode):
        return composition if composition is None else meant.get(composition, composition)
    children = tuple(expanded(child, meant) for child in composition.children)
    return composition if children == composition.children else from_json(to_json(composition.with_children(children)))


def to_json(composition: Composition | None) -> Any:
    """The composition in values that JSON has: `{"type": "Stack", "children": ["a", "b"]}`; a name is itself."""
    if not isinstance(composition, CompositionNode):
        return composition
    settings = {f.name: getattr(composition, f.name) for f in fields(composition) if f.name != "children"}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    children = [to_json(child) for child in composition.children]
    return {"type": type(composition).__name__, "children": children, **plain}


def from_json(value: Any) -> Composition | None:
    """The composition of such values.

    Raises:
        ConfigError: they describe none.
    """
    if not isinstance(value, Mapping):
        return None if value is None else check_name(value)
    settings = {key: item for key, item in value.items() if key not in ("type", "children")}
    kind, children = _TYPES.get(str(value.get("type"))), value.get("children")
    known = set() if kind is None else {f.name for f in fields(kind)} - {"children"}
    needed = {"layers"} if kind is Drop else set()
    if kind is None or not isinstance(children, (list, tuple)) or not needed <= settings.keys() <= known:
        raise ConfigError(
            f"a composition has a 'type' of {sorted(_TYPES)}, a list of 'children' and the settings of that type; found "
            f"{dict(value)!r}"
        )
    below = [from_json(child) for child in children]
    composition: Composition = kind(below, **settings) if kind is Rows else kind(*below, **settings)
    return composition


def _numbers(values: Any, what: str, count: int) -> Sequence[Any]:
    """The values, if they are as many numbers as there are children."""
    try:
        found = list(values)
        right = len(found) == count and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found)
    except TypeError:
        right = False
    if not right:
        raise ConfigError(f"{what} has one number for each of the {count} children; found {values!r}")
    return found


def _sizes(sizes: Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """The sizes, checked."""
    if sizes is None:
        return None
    found = tuple(_numbers(sizes, "sizes", count))
    if not all(isinstance(size, int) and size >= 0 for size in found):
        raise ConfigError(f"sizes are whole numbers, none negative; found {list(found)}")
    return found


def _layers(layers: Any) -> tuple[int, ...]:
    """The layers, checked, sorted, each once."""
    given: list[Any] = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [None]
    if not all(hasattr(layer, "__index__") and not isinstance(layer, bool) for layer in given):
        raise ConfigError(f"layers is a list of whole numbers, or a range; found {layers!r}")
    return tuple(sorted({operator.index(layer) for layer in given}))
