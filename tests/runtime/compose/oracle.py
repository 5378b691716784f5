"""What a model must return under a composition, computed plainly: each row alone, adapters one by one.

Nothing here comes from the code that runs compositions. A row of the inputs goes through a bare copy of the model; hooks of
this file change what its modules take and return, and a functional call what Parameters are, as docs/compositions.md
defines it. Adapters are asked for their modules and places (`SiteSpec`) alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition.nodes import (
    Average,
    BatchSplit,
    Composition,
    CompositionNode,
    Drop,
    Fuse,
    Parallel,
    Rows,
    Split,
    Stack,
    names_in,
)
from adapterkit.placement.spec import SiteSpec
from adapterkit.runtime.lookup import sites_of
from adapterkit.runtime.site import SiteEntry


class NoMeaningError(Exception):
    """The composition means nothing for this batch or these places: the model must refuse, with a typed error."""


@dataclass(frozen=True)
class Piece:
    """One module of an adapter, at its place."""

    spec: SiteSpec
    module: Any


def pieces_of(model: nn.Module) -> dict[str, list[Piece]]:
    """Every adapter's modules, host by host in the model's order."""
    pieces: dict[str, list[Piece]] = {}
    for _, _, site in sites_of(model):
        for name in site.entries:
            for entry, module in site.modules_of(name):
                assert isinstance(entry, SiteEntry), "heads are no part of this oracle"
                pieces.setdefault(name, []).append(Piece(entry.spec, module))
    return pieces


def check_rows(composition: Composition | None, count: int) -> None:
    """Raise NoMeaningError unless a batch of so many rows divides as the composition says, at every depth."""
    if isinstance(composition, Rows) and len(composition.children) != count:
        raise NoMeaningError(f"{composition} on {count} rows")
    if isinstance(composition, BatchSplit):
        for child, size in zip(composition.children, sizes_in(composition, count), strict=True):
            check_rows(child, size)
    elif isinstance(composition, CompositionNode):
        for child in composition.children:
            size = count // len(composition.children) if isinstance(composition, Parallel) else count
            check_rows(child, 1 if isinstance(composition, Rows) else size)


def copies_in(composition: Composition | None) -> int:
    """How often the batch runs."""
    if not isinstance(composition, CompositionNode):
        return 1
    below = max([1, *map(copies_in, composition.children)])
    return below * len(composition.children) if isinstance(composition, Parallel) else below


def check_drops(composition: Composition | None, pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Raise NoMeaningError for a Drop of layers that there are not around what it drops."""
    if isinstance(composition, Drop):
        places = [piece.spec.layer for name in names_in(composition) for piece in pieces[name]]
        for index in composition.layers if places else ():
            if not any(place is not None and -place[1] <= index < place[1] for place in places):
                raise NoMeaningError(f"{composition}: no layer {index}")
    for child in composition.children if isinstance(composition, CompositionNode) else ():
        check_drops(child, pieces)


