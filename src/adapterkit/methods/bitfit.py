"""BitFit as a method."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..config.settings import AdapterConfig, Targets
from ..nn.parameter_delta import ParameterDelta
from ..placement.rule import Placement
from ..placement.spec import SiteSpec

__all__ = ["BitFit", "BitFitConfig"]


class BitFitConfig(AdapterConfig):
    """Train the biases: a trained change, zero at first, is added to each.

    Targets are Parameters, or modules whose biases are meant: `["query"]`, `["LayerNorm.bias"]`; by default every bias of
    the model. A model without any is refused.

    Every setting: see `AdapterConfig`.

    Reference: Ben Zaken et al. 2022, arXiv:2106.10199.
    """

    method: Literal["bitfit"] = "bitfit"
    targets: Targets = Field(default=("**",), min_length=1)


_BIAS = re.compile(r"(.*_)?bias(_.*)?")  # bias, in_proj_bias, bias_ih_l0


class BitFit:
    """Trained biases."""

    name = "bitfit"
    config_type = BitFitConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"bitfit": {}}
    neutral = 0.0  # a change of zero leaves a bias as it is: see `LinearInParameters`

    def placements(self, config: BitFitConfig) -> tuple[Placement, ...]:
        """Place modules at the targets' biases."""
        return (Placement(level="parameter", accepts=is_bias),)

    def build(self, config: BitFitConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> ParameterDelta:
        """Build the change of one bias."""
        return ParameterDelta(host.get_parameter(site.parameters[0]).shape, dtype=dtype)


def is_bias(_owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a Parameter is a bias: a vector called one."""
    # A table such as Swin's `relative_position_bias_table` is called a bias, too; it has two axes.
    return parameter.dim() == 1 and _BIAS.fullmatch(name) is not None
