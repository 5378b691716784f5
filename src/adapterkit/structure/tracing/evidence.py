"""Ask numbers what an operation does that is not torch's, and that no `HostType` names; or one of torch's that is rare.

A quantised linear, a kernel of another package, a custom op: its name tells nothing. So it is run again on other numbers:

    projection   f((a + b) / 2) = (f(a) + f(b)) / 2, it has weights, and each feature moves the features of its own token
    attention    of three tensors: linear in the third, moves it between tokens, with weights that sum to one
    pointwise    what changes at one position and feature changes nothing at any other
    norm         mixes features, and twice the input gives the same
    lookup       made of integers alone: an embedding, a mask
    map          linear in each input without weights, within one token (rotary positions, a Hadamard transform)
    unknown      anything else

Quantised layers round, so all of this holds within some percent.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .graph import Graph, Operation
from .operations import is_named
from .pieces import Piece, is_number, piece_at

__all__ = ["Evidence", "ask"]

_TOLERANCE = 0.05  # of rounding to few bits, beside the size of what is computed
_SEEN = 0.1  # a change smaller than this share of the greatest is rounding that came along
_SCALES = (1.0, 16.0)  # near zero every smooth function is linear
_CODES = 128  # integers that stand for numbers are drawn up to some such size, where rounding does not show


@dataclass(frozen=True)
class Evidence:
    """What an operation does, as numbers show it.

    Attributes:
        input_axis: For a projection, the axis of its source's features; `axis`, of those that it makes.
        order: Which of the piece's sources are the query, key and value of an attention.
        operands: Where it reads its activations: each a node and which of its inputs; of an attention, query, key, value.
        reason: Why it is unknown.
    """

    kind: Literal["projection", "attention", "pointwise", "norm", "lookup", "map", "unknown"]
    input_axis: int = -1
    axis: int = -1
    order: tuple[int, ...] = ()
    operands: tuple[tuple[int, int], ...] = ()
    reason: str = ""


def ask(graph: Graph, is_constant: Sequence[bool], ancestors: Sequence[int]) -> dict[int, Evidence]:
    """Map each operation that no name tells of to what it does.

    Those that do the same (in other layers) are asked once; where there are none, it costs nothing.

    Args:
        is_constant: Tells of each node whether it comes of parameters and buffers alone.
        ancestors: For each node, the set of those that it depends on.
    """
    nodes = graph.nodes
    asked = [n for n in nodes if n.is_floating and not is_constant[n.index] and not n.is_torchs]
    rare = [n for n in nodes if n.is_torchs and _is_rare(n)]
    if not asked and not rare:
        return {}
    held, of_nothing = _held(graph, is_constant), _made_of_nothing(graph, ancestors)
    asked = sorted({*asked, *_rare_products(nodes, rare, held)}, key=lambda node: node.index)
    known: dict[Hashable, Evidence] = {}
    found: dict[int, Evidence] = {}
    for node in asked:
        piece = piece_at(nodes, node, held, of_nothing)
        key = piece.key()
        if key not in known:
            known[key] = _evidence_of(piece)
        order = known[key].order or range(len(piece.readers))
        found[node.index] = replace(known[key], operands=tuple(piece.readers[i] for i in order))
    return found


def _held(graph: Graph, is_constant: Sequence[bool]) -> int:
    """Return the set of nodes that come of what the model holds."""
    # A tensor from outside that no module was called with is held in an attribute, as bitsandbytes holds its weights.
    given = {i for call in graph.calls for _, i in call.inputs}
    return sum(1 << n.index for n in graph.nodes if is_constant[n.index] or (n.op == "input" and n.index not in given))


def _made_of_nothing(graph: Graph, ancestors: Sequence[int]) -> int:
    """Return the set of nodes that come of no tensor at all, as positions do."""
    outside = sum(1 << node.index for node in graph.nodes if node.operation is None)
    return sum(1 << n.index for n in graph.nodes if n.operation is not None and not ancestors[n.index] & outside)


def _is_rare(node: Operation) -> bool:
    """Tell whether no name or tag says what one of torch's operations on several tensors does: `_int_mm`, `_trilinear`."""
    tags = getattr(node.operation[0], "tags", ()) if node.operation else ()
    return len(node.taken) > 1 and not is_named(node.op, tags)


