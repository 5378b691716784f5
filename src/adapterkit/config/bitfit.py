"""Settings of BitFit."""

from typing import Literal

from pydantic import Field

from .base import AdapterConfig, Targets

__all__ = ["BitFitConfig"]


class BitFitConfig(AdapterConfig):
    """Train the biases: a trained change, zero at first, is added to each.

    Targets are Parameters, or modules whose biases are meant: `["query"]`, `["LayerNorm.bias"]`; by default every bias of
    the model. A model without any is refused.

    Every setting: see `AdapterConfig`.

    Reference: Ben Zaken et al. 2022, arXiv:2106.10199.
    """

    method: Literal["bitfit"] = "bitfit"
    targets: Targets = Field(default=("**",), min_length=1)
