"""IA3: a trained vector that scales the features of a tensor."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import CompatibilityError, ConfigError
from .functional.projections import Projection
from .functional.slices import SliceLayout, Slices

__all__ = ["IA3"]


class IA3(nn.Module):
    """Compute what scaling each feature by a trained factor l adds to a tensor: x * (l - 1).

    Args:
        width: Features of the tensor at the site.
        scales: Whether that tensor is the host's "output" or its "input".
        projection: The host's weight and geometry, for merging; None for a host that is no projection.
        slices: Slices of the features, of which alone there are factors; () for all.
        dtype: What the parameter is.

    Shape:
        z (not read), x and the result: (..., width)

    Raises:
        ConfigError: the input of an embedding, which is ids; a width that is not the projection's.

    Reference: Liu et al. 2022, arXiv:2205.05638. l starts at one: a new adapter is the identity.
    """

    def __init__(
        self,
        width: int,
        *,
        scales: Literal["output", "input"] = "output",
        projection: Projection | None = None,
        slices: Slices = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if projection is not None:
            _check(projection, width, scales)
        self.scales, self.projection = scales, projection
        self.layout = SliceLayout(width, slices)
        self.ia3_l = nn.Parameter(torch.empty(self.layout.covered, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all factors as ones."""
        nn.init.ones_(self.ia3_l)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        return self.ia3_l.dtype

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the delta for the site. Shape: z, x and result (..., width)."""
        # `spread` fills with zeros: outside the slices a factor of 1 is a difference of 0.
        return x * self.layout.spread(self.ia3_l - 1)

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the weight of a bare Parameter, scaled, in the dtype of the one given. Shape: as the weight."""
        return self.merged({"weight": weight})["weight"].to(weight.dtype)

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the host's tensors that merging changes: the weight and, where the output is scaled, the bias.

        Raises:
            CompatibilityError: the host is no projection, or its rows change as they are looked up.
        """
        projection, weight = self.projection, tensors["weight"]
        if projection is None:
            raise CompatibilityError(
                f"IA3 at a module that is no projection has no weight to be merged into: it scales {self.layout.width} "
                f"features of the module's {self.scales}. Activate it beside the module instead"
            )
        if projection.max_norm is not None:
            raise CompatibilityError(f"an embedding with max_norm={projection.max_norm} would shorten the scaled rows")
        factors = 1 + self.layout.spread(self.ia3_l - 1)  # (width,)
        if self.scales == "input":
            return {"weight": weight * self._over_inputs(factors, projection)}
        shape = [1] * weight.dim()
        shape[projection.out_axis] = -1
        merged = {"weight": weight * factors.view(shape)}
        # The bias is part of the output that l scales.
        return {**merged, "bias": tensors["bias"] * factors} if "bias" in tensors else merged

    @staticmethod
    def _over_inputs(factors: Tensor, projection: Projection) -> Tensor:
        """View the factors of a host's input so that they multiply its weight. Shape: (in,) -> as the weight."""
        if projection.kind != "conv":
            shape = [1] * len(projection.shape)
            shape[projection.in_axis] = -1
            return factors.view(shape)
        # The outputs of one group see the inputs of that group only.
        each = factors.view(projection.groups, -1).repeat_interleave(projection.out_features // projection.groups, 0)
        return each.view(*each.shape, *(1 for _ in projection.kernel))  # (out, in / groups, 1, ...)

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"{self.layout.width}, scales={self.scales!r}"


def _check(projection: Projection, width: int, scales: Literal["output", "input"]) -> None:
    """Refuse what the projection's tensor cannot be."""
    if scales == "input" and projection.kind == "embedding":
        raise ConfigError(
            f"the input of an embedding is ids, which cannot be scaled; found scales={scales!r} for an embedding of "
            f"{projection.in_features} ids. Scale its output"
        )
    expected = projection.out_features if scales == "output" else projection.in_features
    if width != expected:
        raise ConfigError(f"the {scales} of this {projection.kind} has {expected} features; found width={width}")
