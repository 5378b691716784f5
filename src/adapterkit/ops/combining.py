"""Low-rank pairs of one geometry made into one pair: the exact sum, and the nearest pair of a given rank."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .low_rank import LowRank

__all__ = ["concatenated", "factored"]


def concatenated(low_rank: LowRank, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One pair whose delta is the sum of the deltas of the given ones. Weights of a sum belong on the Bs.

    Args:
        low_rank: The geometry; the rank of each pair is read off its tensors.
        pairs: A and B of each, shaped as `low_rank.a_shape` and `b_shape` are at the pair's own rank.

    Shape:
        A and B at a rank that is the sum of the ranks; of groups, each the sum of what it has.
    """
    # The axis of A's rows; B's columns are on the next one. The rows are part by part (or group by group), within a part
    # rank by rank.
    axis = len(low_rank.projection.shape) - 2 if low_rank.projection.kind == "parameter" else 0
    blocks = low_rank.layout.count * low_rank.projection.groups
    rows = [torch.unflatten(a, axis, (blocks, -1)) for a, _ in pairs]
    return torch.cat(rows, axis + 1).flatten(axis, axis + 1), torch.cat([b for _, b in pairs], axis + 1)


def factored(low_rank: LowRank, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The pair nearest to a delta (least squares), by singular values: of each part, group or leading index its own.

    It is exact where the delta has no greater rank. Where a matrix is smaller than the rank, the rest is zeros. The
    delta is taken for zero outside the parts.

    Shape: delta as the host's weight; A and B as `low_rank.a_shape` and `b_shape`.
    """
    p, rank = low_rank.projection, low_rank.rank_of_each
    if p.groups > 1:
        a, b = _truncated(torch.unflatten(delta.flatten(1), 0, (p.groups, -1)), rank)
    else:
        rows = delta.t() if p.kind != "parameter" and p.out_axis == 1 else delta
        rows = rows.flatten(1) if p.kind == "conv" else rows
        rows = low_rank.layout.pick(rows, -2).movedim(-2, 0)  # (covered, ..., in)
        found = [_truncated(own.movedim(0, -2), rank) for own in low_rank.layout.split(rows)]
        a = torch.cat([one for one, _ in found], -2)
        b = low_rank.layout.gather([one.movedim(-2, 0) for _, one in found]).movedim(0, -2)
    return a.reshape(low_rank.a_shape), b.reshape(low_rank.b_shape)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product B A of this rank. Shape: matrix (..., out, in), A (..., rank, in), B (..., out, rank)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :rank].sqrt()
    a, b = root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)
    missing = rank - root.shape[-1]
    if missing > 0:
        a = F.pad(a, (0, 0, 0, missing))
        b = F.pad(b, (0, missing))
    return a, b
