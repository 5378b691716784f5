"""Low-rank pairs made into one pair: the exact sum, the nearest pair of a given rank, and how far apart two are."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .low_rank import LowRank

__all__ = ["concatenated", "factored", "reduced", "refitted", "relative_error"]

Pair = tuple[Tensor, Tensor]


def concatenated(low_rank: LowRank, pairs: Sequence[Pair]) -> Pair:
    """Return one pair whose delta is the sum of the deltas of the given ones. Weights of a sum belong on the Bs.

    Args:
        low_rank: The geometry; the rank of each pair is read off its tensors.
        pairs: A and B of each, shaped as `low_rank.a_shape` and `b_shape` are at the pair's own rank.

    Shape:
        A and B at a rank that is the sum of the ranks; of groups, each the sum of what it has.
    """
    # The axis of A's rows; B's columns are on the next one. The rows are slice by slice (or group by group), within a slice
    # rank by rank.
    axis = len(low_rank.projection.shape) - 2 if low_rank.projection.kind == "parameter" else 0
    blocks = low_rank.layout.count * low_rank.projection.groups
    rows = [torch.unflatten(a, axis, (blocks, -1)) for a, _ in pairs]
    return torch.cat(rows, axis + 1).flatten(axis, axis + 1), torch.cat([b for _, b in pairs], axis + 1)


def factored(low_rank: LowRank, delta: Tensor) -> Pair:
    """Find the pair nearest to a delta (least squares), by singular values: for each slice, group or leading index its own.

    It is exact where the delta has no greater rank. Where a matrix is smaller than the rank, the rest is zeros. The
    delta is taken for zero outside the slices.

    Shape: delta as the host's weight; A and B as `low_rank.a_shape` and `b_shape`.
    """
    p = low_rank.projection
    if p.groups > 1:
        matrices = [torch.unflatten(delta.flatten(1), 0, (p.groups, -1))]  # (groups, out / groups, in / groups * kernel)
    else:
        rows = delta.t() if p.kind != "parameter" and p.out_axis == 1 else delta
        rows = rows.flatten(1) if p.kind == "conv" else rows
        rows = low_rank.layout.pick(rows, -2).movedim(-2, 0)  # (covered, ..., in)
        matrices = [own.movedim(0, -2) for own in low_rank.layout.split(rows)]
    return _joined(low_rank, [_truncated(matrix, low_rank.rank_of_each) for matrix in matrices])


def reduced(low_rank: LowRank, a: Tensor, b: Tensor) -> Pair:
    """Find the pair nearest to the delta of another one: as `factored`, without making the delta.

    With Q R decompositions B = Q S and A^T = P T, the delta is Q (S T^T) P^T: what is to be decomposed is as small as the
    pair is thin.

    Shape: a and b at any rank; A and B as `low_rank.a_shape` and `b_shape`.
    """
    found = []
    for rows, columns in _matrices(low_rank, a, b):
        p, t = torch.linalg.qr(rows.mT)
        q, s = torch.linalg.qr(columns)
        inner = _truncated(s @ t.mT, low_rank.rank_of_each)
        found.append((inner[0] @ p.mT, q @ inner[1]))
    return _joined(low_rank, found)


def refitted(low_rank: LowRank, wanted: LowRank, a: Tensor, b: Tensor) -> Pair:
    """Turn a pair of some slices into one of other slices with the same delta.

    Args:
        low_rank: The geometry that the pair has, at any rank.
        wanted: The geometry that it is to have: the whole, or slices of which the pair's are some.

    Shape: a and b at any rank; A and B at that rank; for the whole, at the rank of all slices together.
    """
    old, new = low_rank.layout, wanted.layout
    if old.slices == new.slices:
        return a, b
    axis = b.dim() - 2 - len(low_rank.projection.kernel)  # of B's rows, and of A's
    if new.is_whole:
        # The whole is one slice, of the rank of all: A keeps its rows, and B gets columns for each of them.
        return a, torch.unflatten(old.blocks(b.flatten(axis + 1)), -1, (-1, *b.shape[axis + 2 :]))
    rows = torch.unflatten(a, axis, (old.count, -1)).unbind(axis)
    of_slice = dict(zip([name for name, _ in old.slices], rows, strict=True))
    # A slice that the pair did not have gets zeros in A and in B.
    grown = [of_slice.get(name, torch.zeros_like(rows[0])) for name, _ in new.slices]
    return torch.cat(grown, axis), new.pick(old.spread(b, axis), axis)


def relative_error(low_rank: LowRank, found: Pair, wanted: Pair) -> float:
    """Return the distance of two pairs' deltas over the length of the wanted one (Frobenius norms)."""
    distance, length = _norm(low_rank, *concatenated(low_rank, [found, (wanted[0], -wanted[1])])), _norm(low_rank, *wanted)
    # Of terms that cancel each other nothing but rounding is left, and an error relative to that means nothing.
    rounding = 16 * torch.finfo(wanted[0].dtype).eps * float(wanted[0].norm() * wanted[1].norm())
    if distance <= rounding:
        return 0.0
    return distance / length if length > rounding else math.inf


def _norm(low_rank: LowRank, a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of a pair's delta. Shape: a and b at any rank."""
    squares = 0.0
    for rows, columns in _matrices(low_rank, a, b):
        # With B = Q S and A^T = P T, |B A| = |S T^T|: multiplying by Q or P changes no length.
        s, t = (torch.linalg.qr(matrix, mode="r")[1] for matrix in (columns, rows.mT))
        squares += float((s @ t.mT).square().sum())
    return math.sqrt(squares)


def _matrices(low_rank: LowRank, a: Tensor, b: Tensor) -> list[Pair]:
    """Return A (..., rank, in) and B (..., out, rank) of each slice; groups and leading indices are leading axes."""
    p, layout = low_rank.projection, low_rank.layout
    if p.kind == "conv":
        a, b = a.flatten(1), b.flatten(1)
    if p.groups > 1:
        return [(torch.unflatten(a, 0, (p.groups, -1)), torch.unflatten(b, 0, (p.groups, -1)))]
    rows = torch.unflatten(a, -2, (layout.count, -1)).unbind(-3)
    columns = [own.movedim(0, -2) for own in layout.split(b.movedim(-2, 0))]
    return list(zip(rows, columns, strict=True))


def _joined(low_rank: LowRank, pairs: Sequence[Pair]) -> Pair:
    """Return the pair of which these are the matrices: undo `_matrices`."""
    if low_rank.projection.groups > 1:
        ((a, b),) = pairs
    else:
        a = torch.cat([one for one, _ in pairs], -2)
        b = low_rank.layout.gather([one.movedim(-2, 0) for _, one in pairs]).movedim(0, -2)
    return a.reshape(low_rank.a_shape), b.reshape(low_rank.b_shape)


def _truncated(matrix: Tensor, rank: int) -> Pair:
    """Find the nearest product B A of this rank. Shape: matrix (..., out, in), A (..., rank, in), B (..., out, rank)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    # Half of each singular value to each side, so that A and B are of about one size.
    root = s[..., :rank].sqrt()
    a, b = root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)
    missing = rank - root.shape[-1]
    if missing > 0:
        a = F.pad(a, (0, 0, 0, missing))
        b = F.pad(b, (0, missing))
    return a, b
