"""VeRA as a method."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..config.settings import AdapterConfig, Probability, Size, Targets
from ..nn.functional.slices import SliceLayout
from ..nn.vera import VeRA as VeRAModule
from ..nn.vera import VeRABases
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from ..placement.weights import projection_at

__all__ = ["VeRA", "VeRAConfig"]


class VeRAConfig(AdapterConfig):
    """A low-rank change of a weight by random matrices that all sites share, frozen, with trained vectors between them.

    Args:
        targets: Linear layers, or Parameters of two axes; the paper adapts query and value.
        rank: Inner width; 256 is the paper's for RoBERTa-large.
        initial: What the vector between the matrices starts as; the other one starts at zero.
        dropout: Probability of dropping an input feature in training. Not at Parameters, whose input is not seen.

    Every other setting: see `AdapterConfig`. The random matrices are saved with the adapter.

    Reference: Kopiczko et al. 2024, arXiv:2310.11454.
    """

    at_start: ClassVar[tuple[str, ...]] = ("initial",)
    in_training: ClassVar[tuple[str, ...]] = ("dropout",)

    method: Literal["vera"] = "vera"
    targets: Targets = Field(default=("@attention.q", "@attention.v"), min_length=1)
    rank: Size = 256
    initial: Annotated[float, Field(gt=0)] = 0.1
    dropout: Probability = 0.0


class VeRA:
    """Trained vectors between random matrices."""

    name = "vera"
    config_type = VeRAConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"vera": {}}

    def placements(self, config: VeRAConfig) -> tuple[Placement, ...]:
        """Place modules at the targets' weights."""
        return (Placement(level="projection", reads="own_input"),)

    def shared(self, config: VeRAConfig, sites: Sequence[SiteSpec], *, dtype: torch.dtype) -> VeRABases:
        """Build matrices as large as the largest site."""
        # A site of fewer features takes the first columns of A and rows of B; a slice counts as a layer of its own.
        most_in = max(site.input_width for site in sites)
        most_out = max(max(SliceLayout(site.width, site.slices).sizes() or [site.width]) for site in sites)
        return VeRABases(config.rank, most_in, most_out, dtype=dtype)

    def build(self, config: VeRAConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> VeRAModule:
        """Build the vectors of one site."""
        projection = projection_at(site, host)
        return VeRAModule(
            projection, config.rank, initial=config.initial, dropout=config.dropout, slices=site.slices, dtype=dtype
        )