def sizes_in(composition: BatchSplit | Split, whole: int) -> Sequence[int]:
    """How many rows, or tokens, each child gets."""
    sizes = composition.sizes or [whole // len(composition.children)] * len(composition.children)
    if sum(sizes) != whole:
        raise NoMeaningError(f"{composition} on {whole}")
    return sizes


def child_of_row(c: Rows | Parallel | BatchSplit, row: int, count: int) -> tuple[Composition | None, int, int]:
    """What a row of so many runs, and which row it is there, of how many."""
    if isinstance(c, Rows):
        return c.children[row], 0, 1
    sizes = sizes_in(c, count) if isinstance(c, BatchSplit) else [count // len(c.children)] * len(c.children)
    index = 0
    while row >= sizes[index]:
        row, index = row - sizes[index], index + 1
    return c.children[index], row, sizes[index]


Layers = frozenset[int]
ALL: Layers = frozenset()  # none is dropped


def named_in(composition: Composition | None, dropped: Layers = ALL) -> Iterator[tuple[str, Layers]]:
    """The adapters of a composition, in order, each with the layers in which it is dropped."""
    if isinstance(composition, Drop):
        dropped = dropped | {*composition.layers}
    if isinstance(composition, CompositionNode):
        for child in composition.children:
            yield from named_in(child, dropped)
    elif composition is not None:
        yield composition, dropped


def named_for(c: Composition | None, row: int, count: int, dropped: Layers = ALL) -> Iterator[tuple[str, Layers]]:
    """`named_in` what one row of so many runs."""
    if isinstance(c, (Rows, Parallel, BatchSplit)):
        yield from named_for(*child_of_row(c, row, count), dropped)
    elif isinstance(c, CompositionNode):
        for child in c.children:
            yield from named_for(child, row, count, dropped | {*c.layers} if isinstance(c, Drop) else dropped)
    else:
        yield from named_in(c, dropped)


def is_stacked(composition: Composition | None) -> bool:
    """Whether a composition is nothing but names one after the other, in some layers or all."""
    if not isinstance(composition, CompositionNode):
        return True
    return isinstance(composition, (Stack, Drop)) and all(map(is_stacked, composition.children))


def is_dropped(piece: Piece, dropped: Layers) -> bool:
    """Whether a module lies in one of these layers, which may be counted from the end."""
    layer = piece.spec.layer
    return layer is not None and bool({layer[0], layer[0] - layer[1]} & dropped)


@dataclass(frozen=True)
class Place:
    """What a module's hook sees of one row: the tensor as the host made it, what the host takes, and streams by path."""

    host: nn.Module
    bare: Tensor
    taken: Any
    streams: Mapping[tuple[str, Any], Tensor]

    def tokens(self, start: int, size: int, axis: int) -> "Place":
        """The same, of some tokens."""

        def part(value: Any) -> Any:
            is_sequence = isinstance(value, Tensor) and value.shape[: axis + 1] == self.bare.shape[: axis + 1]
            return value.narrow(axis, start, size) if is_sequence else value  # not the image that an embedding takes

        streams = {key: part(stream) for key, stream in self.streams.items()}
        return Place(self.host, part(self.bare), part(self.taken), streams)


@dataclass(frozen=True)
class Run:
    """One row's run.

    Attributes:
        pieces: The adapters' modules.
        composition: The whole of it.
        row: Which row this is.
        count: Of so many.
        token_axis: The axis of tokens at the places; None where there are no sequences.
    """

    pieces: Mapping[str, Sequence[Piece]]
    composition: Composition | None
    row: int
    count: int
    token_axis: int | None

    def leave(self, x: Tensor, path: str, at: str, place: Place) -> Tensor:
        """The tensor as the composition leaves it."""

        def walk(c: Composition | None, row: int, count: int, x: Tensor, place: Place, off: Layers) -> Tensor:
            held = [piece for name, layers in named_for(c, row, count, off) for piece in self._here(name, path, at, layers)]
            if c is None or not held:
                return x
            if isinstance(c, str):
                for piece in self._here(c, path, at, off):
                    x = x + delta(piece, x, place)
                return x
            if isinstance(c, (Rows, Parallel, BatchSplit)):
                child, row, count = child_of_row(c, row, count)
                return walk(child, row, count, x, place, off)
            if isinstance(c, Drop):
                return walk(c.children[0], row, count, x, place, off | {*c.layers})
            if isinstance(c, Stack):
                for child in self._in_order(c, path, at, off):
                    x = walk(child, row, count, x, place, off)
                return x
            if isinstance(c, (Average, Fuse)):
                added = [walk(child, row, count, x, place, off) - x for child in c.children]
                if isinstance(c, Fuse):
                    return x + fused(self._here(c.fusion, path, at, off)[0], added, x, place)
                weights = c.weights or [1.0] * len(c.children)
                return x + sum(weight / sum(weights) * d for weight, d in zip(weights, added, strict=True))
            assert isinstance(c, Split), c
            if self.token_axis is None or x.dim() != 3 or any(piece.spec.axis != -1 for piece in held):
                raise NoMeaningError(f"{path!r} has no sequence: {tuple(x.shape)}")
            axis, parts, start = self.token_axis, [], 0
            for child, size in zip(c.children, sizes_in(c, x.shape[axis]), strict=True):
                part, there = x.narrow(axis, start, size), place.tokens(start, size, axis)
                parts.append(walk(child, row, count, part, there, off) if size else part)
                start += size
            return torch.cat(parts, axis)

        return walk(self.composition, self.row, self.count, x, place, ALL)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The Parameters that are others under the composition, by name."""
        changed: dict[str, Tensor] = {}
        for name, dropped in named_in(self.composition):
            done = set()  # a tied Parameter has several places and one module
            for piece in self.pieces[name]:
                if piece.spec.at != "weight" or is_dropped(piece, dropped):
                    continue
                if not is_stacked(self.composition):
                    raise NoMeaningError(f"{piece.spec.parameters} of {piece.spec.path!r} is one for all rows and tokens")
                parameter = f"{piece.spec.path}.{piece.spec.parameters[0]}".lstrip(".")
                mark = (id(model.get_parameter(parameter)), getattr(piece.module, "trained", piece.module))
                key = next((k for k in changed if model.get_parameter(k) is model.get_parameter(parameter)), parameter)
                before = changed.get(key, model.get_parameter(parameter))
                if mark not in done:
                    changed[key] = piece.module.adapted(before).to(before.dtype)
                done.add(mark)
        return changed

    def _here(self, name: str, path: str, at: str, off: Layers) -> list[Piece]:
        here = [piece for piece in self.pieces[name] if (piece.spec.path, piece.spec.at) == (path, at)]
        return [piece for piece in here if not is_dropped(piece, off)]

    def _in_order(self, c: Stack, path: str, at: str, off: Layers) -> list[Composition]:
        """The children as they come, but for what takes back a change made before (invertible adapters): the last first."""
        held = {
            child: [piece for name, layers in named_in(child, off) for piece in self._here(name, path, at, layers)]
            for child in c.children
        }
        undoing = [child for child in c.children if held[child] and all(is_inverse(piece) for piece in held[child])]
        return [*(child for child in c.children if child not in undoing), *reversed(undoing)]


def is_inverse(piece: Piece) -> bool:
    """Whether a module takes back what its adapter did at another place."""
    return getattr(piece.module, "direction", "forward") == "inverse"


def delta(piece: Piece, x: Tensor, place: Place) -> Tensor:
    """What one module adds to x."""
    spec, module = piece.spec, piece.module
    if spec.reads == "own_input":
        z = place.taken.to(module.compute_dtype) if place.taken.is_floating_point() else place.taken
        return module(z, place.bare, place.host).to(x.dtype)
    z = read(spec, x, place).to(module.compute_dtype)
    return module(z.movedim(spec.axis, -1), x.movedim(spec.axis, -1)).movedim(-1, spec.axis).to(x.dtype)


def fused(piece: Piece, added: Sequence[Tensor], x: Tensor, place: Place) -> Tensor:
    """What a fusion adds to x, by its formula: attention over what its children add (docs/fusion.md)."""
    axis, p = piece.spec.axis, dict(piece.module.named_parameters())
    u = torch.stack([d.movedim(axis, -1) for d in added], -2)  # (..., children, hidden)
    q = torch.nn.functional.linear(read(piece.spec, x, place).movedim(axis, -1), p["query_weight"], p["query_bias"])
    attention = (torch.einsum("...ch,kh->...ck", u, p["key_weight"]) * q.unsqueeze(-2)).sum(-1).softmax(-1)
    values = torch.einsum("...ch,kh->...ck", u, p["value_weight"])
    return (attention.unsqueeze(-1) * values).sum(-2).movedim(-1, axis)


def read(spec: SiteSpec, x: Tensor, place: Place) -> Tensor:
    """What a module reads at its place."""
    reads = {
        "site": lambda: x,
        "norm": lambda: place.host.forward(x),
        "residual": lambda: place.streams[spec.residual, spec.input],
        "sum": lambda: x + place.streams[spec.residual, spec.input],
    }
    z: Tensor = reads[spec.reads]()
    return z


def run_row(model: nn.Module, run: Run, call: Callable[[nn.Module], Any]) -> Any:
    """What `call(model)` returns for the run's row; the model is a bare one."""
    active = [piece for name in dict.fromkeys(names_in(run.composition)) for piece in run.pieces[name]]
    streams: dict[tuple[str, Any], Tensor] = {}
    with ExitStack() as stack:
        for path in dict.fromkeys(piece.spec.path for piece in active):
            host, here = model.get_submodule(path), [piece.spec for piece in active if piece.spec.path == path]

            def enter(host: Any, args: Any, kwargs: Any, path: str = path, specs: Any = here) -> Any:
                for spec in specs:
                    if spec.at == "input":
                        where = argument(args, kwargs, spec.input)
                        x = value_at((args, kwargs), where)
                        return replaced((args, kwargs), where, run.leave(x, path, "input", Place(host, x, None, streams)))
                return None

            def leave(host: Any, args: Any, kwargs: Any, out: Any, path: str = path, specs: Any = here) -> Any:
                for spec in specs:
                    if spec.at == "output":
                        where = spec.output or next(floats(out))
                        x, taken = value_at(out, where), next(iter((*args, *kwargs.values())), None)
                        return replaced(out, where, run.leave(x, path, "output", Place(host, x, taken, streams)))
                return None

            stack.callback(host.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(host.register_forward_hook(leave, with_kwargs=True).remove)
        for key in {(piece.spec.residual, piece.spec.input) for piece in active if piece.spec.residual is not None}:

            def keep(_module: Any, args: Any, kwargs: Any, key: Any = key) -> None:
                streams[key] = value_at((args, kwargs), argument(args, kwargs, key[1]))

            stack.callback(model.get_submodule(key[0]).register_forward_pre_hook(keep, with_kwargs=True).remove)
        changed = run.weights(model)

        class Called(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> Any:
                return call(self.model)

        return torch.func.functional_call(Called(), {f"model.{name}": tensor for name, tensor in changed.items()}, ())


def expected(
    kit: ak.AdapterKit,
    bare: nn.Module,
    composition: Composition | None,
    inputs: Mapping[str, Tensor],
    call: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    *,
    row_axis: int = 0,
    token_axis: int | None = 1,
) -> Tensor:
    """What `call(model, inputs)` must be under the composition: rows on `row_axis`, as those of all inputs.

    Under a Parallel the batch is there once for each child.

    Args:
        kit: Of the adapted model.
        bare: The same model, as it was before it had adapters.
        token_axis: At its places; None if there are no sequences.

    Raises:
        NoMeaningError: the model must refuse.
    """
    given = next(iter(inputs.values())).shape[row_axis]
    count = given * copies_in(composition)
    pieces, rows = pieces_of(kit.model), []
    check_drops(composition, pieces)
    acting = any(not is_dropped(piece, off) for name, off in named_in(composition) for piece in pieces[name])
    if not acting and count == given:
        composition = None  # dropped everywhere: nothing divides the rows, whatever it says of them
    check_rows(composition, count)
    for row in range(count):
        run = Run(pieces, composition, row, count, token_axis=token_axis)
        own = {name: tensor.narrow(row_axis, row % given, 1) for name, tensor in inputs.items()}
        rows.append(run_row(bare, run, lambda model, own=own: call(model, own)))
    return torch.cat(rows, row_axis)


def floats(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to the floating-point tensors in what a module takes or returns, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield way
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from floats(item, (*way, key))
    elif isinstance(value, (tuple, list)):
        for key, item in enumerate(value):
            yield from floats(item, (*way, key))


def argument(args: Any, kwargs: Any, which: tuple[int | None, str | None] | None) -> tuple[Any, ...]:
    """The way to an argument of a call; to the first floating-point tensor if none is named."""
    if which is None:
        return next(floats((args, kwargs)))
    position, keyword = which
    return (1, keyword) if keyword in kwargs else (0, position)


def value_at(value: Any, way: tuple[Any, ...]) -> Any:
    """What lies there."""
    for key in way:
        value = value[key]
    return value


def replaced(value: Any, way: tuple[Any, ...], tensor: Tensor) -> Any:
    """The value with another tensor there."""
    if not way:
        return tensor
    new = replaced(value[way[0]], way[1:], tensor)
    if isinstance(value, Mapping):
        return type(value)({**value, way[0]: new})
    return type(value)(new if key == way[0] else item for key, item in enumerate(value))
