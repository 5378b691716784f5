"""Invertible adapters as a method: one coupling, behind the embedding and, undone, before the output embedding."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..config.settings import Targets, TensorConfig
from ..errors import TargetError
from ..nn.functional.non_linearities import NonLinearity
from ..nn.invertible import Coupling, CouplingKind, InvertibleAdapter
from ..placement.patterns import is_role
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from .bottleneck import Factor

__all__ = ["Invertible", "InvertibleConfig"]


class InvertibleConfig(TensorConfig):
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

    Every other setting: see `TensorConfig`.

    Reference: Pfeiffer et al. 2020, arXiv:2005.00052, section 4; NICE: Dinh et al. 2015, arXiv:1410.8516; GLOW: Kingma
    and Dhariwal 2018, arXiv:1807.03039.
    """

    method: Literal["invertible"] = "invertible"
    targets: Targets = Field(default=("@embedding",), min_length=1)
    output_targets: Targets = ("@output_embedding",)
    block: CouplingKind = "nice"
    reduction_factor: Factor = 2.0
    non_linearity: NonLinearity = "relu"


class Invertible:
    """NICE and GLOW couplings of an embedding's features."""

    name = "invertible"
    config_type = InvertibleConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"invertible": {}}

    def placements(self, config: InvertibleConfig) -> tuple[Placement, ...]:
        """Place modules behind the embedding, and before the output embedding, which a model need not have."""
        forward, targets = Placement(tag="forward"), tuple(config.output_targets)
        if not targets:
            return (forward,)
        # The role is the default: a model without an output embedding is right to have none. A pattern was written by hand.
        return forward, Placement(at="input", targets=targets, is_optional=all(map(is_role, targets)), tag="inverse")

    def shared(self, config: InvertibleConfig, sites: Sequence[SiteSpec], *, dtype: torch.dtype) -> Coupling:
        """Build the coupling. Raise TargetError where its sites have different widths."""
        widths = {site.width: site.path for site in sites}
        if len(widths) > 1:
            listed = ", ".join(f"{width} at {path!r}" for width, path in widths.items())
            raise TargetError(
                f"an invertible adapter needs one width at all of its places; found {listed}. Name them by targets= and "
                "output_targets=, or leave some out with exclude="
            )
        return Coupling(
            sites[0].width,
            block=config.block,
            reduction_factor=config.reduction_factor,
            non_linearity=config.non_linearity,
            dtype=dtype,
        )

    def build(self, config: InvertibleConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> InvertibleAdapter:
        """Build the module that runs the coupling, in the site's direction."""
        # The tags that `placements` gave.
        direction: Literal["forward", "inverse"] = "inverse" if site.tag == "inverse" else "forward"
        # A head with a vocabulary undoes the coupling as well, unless the config says that nothing does.
        return InvertibleAdapter(direction, is_undone=bool(config.output_targets))