def _rare_products(nodes: Sequence[Operation], rare: Sequence[Operation], held: int) -> Iterator[Operation]:
    """Yield those of the rare operations that may multiply by a matrix of the model's.

    Of one that makes integers it is what makes numbers of them again: `_int_mm(rounded, weight).float()`.
    """
    pending = 0
    may_multiply = {node.index for node in rare if _takes_both(node, held)}
    for node in nodes:
        if held >> node.index & 1 or not node.is_torchs:
            continue
        if node.index in may_multiply or any(pending >> i & 1 for i in node.inputs):
            if is_number(node):
                yield node
            else:
                pending |= 1 << node.index


def _takes_both(node: Operation, held: int) -> bool:
    """Tell whether an operation takes an activation, and a matrix that the model holds."""
    pairs = [(held >> i & 1, tensor) for i, tensor in zip(node.inputs, node.taken, strict=False)]
    return any(not is_held for is_held, _ in pairs) and any(
        is_held and not tensor.is_nested and tensor.numel() > max(tensor.shape, default=0) for is_held, tensor in pairs
    )


def _evidence_of(piece: Piece) -> Evidence:
    """Return what a piece does."""
    if not piece.sources:
        return Evidence("lookup")
    try:
        return _Questions(piece).answer()
    except ValueError as error:
        return Evidence("unknown", reason=str(error))


