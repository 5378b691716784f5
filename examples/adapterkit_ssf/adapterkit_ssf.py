"""Scaling and shifting features (SSF, Lian et al. 2022, arXiv:2210.08823): a method of adapterkit in a package of its own.

    kit.add("birds", "ssf")                                          # the preset
    kit.add("birds", SSFConfig(targets=["@attention.last"], seed=0))   # or its config

A method is a config, a module and a class that makes modules of configs. This is all of it: matching, attaching, freezing,
saving, loading, merging and verifying are adapterkit's.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterkit.methods import AdapterConfig, Placement, SiteSpec, Targets, projection_at

__all__ = ["SSFConfig", "ScaleAndShift", "ScaleShift"]


class SSFConfig(AdapterConfig):
    """Scale and shift what linear and convolutional layers return; the paper: every one, so name more to come closer.

    Every setting: see `adapterkit.methods.AdapterConfig`.

    Reference: Lian et al. 2022, arXiv:2210.08823.
    """

    method: Literal["ssf"] = "ssf"
    targets: Targets = Field(default=("@attention.last", "@feedforward.last"), min_length=1)


class ScaleShift(nn.Module):
    """Compute what y = gamma * x + beta adds to x. gamma starts at one, beta at zero: a new adapter is the identity.

    Shape:
        z (not read), x and the result: (..., width)
    """

    def __init__(self, width: int, out_axis: int, axes: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_axis, self.axes = out_axis, axes
        self.scale_delta = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(width, dtype=dtype))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the adapter computes in."""
        return self.shift.dtype

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the delta. Shape: (..., width)."""
        return x * self.scale_delta + self.shift

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The host's weight and bias with the adapter in them."""
        gamma = 1 + self.scale_delta
        along_weight = gamma.view([-1 if axis == self.out_axis else 1 for axis in range(self.axes)])
        return {"weight": tensors["weight"] * along_weight, "bias": tensors["bias"] * gamma + self.shift}


class ScaleAndShift:
    """SSF as a method."""

    name = "ssf"
    config_type = SSFConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ssf": {}}
    neutral = 0.0  # what a parameter that changes nothing is: adapters are combined by sums

    def placements(self, config: SSFConfig) -> tuple[Placement, ...]:
        """On what the targets return."""
        return (Placement(level="projection"),)

    def build(self, config: SSFConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> ScaleShift:
        """A scale and a shift for each feature of the site."""
        projection = projection_at(site, host)
        return ScaleShift(site.width, projection.out_axis, len(projection.shape), dtype=dtype)
