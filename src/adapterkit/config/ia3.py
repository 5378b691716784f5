"""Settings of IA3."""

from typing import Literal

from pydantic import Field

from .base import AdapterConfig, Targets

__all__ = ["IA3Config"]


class IA3Config(AdapterConfig):
    """Scale activations by trained vectors, one at first: keys and values, and what is between the feed-forward's layers.

    Args:
        targets: Projections whose output is scaled; the papers': the attention's key and value. Of a projection that is
            fused for query, key and value, the role names a slice.
        feedforward_targets: Projections whose input is scaled: the last of each feed-forward. () for none.

    Every other setting: see `AdapterConfig`.

    Reference: Liu et al. 2022, arXiv:2205.05638.
    """

    method: Literal["ia3"] = "ia3"
    targets: Targets = Field(default=("@attention.k", "@attention.v"), min_length=1)
    feedforward_targets: Targets = ("@feedforward.last",)
