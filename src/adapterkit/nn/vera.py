"""VeRA: a low-rank update whose matrices are random and shared by all sites; only vectors are trained."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .functional.projections import Projection, check_has_input
from .functional.slices import SliceLayout, Slices

__all__ = ["VeRA", "VeRABases"]


class VeRABases(nn.Module):
    """The frozen random matrices of one adapter: A (rank, max_in) and B (max_out, rank), Kaiming-uniform.

    Buffers, not parameters: they are saved and moved, never trained.

    Args:
        rank: Inner width.
        max_in: The most input features that a site has; a site with fewer takes the first columns of A.
        max_out: The most output features that a site, or a slice of one, has; others take the first rows of B.
        dtype: What the buffers are.

    Raises:
        ConfigError: rank is not positive.
    """

    vera_A: Tensor  # noqa: N815  # the paper's letters
    vera_B: Tensor  # noqa: N815  # as well

    def __init__(self, rank: int, max_in: int, max_out: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"rank={rank} is not positive")
        self.register_buffer("vera_A", torch.empty(rank, max_in, dtype=dtype))
        self.register_buffer("vera_B", torch.empty(max_out, rank, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both matrices anew, from torch's current random generator."""
        nn.init.kaiming_uniform_(self.vera_A)
        nn.init.kaiming_uniform_(self.vera_B)

    def forward(self) -> None:
        """Raise: each site reads the matrices, none calls this. Shape: none."""
        raise NotImplementedError("the bases of VeRA are read, not called")


class VeRA(nn.Module):
    """Compute what a random low-rank update, scaled by trained vectors, adds to a projection's output.

        delta = lambda_b * (B (lambda_d * (A dropout(z))))

    A and B are those of `self.shared`, a `VeRABases` that is set after construction, before the first call. For a bare
    Parameter, `adapted` gives the updated weight instead.

    Args:
        projection: The host's weight: linear (either way round), or a Parameter of two axes.
        rank: Inner width, that of the bases.
        initial: What `lambda_d` starts as.
        dropout: Probability of dropping an input feature in training, in [0, 1).
        slices: Slices of a fused projection; each is adapted as a layer of its own would be, with the first rows of B. ()
            for the whole.
        dtype: What the parameters are.

    Shape:
        z: (..., in), x and the result: (..., out)

    Raises:
        ConfigError: the projection is of another kind; rank is not positive; dropout for a Parameter.

    Reference: Kopiczko et al. 2024, arXiv:2310.11454; `lambda_b` starts at zero, so a new adapter is the identity.
    """

    shared: VeRABases

    def __init__(
        self,
        projection: Projection,
        rank: int,
        *,
        initial: float = 0.1,
        dropout: float = 0.0,
        slices: Slices = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if projection.kind not in ("linear", "parameter") or len(projection.shape) != 2:
            raise ConfigError(
                f"VeRA adapts linear layers; found {projection.kind}, weight {projection.shape}; use LoRA there"
            )
        check_has_input(projection, dropout=dropout)
        if rank < 1:
            raise ConfigError(f"rank={rank} is not positive")
        self.projection, self.rank, self.initial, self.dropout = projection, rank, initial, dropout
        self.layout = SliceLayout(projection.out_features, slices)
        self.lambda_d = nn.Parameter(torch.empty(self.layout.count, rank, dtype=dtype))
        self.lambda_b = nn.Parameter(torch.empty(self.layout.covered, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise `lambda_d` as `initial` says, and `lambda_b` as zeros."""
        nn.init.constant_(self.lambda_d, self.initial)
        nn.init.zeros_(self.lambda_b)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        return self.lambda_b.dtype

    def forward(self, z: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """Return the delta for the host's output. Shape: as x."""
        if self.dropout and self.training:
            z = F.dropout(z, self.dropout)
        h = F.linear(z, self._a())  # (..., rank)
        h = (h.unsqueeze(-2) * self.lambda_d).flatten(-2)  # (..., slices * rank)
        return F.linear(h, self._b())

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the scaled A and B, as a LoRA's with these slices. Shape: (slices * rank, in) and (covered, rank)."""
        return (self.lambda_d.unsqueeze(-1) * self._a()).flatten(0, 1), self._rows()

    def weight_delta(self) -> Tensor:
        """Return what is added to the host's weight. Shape: as the weight."""
        a, b = self.pair()
        delta = self.layout.blocks(b) @ a
        return delta.t() if self.projection.out_axis == 1 else delta

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the updated weight, in the dtype of the one given. Shape: as the weight."""
        return (weight + self.weight_delta()).to(weight.dtype)

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the host's tensors that change if the adapter is merged into them: the weight."""
        return {"weight": self.adapted(tensors["weight"])}

    def _a(self) -> Tensor:
        """Return A of this site. Shape: (rank, in)."""
        # The bases lie where the first site does, in its dtype; this one may be on another device.
        return self.shared.vera_A[:, : self.projection.in_features].to(self.lambda_d)

    def _b(self) -> Tensor:
        """Return B of this site, scaled by `lambda_b`, each slice in its own columns. Shape: (out, slices * rank)."""
        return self.layout.blocks(self._rows())

    def _rows(self) -> Tensor:
        """Return B of the features that the slices cover, scaled by `lambda_b`. Shape: (covered, rank)."""
        b = self.shared.vera_B.to(self.lambda_b)
        # Every slice starts at the first row of B, as a layer of its own would: q and v of 64 features both take b[:64].
        rows = self.layout.gather([b[:size] for size in self.layout.sizes()])
        return rows * self.lambda_b.unsqueeze(-1)

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"{self.projection.in_features} -> {self.rank} -> {self.projection.out_features}"
