"""Settings of norm tuning."""

from typing import Literal

from pydantic import Field

from .base import AdapterConfig, Targets

__all__ = ["NormTuningConfig"]


class NormTuningConfig(AdapterConfig):
    """Train the weights and biases of norms: a trained change, zero at first, is added to each.

    Targets are norms or their Parameters; by default every norm of the model.

    Every setting: see `AdapterConfig`.

    Reference: Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models",
    arXiv:2211.08682; Zhao et al. 2024, arXiv:2312.11420.
    """

    method: Literal["norm_tuning"] = "norm_tuning"
    targets: Targets = Field(default=("**",), min_length=1)
