"""Settings of VeRA."""

from typing import Annotated, Literal

from pydantic import Field

from .base import AdapterConfig, Probability, Size, Targets

__all__ = ["VeRAConfig"]


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

    method: Literal["vera"] = "vera"
    targets: Targets = Field(default=("@attention.q", "@attention.v"), min_length=1)
    rank: Size = 256
    initial: Annotated[float, Field(gt=0)] = 0.1
    dropout: Probability = 0.0
