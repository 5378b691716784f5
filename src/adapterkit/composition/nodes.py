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

A new node is a class here, which states its facts (see `CompositionNode`), and what it becomes at a site, in
`runtime/compose/plan_nodes.py`. Nothing else asks which node it meets.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from ..errors import CompatibilityError, ConfigError
from .names import check_name
from .sizes import as_layers, as_sizes, numbers_for, sizes_of

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

# The classes of all nodes by name, for JSON and for messages. A class enters itself when it is defined.
_NODES: dict[str, type[CompositionNode]] = {}
# What each class must state itself: a default would be wrong for some node, in silence.
_FACTS = ("child_gets", "is_in_order", "head_from")


@dataclass(frozen=True, init=False, repr=False)
class CompositionNode:
    """Base of all compositions.

    Attributes:
        children: What is composed: adapter names and other compositions.

    A class states its facts, which all that walks over compositions reads. It cannot be defined without the first three.

        child_gets: What each child runs on: "everything" (all tokens of all rows), some "tokens" of each row, some
            "rows" of the batch, or "a copy" of the whole batch.
        is_in_order: Whether the children act one after the other, each with all that it adds, as if they were active in
            turn. Only such nodes may hold adapters that change a Parameter, and keep merged adapters merged.
        head_from: Whose head runs where several children own one: that of the "last", or of the "only" one, so that
            several are an error.
        holds: Which nodes may lie below it, by their `child_gets`.
        least, most: How many children there may be.
        why_no_others: Why it does not hold the nodes that `may_hold` refuses.
        example: How it is written, for messages.

    Its settings are its other fields, each an argument of `__init__`. They have values that JSON has; lists are tuples.
    """

    children: tuple[Composition, ...]

    child_gets: ClassVar[Literal["everything", "tokens", "rows", "a copy"]]
    is_in_order: ClassVar[bool]
    head_from: ClassVar[Literal["last", "only"]]
    holds: ClassVar[Sequence[str]] = ("everything", "tokens", "rows")
    least: ClassVar[int] = 1
    most: ClassVar[float] = math.inf  # a float, since infinity is one
    why_no_others: ClassVar[str] = "Parallel multiplies the batch; put it around the others"
    example: ClassVar[str] = 'Stack("a", "b")'

    def __init_subclass__(cls) -> None:
        # `vars`, not `hasattr`: a class must not take over what another one states by inheriting from it.
        missing = [fact for fact in _FACTS if fact not in vars(cls)]
        if missing:
            raise TypeError(f"the composition {cls.__name__} does not state {', '.join(missing)}; see CompositionNode")
        _NODES[cls.__name__] = cls

    @classmethod
    def may_hold(cls, kind: type[CompositionNode]) -> bool:
        """Tell whether nodes of this kind may lie among its children, or below them."""
        return kind.child_gets in cls.holds

    @classmethod
    def settings_names(cls) -> tuple[str, ...]:
        """Return the names of its settings: all of its fields but the children."""
        # A new node thus has its arguments, `repr` and JSON form by declaring its fields.
        return tuple(field.name for field in fields(cls) if field.name != "children")

    @classmethod
    def of(cls, children: Sequence[Any], settings: Mapping[str, Any]) -> CompositionNode:
        """Make one of these children and settings, checked. Raises ConfigError."""
        return cls(*children, **settings)

    @property
    def settings(self) -> dict[str, Any]:
        """Map the name of each setting to its value."""
        return {name: getattr(self, name) for name in self.settings_names()}

    @property
    def own_rows(self) -> int | None:
        """How many rows of a batch it needs; None if it takes any number that its children can share."""
        return None

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """The layers in which its children change nothing."""
        return ()

    @property
    def fusion(self) -> str | None:
        """The name of the fusion that weighs its children; None if none does."""
        return None

    def row_sizes(self, count: int) -> tuple[int, ...]:
        """Return how many of `count` rows each child runs, of a node whose children get rows or copies.

        Raises:
            CompatibilityError: the batch cannot be divided so.
        """
        return sizes_of(None, len(self.children), count, "the batch")

    def with_children(self, children: Sequence[Any]) -> CompositionNode:
        """Return the same with other children, of which None is the base.

        They are not checked: rows of a `Rows` inside leave the base where a name was.
        """
        composition = object.__new__(type(self))  # frozen: `object.__setattr__` is the one way to fill it
        object.__setattr__(composition, "children", tuple(children))
        for name, value in self.settings.items():
            object.__setattr__(composition, name, value)
        return composition

    def _set_fields(self, children: Sequence[Any], **settings: Any) -> None:
        """Set the children and all settings, once the children are checked."""
        if len(children) < self.least:
            raise ConfigError(f"{type(self).__name__} takes at least {self.least} children; found {list(children)}")
        if len(children) > self.most:
            raise ConfigError(f"{type(self).__name__} takes one child, as in {self.example}; found {list(children)}")
        object.__setattr__(self, "children", tuple(self._checked_child(child) for child in children))
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        # Each child alone may be held; two that repeat the batch would have to repeat it twice over.
        if sum(map(multiplies_rows, self.children)) > 1:
            raise ConfigError(f"{self!r}: {Parallel.why_no_others}")

    def _checked_child(self, child: Any) -> Composition:
        """Return the child, if it may be one. Raises ConfigError, or AdapterNameError for a bad name."""
        if isinstance(child, (list, tuple, set, range)):
            by_keyword = "".join(f", and {name}= by its name" for name in self.settings_names())
            raise ConfigError(
                f"{type(self).__name__} takes names and compositions one by one, as in {self.example}{by_keyword}; found "
                f"{child!r} among them"
            )
        # A plain string is an adapter's name; whether the model has it is asked when the composition is activated.
        if not isinstance(child, CompositionNode):
            return check_name(child)
        # All that lies below, too: Average("a", Stack(Parallel(...))) multiplies the batch as well.
        if not all(self.may_hold(type(node)) for node in _nodes_in(child)):
            held = sorted(name for name, kind in _NODES.items() if self.may_hold(kind))
            raise ConfigError(
                f"{type(self).__name__} cannot hold {child!r}: {self.why_no_others}. It holds "
                f"{', '.join(['adapter names', *held])}"
            )
        return child

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in self.settings.items() if value is not None]
        return f"{type(self).__name__}({', '.join([*map(repr, self.children), *given])})"