class _Questions:
    """Asks one piece.

    Attributes:
        base: Values of its sources.
        mixing: For each source, the axes along which a change at one index does not stay at one index.
    """

    def __init__(self, piece: Piece) -> None:
        self.piece, self._draw = piece, torch.Generator().manual_seed(0)
        self.base = [self._drawn(at) for at in range(len(piece.sources))]
        self.mixing = [
            [axis for axis in range(source.dim()) if source.shape[axis] > 1 and not self._stays(at, axis)]
            for at, source in enumerate(piece.sources)
        ]

    def answer(self) -> Evidence:
        """Return what it does."""
        if len(self.base) > 2 and self._attends():
            return Evidence("attention", order=self._query_first())
        if len(self.base) > 1 and self._makes_several():
            return Evidence("unknown", reason="it makes several tensors of several, and which of which is not known")
        if not any(self.mixing):
            return Evidence("pointwise")
        linear, has_weights = all(map(self._is_affine, range(len(self.base)))), self.piece.has_weights
        if linear and len(self.mixing[0]) == len(self.base) == 1 and has_weights:
            return self._projection()
        if self._moves_tokens():
            return Evidence("unknown", reason="it moves something between tokens, and is no attention of three tensors")
        if linear and not has_weights:
            return Evidence("map")
        if len(self.base) == 1 and not has_weights and _differ(self._twice(), self._run()) < _TOLERANCE:
            return Evidence("norm")
        return Evidence("unknown", reason="what it computes of a token is not linear, as a projection is")

    # --- one question each --------------------------------------------------------------------------------------------

    def _makes_several(self) -> bool:
        """Tell whether it returns more than one tensor of features."""
        return sum(made.is_floating_point() and made.dim() > 1 for made in self.piece.end.made) > 1

    def _moves_tokens(self) -> bool:
        """Tell whether it mixes along another axis than the last, which is that of features."""
        return any(axes not in ([], [source.dim() - 1]) for axes, source in zip(self.mixing, self.base, strict=True))

    def _projection(self) -> Evidence:
        """Describe a projection, or say why it is none."""
        ((axis,),) = self.mixing
        change = self._change(0, axis, 0)
        kept = [self._where(self._change(0, other, 0)) for other in range(self.base[0].dim()) if other != axis]
        taken = {axes[0] for axes in kept if axes}
        free = [a for a in range(change.dim()) if a not in taken]
        if len(free) != 1:
            return Evidence("unknown", reason="on which axis it makes features is not known")
        moved = _profile(change, free[0]).gt(_SEEN)
        if moved.sum() <= 2 and moved.sum() * 2 <= len(moved):  # pairs of features: a rotation by positions, in a buffer
            return Evidence("map")
        rank_in, rank_out = self.base[0].dim(), change.dim()
        return Evidence("projection", axis - rank_in, free[0] - rank_out)

    def _attends(self) -> bool:
        """Tell whether the third source is summed with weights that sum to one, over tokens."""
        values = self.base[2]
        ones, zeros = (self._run({2: torch.full_like(values, number)}) for number in (1.0, 0.0))
        sums_to_one = _differ(ones, torch.ones_like(ones)) < _TOLERANCE and not zeros.gt(_TOLERANCE).any()
        return sums_to_one and (bool(self.mixing[2]) or values.shape[-2] == 1) and self._is_affine(2)

    def _query_first(self) -> tuple[int, int, int]:
        """Return which source is the query, the key and the value: what one key holds moves more than one query."""
        return (1, 0, 2) if len(self.mixing[0]) > len(self.mixing[1]) else (0, 1, 2)

    def _is_affine(self, at: int) -> bool:
        """Tell whether the output is an affine function of one source, at every size of its numbers."""
        return all(self._fits(at, scale) for scale in self._scales(at))

    def _fits(self, at: int, scale: float) -> bool:
        a, b = self.base[at] * scale, self._drawn(at) * scale
        try:
            one, other, middle = (self._run({at: value}) for value in (a, b, (a + b) / 2))
        except ValueError:
            if scale != _SCALES[-1]:
                raise
            return True  # large numbers may lead another way, past what was recorded (outliers of int8): they tell nothing
        size = float((one - other).norm())
        return size > 0 and float((middle - (one + other) / 2).norm()) < _TOLERANCE * size

    def _stays(self, at: int, axis: int) -> bool:
        """Tell whether a change at the first or last index of a source's axis stays at one index of some axis."""
        return all(self._where(self._change(at, axis, index)) is not None for index in (0, -1))

    def _where(self, change: Tensor) -> list[int] | None:
        """List the axes of the output along which a change is at one index alone; None if there are none. No change: []."""
        if not change.any():
            return []
        axes = [a for a in range(change.dim()) if change.shape[a] > 1]
        return [a for a in axes if int(_profile(change, a).gt(_SEEN).sum()) == 1] or None

    def _change(self, at: int, axis: int, index: int) -> Tensor:
        """Return how much the output changes with a source at one index. Shape: as the output."""
        moved = self.base[at].clone()
        moved.select(axis, index).copy_(self._drawn(at).select(axis, index))
        return (self._run({at: moved}) - self._run()).abs()

    def _twice(self) -> Tensor:
        return self._run({0: 2 * self.base[0]})

    # --- running it ---------------------------------------------------------------------------------------------------

    def _run(self, other: dict[int, Tensor] | None = None) -> Tensor:
        """Run the piece on the base values, or on others for some of its sources."""
        return self.piece.run([(other or {}).get(at, value) for at, value in enumerate(self.base)])

    def _scales(self, at: int) -> tuple[float, ...]:
        """Return the sizes at which a source is asked: of codes, which have bounds, that at which they are drawn."""
        return _SCALES[:1] if at in self.piece.rounded else _SCALES

    def _drawn(self, at: int) -> Tensor:
        """Return random numbers of the size that a source's had; for codes, of a quarter of the greatest."""
        source = self.piece.sources[at]
        size = float(source.double().std()) if source.numel() > 1 and not source.is_meta else 0.0
        if at in self.piece.rounded:
            size = min(self.piece.rounded[at], _CODES) / 4
        drawn = torch.randn(source.shape, generator=self._draw) * (size if 0 < size < float("inf") else 1.0)
        return drawn.to(source.device, source.dtype)


def _profile(change: Tensor, axis: int) -> Tensor:
    """Return the greatest change at each index of an axis, as a share of the greatest of all."""
    return change.movedim(axis, 0).flatten(1).amax(1) / change.max()


def _differ(one: Tensor, other: Tensor) -> float:
    """Return how far two tensors are apart, as a share of the second one's size."""
    return float((one - other).norm() / other.norm())
