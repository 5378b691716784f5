"""A product of two thin tensors in place of a weight: its shapes, its forward, and the weight that it stands for."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import CompatibilityError, ConfigError
from .projections import Projection, convolve, pointwise
from .slices import SliceLayout, Slices

__all__ = ["LowRank"]


class LowRank:
    """The low-rank map B A in the geometry of a projection, for tensors A and B that the caller holds.

    `up(down(z, A), B)` is what the projection would return with the weight `delta(A, B)` and no bias.

    - linear: A (slices * rank, in), B (covered, rank); the weight is B A, transposed where the host's is.
    - conv: A has the host's kernel, stride, padding and dilation; B has a kernel of 1. With groups both are grouped:
      each group has its own pair of rank / groups, rounded up (a rank below the number of groups is one for each).
    - embedding: A (slices * rank, vocabulary), looked up; B (covered, rank).
    - parameter: A (..., slices * rank, in), B (..., covered, rank), one pair for each index of the leading axes.

    Args:
        projection: The host's geometry.
        rank: Of each slice; with groups, of all groups together.
        slices: Slices of the output features, each with its own rows of A and B; () for the whole.

    Raises:
        ConfigError: rank is not positive; slices of a grouped conv; an embedding with max_norm, whose rows change as they
            are looked up.
    """

    def __init__(self, projection: Projection, rank: int, slices: Slices = ()) -> None:
        if rank < 1:
            raise ConfigError(f"rank={rank} is not positive")
        if slices and projection.groups > 1:
            raise ConfigError(f"a conv with groups={projection.groups} has no slices; found {[name for name, _ in slices]}")
        if projection.max_norm is not None:
            raise ConfigError(
                f"an embedding with max_norm={projection.max_norm} changes its rows as they are looked up; set its "
                "max_norm to None, or leave it out of the targets"
            )
        self.projection, self.rank = projection, rank
        self.layout = SliceLayout(projection.out_features, slices)
        self.rank_of_each = -(-rank // projection.groups)  # rounded up

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Return the shape of A."""
        p, rows = self.projection, self.layout.count * self.projection.groups * self.rank_of_each
        if p.kind == "parameter":
            return (*p.shape[:-2], rows, p.in_features)
        return (rows, p.in_features // p.groups, *p.kernel)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Return the shape of B."""
        lead = self.projection.shape[:-2] if self.projection.kind == "parameter" else ()
        return (*lead, self.layout.covered, self.rank_of_each, *(1 for _ in self.projection.kernel))

    def down(self, z: Tensor, a: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Apply A to the host's input, features of which are dropped with this probability.

        Shape: z (..., in), (batch, in, *spatial) or ids (...); result (..., rank) or (batch, rank, *spatial).
        """
        p = self.projection
        if p.kind == "embedding":
            h = F.embedding(z, a.t(), p.padding_idx, scale_grad_by_freq=p.scale_grad_by_freq)  # (..., slices * rank)
            # Ids are one-hot rows, each with a single feature to drop.
            return h * F.dropout(torch.ones_like(h[..., :1]), dropout) if dropout else h
        if dropout:
            z = F.dropout(z, dropout)
        if p.kind == "conv":
            return convolve(p, z, a)
        if a.dim() > 2:
            raise CompatibilityError(f"a weight of shape {p.shape} is adapted in place; there is no input to apply it to")
        return F.linear(z, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Apply B. Shape: h as `down` returns it, result (..., out) or (batch, out, *spatial); zero outside the slices."""
        p = self.projection
        if p.kind != "conv":
            return F.linear(h, self.layout.blocks(b))
        # B's kernel is 1 on every axis: flat it is a matrix, (covered, rank).
        return pointwise(h, self.layout.blocks(b.flatten(1)), spatial=len(p.kernel), groups=p.groups)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the weight that the pair stands for. Shape: as the host's weight."""
        p = self.projection
        if p.kind == "conv":
            b = torch.unflatten(self.layout.blocks(b.flatten(1)), 0, (p.groups, -1))  # (groups, out / groups, rank)
            a = torch.unflatten(a.flatten(1), 0, (p.groups, -1))  # (groups, rank, in / groups * kernel)
            return (b @ a).reshape(p.shape)
        weight = self.layout.blocks(b) @ a  # (..., out, in)
        return weight.t() if p.out_axis == 1 else weight

    def over_outputs(self, values: Tensor) -> Tensor:
        """View one value for each output feature so that it multiplies the host's weight. Shape: (..., out) -> as it."""
        p = self.projection
        if p.kind == "parameter":
            return values.unsqueeze(-1)
        shape = [1] * len(p.shape)
        shape[p.out_axis] = -1
        return values.view(shape)

    def over_channels(self, values: Tensor) -> Tensor:
        """View one value for each output feature so that it multiplies the host's output. Shape: (out, 1...)."""
        return values.view(-1, *(1 for _ in self.projection.kernel))
