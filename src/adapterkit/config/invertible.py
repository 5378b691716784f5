"""Settings of invertible adapters."""

from typing import Literal

from pydantic import Field

from ..modules.invertible import Block
from ..ops.activations import NonLinearity
from .base import ActivationConfig, Targets
from .bottleneck import Factor

__all__ = ["InvertibleConfig"]


class InvertibleConfig(ActivationConfig):
    """An invertible map of the embeddings, undone before the output embedding: the language part of MAD-X.

    Each half of the features is changed by a two-layer network of the other half. Where the model has an output embedding
    (a language model's last projection), what enters it goes through the exact inverse.

    All places share one coupling. An encoder-decoder whose stacks have an embedding each has it behind both, which is
    what one shared embedding asks for; the inverse is before the decoder's output embedding. Widths must be equal.

    Args:
        targets: Modules behind which the coupling is.
        output_targets: Modules before which its inverse is. The role matches nothing in a model without an output
            embedding, and that is no error; a pattern must match. () for none: the coupling is not undone.
        block: "nice" (additive coupling) or "glow" (affine coupling).
        reduction_factor: Half the embedding's width / inner width of the networks.
        non_linearity: The function between their layers.

    Every other setting: see `ActivationConfig`.

    Reference: Pfeiffer et al. 2020, arXiv:2005.00052, section 4; NICE: Dinh et al. 2015, arXiv:1410.8516; GLOW: Kingma
    and Dhariwal 2018, arXiv:1807.03039.
    """

    method: Literal["invertible"] = "invertible"
    targets: Targets = Field(default=("@embedding",), min_length=1)
    output_targets: Targets = ("@output_embedding",)
    block: Block = "nice"
    reduction_factor: Factor = 2.0
    non_linearity: NonLinearity = "relu"