Composition = str | CompositionNode


@dataclass(frozen=True, init=False, repr=False)
class Stack(CompositionNode):
    """One after the other, in this order; the changes of weights add up.

    Reference: Pfeiffer et al. 2020, arXiv:2005.00052 (MAD-X).
    """

    child_gets = "everything"
    is_in_order = True
    head_from = "last"
    holds = ("everything", "tokens", "rows", "a copy")

    def __init__(self, *children: Composition) -> None:
        self._set_fields(children)


@dataclass(frozen=True, init=False, repr=False)
class Average(CompositionNode):
    """The weighted mean of what the children add at each place.

    Args:
        weights: One for each child; they are divided by their sum. Equal if not given.

    Reference: Wang et al. 2021, arXiv:2109.04877 (ensembles of language adapters).
    """

    weights: tuple[float, ...] | None

    child_gets = "everything"
    is_in_order = False
    head_from = "only"
    why_no_others = "Parallel multiplies the batch, and a mean needs the same rows of each child"
    example = 'Average("a", "b", weights=(0.7, 0.3))'

    def __init__(self, *children: Composition, weights: Sequence[float] | None = None) -> None:
        if weights is not None:
            weights = tuple(float(weight) for weight in numbers_for(weights, "weights", len(children)))
            # Weights may be negative, as in (2, -1). They are divided by their sum, which must not be zero.
            if not all(map(math.isfinite, weights)) or sum(weights) == 0:
                raise ConfigError(f"weights must be finite, and their sum not zero; found {list(weights)}")
        self._set_fields(children, weights=weights)


@dataclass(frozen=True, init=False, repr=False)
class Split(CompositionNode):
    """Each child on its part of the sequence.

    Args:
        sizes: Tokens of each part, in order; they sum to the length of the sequence. Equal parts if not given.
    """

    sizes: tuple[int, ...] | None

    child_gets = "tokens"
    is_in_order = False
    head_from = "only"
    why_no_others = "Parallel multiplies the batch; put it around the Split"
    example = 'Split("a", "b", sizes=(3, 5))'

    def __init__(self, *children: Composition, sizes: Sequence[int] | None = None) -> None:
        self._set_fields(children, sizes=as_sizes(sizes, len(children)))


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(CompositionNode):
    """Each child on its part of the batch.

    Args:
        sizes: Rows of each part, in order; they sum to the batch. Equal parts if not given.
    """

    sizes: tuple[int, ...] | None

    child_gets = "rows"
    is_in_order = False
    head_from = "only"
    why_no_others = "Parallel multiplies the batch; put it around the BatchSplit"
    example = 'BatchSplit("a", "b", sizes=(2, 4))'

    def __init__(self, *children: Composition, sizes: Sequence[int] | None = None) -> None:
        self._set_fields(children, sizes=as_sizes(sizes, len(children)))

    @property
    def own_rows(self) -> int | None:
        """The sum of its sizes."""
        return None if self.sizes is None else sum(self.sizes)

    def row_sizes(self, count: int) -> tuple[int, ...]:
        """Return its sizes, or equal ones. Raises CompatibilityError: they do not sum to `count`."""
        return sizes_of(self.sizes, len(self.children), count, "the batch")


@dataclass(frozen=True, init=False, repr=False)
class Rows(CompositionNode):
    """Each row of the batch its own adapter, in one pass.

    Args:
        rows: For each row an adapter's name or a composition; None is the base alone.
    """

    children: tuple[Composition | None, ...]  # type: ignore[assignment]  # None is the base

    child_gets = "rows"
    is_in_order = False
    head_from = "only"
    holds = ("everything", "tokens")  # what gives each row the same adapters
    why_no_others = "a row is one row, which nothing can divide or multiply"
    example = 'Rows(["a", "b", None])'

    def __init__(self, rows: Sequence[Composition | None], *others: Any) -> None:
        # A list, where other nodes take their children one by one: it is as long as the batch, and mostly made by code.
        if others or isinstance(rows, (str, CompositionNode)) or not isinstance(rows, Sequence):
            raise ConfigError(
                f"Rows takes one sequence with a name (or None) for each row, as in ak.{self.example}; found "
                f"{', '.join(map(repr, (rows, *others)))}"
            )
        self._set_fields(rows)

    @classmethod
    def of(cls, children: Sequence[Any], settings: Mapping[str, Any]) -> CompositionNode:
        """Make one of these rows; it has no settings. Raises ConfigError."""
        return cls(children, **settings)

    @property
    def own_rows(self) -> int:
        """One for each child."""
        return len(self.children)

    def row_sizes(self, count: int) -> tuple[int, ...]:
        """Return 1 for each child. Raises CompatibilityError: they are not `count`."""
        if len(self.children) != count:
            raise CompatibilityError(
                f"Rows names {len(self.children)} rows, and the batch has {count}; name one for each, None for the base"
            )
        return (1,) * count

    def _checked_child(self, child: Any) -> Any:
        # The one node that holds None: a row without an adapter.
        return None if child is None else super()._checked_child(child)

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

    child_gets = "everything"
    is_in_order = True  # where it acts at all
    head_from = "only"
    holds = ("everything", "tokens", "rows", "a copy")
    most = 1
    example = 'Drop("a", layers=range(5))'

    def __init__(self, *children: Composition, layers: Sequence[int]) -> None:
        self._set_fields(children, layers=as_layers(layers))

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """Its layers."""
        return self.layers


@dataclass(frozen=True, init=False, repr=False)
class Parallel(CompositionNode):
    """The whole batch through each child, side by side: outputs of the first child, then of the second, and so on.

    Args:
        shared: Arguments of the model's call, by keyword or position, that are no part of a row (a mask over the tokens of
            all rows), where that is not plain from their shapes.

    Reference: Rücklé et al. 2021, arXiv:2010.11918 (AdapterDrop).
    """

    shared: tuple[str | int, ...] | None

    child_gets = "a copy"
    is_in_order = False
    head_from = "only"
    why_no_others = "the batch can be multiplied once only; name all children in one Parallel"
    example = 'Parallel("a", "b")'

    def __init__(self, *children: Composition, shared: Sequence[str | int] | None = None) -> None:
        # A string is a sequence, too: "mask" would be four arguments, m, a, s and k.
        if isinstance(shared, str):
            raise ConfigError(f"shared is a list of arguments; found {shared!r}")
        self._set_fields(children, shared=None if shared is None else tuple(shared))


@dataclass(frozen=True, init=False, repr=False)
class Fuse(CompositionNode):
    """What the children add, weighed for each token by a trained attention (AdapterFusion).

    The fusion of the same name, or trained over the same children, does it; some of its children may be left out.

    Args:
        name: The fusion's name; the children's, with commas between them, if not given.

    Reference: Pfeiffer et al. 2021, arXiv:2005.00247.
    """

    name: str | None

    child_gets = "everything"
    is_in_order = False
    head_from = "only"
    holds = ("everything",)
    least = 2
    why_no_others = "a fusion is trained over adapters that see the same tokens of every row"
    example = 'Fuse("a", "b")'

    def __init__(self, *children: Composition, name: str | None = None) -> None:
        self._set_fields(children, name=None if name is None else check_name(name))

    @classmethod
    def may_hold(cls, kind: type[CompositionNode]) -> bool:
        """Tell whether it gives all rows and tokens the same adapters, and is no fusion itself."""
        # A Fuse gives "everything" to its children as a Stack does, so that the rule of the base class would let it in.
        return super().may_hold(kind) and kind is not Fuse

    @property
    def fusion(self) -> str:
        """The name of the fusion that weighs the children."""
        return ",".join(map(str, self.children)) if self.name is None else self.name


def _nodes_in(composition: Composition | None) -> Iterator[CompositionNode]:
    """Yield the nodes of a composition, itself first; a name has none."""
    if isinstance(composition, CompositionNode):
        yield composition
        for child in composition.children:
            yield from _nodes_in(child)


def drops_in(composition: Composition | None) -> Iterator[CompositionNode]:
    """Yield the nodes that drop layers in a composition, itself one of them if it does."""
    return (node for node in _nodes_in(composition) if node.dropped_layers)


def multiplies_rows(composition: Composition | None) -> bool:
    """Tell whether a composition holds, or is, a Parallel."""
    return parallel_in(composition) is not None


def parallel_in(composition: Composition | None) -> Parallel | None:
    """Return the Parallel that a composition holds, or is; None if there is none. There is never more than one."""
    found: Any = next((node for node in _nodes_in(composition) if node.child_gets == "a copy"), None)
    return found  # type: ignore[no-any-return]  # the one node that gives copies, or one with its fields


def names_always(composition: Composition | None) -> frozenset[str]:
    """Return the adapters that act on every row and token, in full: at all of their places."""
    if not isinstance(composition, CompositionNode):
        return frozenset() if composition is None else frozenset({composition})
    # Under any other node an adapter acts on some rows or tokens, at a weight, or not in all layers.
    if composition.is_in_order and not composition.dropped_layers:
        return frozenset().union(*map(names_always, composition.children))
    return frozenset()


def names_in(composition: Composition | None) -> Iterator[str]:
    """Yield the adapters that a composition names, and each fusion after what it weighs; in order, with repetitions."""
    if isinstance(composition, CompositionNode):
        for child in composition.children:
            yield from names_in(child)
        if composition.fusion is not None:
            # After the children: a fusion weighs what these have added.
            yield composition.fusion
    elif composition is not None:
        yield composition


def fusions_in(composition: Composition | None) -> Iterator[Fuse]:
    """Yield the fusions in a composition, itself one of them if it is."""
    yield from (node for node in _nodes_in(composition) if isinstance(node, Fuse))


def expanded(composition: Composition | None, meant: Mapping[str, Composition]) -> Composition | None:
    """Return the composition with each name that is a key of `meant` replaced by the value.

    Raises:
        ConfigError: that may not stand there.
    """
    if not isinstance(composition, CompositionNode):
        return composition if composition is None else meant.get(composition, composition)
    children = tuple(expanded(child, meant) for child in composition.children)
    # Made by `of`, which checks again: a name may stand for what is not allowed there, such as a fusion inside a Fuse.
    return composition if children == composition.children else type(composition).of(children, composition.settings)


def to_json(composition: Composition | None) -> Any:
    """Return the composition in values that JSON has: `{"type": "Stack", "children": ["a", "b"]}`; a name is itself."""
    if not isinstance(composition, CompositionNode):
        return composition
    # JSON has lists alone; reading one back, the constructors make tuples of them again.
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in composition.settings.items()}
    children = [to_json(child) for child in composition.children]
    return {"type": type(composition).__name__, "children": children, **plain}


def from_json(value: Any) -> Composition | None:
    """Return the composition that `to_json` gave.

    Raises:
        ConfigError: these values describe none.
    """
    if not isinstance(value, Mapping):
        return None if value is None else check_name(value)
    # The values may come from a file that anybody wrote: nothing of them is trusted.
    settings = {key: item for key, item in value.items() if key not in ("type", "children")}
    kind, children = _NODES.get(str(value.get("type"))), value.get("children")
    if kind is None or not isinstance(children, (list, tuple)) or not _are_settings_of(kind, settings):
        raise ConfigError(
            f"a composition has a 'type' of {sorted(_NODES)}, a list of 'children' and the settings of that type; found "
            f"{dict(value)!r}"
        )
    try:
        return kind.of([from_json(child) for child in children], settings)
    except TypeError as error:  # too many children for one that has a fixed number, or a setting of another type
        raise ConfigError(f"no {kind.__name__} can be made of {dict(value)!r}: {error}") from error


def _are_settings_of(kind: type[CompositionNode], settings: Mapping[str, Any]) -> bool:
    """Tell whether a node of this kind has all of these settings, and needs no others."""
    parameters = inspect.signature(kind).parameters
    known = set(kind.settings_names())
    needed = {name for name in known if parameters[name].default is inspect.Parameter.empty}
    return needed <= settings.keys() <= known
