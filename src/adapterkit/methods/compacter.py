"""Compacter and Compacter++ as a method: from config and site to module."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..config.settings import Int, Size
from ..errors import ConfigError
from ..nn.compacter import CompacterAdapter, CompacterInit, SharedFactors
from ..nn.functional.non_linearities import NonLinearity
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from .bottleneck import AnyBottleneckConfig, bottleneck_options, bottleneck_placement, bottleneck_size

__all__ = ["Compacter", "CompacterConfig"]


class CompacterConfig(AnyBottleneckConfig):
    """A bottleneck whose projections are sums of Kronecker products: W = sum_k kron(P_k, L_k R_k), k = 1 … phm_dim.

    P, the rule, is (phm_dim, phm_dim, phm_dim) and shared; a projection's own are L (phm_dim, in / phm_dim, phm_rank), R
    (phm_dim, phm_rank, out / phm_dim) and its bias. Sizes that phm_dim does not divide are rounded up: the bottleneck is
    that much wider, and of the site, features that are not there read as zero and are not written.

    Args:
        reduction_factor: As of `BottleneckConfig`, but 32 if neither this nor `bottleneck_size` is given.
        non_linearity: The function in the middle.
        phm_dim: Number of Kronecker products in a sum, and the size of the rule.
        phm_rank: Inner width of a block L_k R_k. None: blocks that are not factorised.
        shared_rule: One rule for both projections of every site; otherwise each projection has its own.
        shared_factors: L and R are the same at every site, too, whose widths must then be equal; biases are not.
        init: "lora" (rule normal, 0.1; L and R Glorot-uniform, but the up-projection's R zero: a new adapter is the
            identity) or "compacter" (the paper's: rule normal, 0.0001; L and R Glorot-uniform: near the identity).

    Every other setting: see `BottleneckConfig`. The paper trains the host's layer norms as well: put norm tuning beside it
    in a union for that.

    Reference: Mahabadi et al. 2021, arXiv:2106.04647; PHM: Zhang et al. 2021, arXiv:2102.08597.
    """

    default_reduction_factor: ClassVar[float] = 32.0

    method: Literal["compacter"] = "compacter"
    non_linearity: NonLinearity = "gelu"
    phm_dim: Annotated[Int, Field(ge=1, le=256)] = 4
    phm_rank: Size | None = 1
    shared_rule: bool = True
    shared_factors: bool = False
    init: CompacterInit = "lora"


class Compacter:
    """Bottlenecks made of small factors, most of them shared."""

    name = "compacter"
    config_type = CompacterConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "compacter": {"targets": ("@sublayer.out",)},
        "compacter++": {"targets": ("@block.last",), "at": "sum"},
    }

    def placements(self, config: CompacterConfig) -> tuple[Placement, ...]:
        """Place modules as a bottleneck's."""
        return (bottleneck_placement(config),)

    def shared(self, config: CompacterConfig, sites: Sequence[SiteSpec], *, dtype: torch.dtype) -> nn.Module | None:
        """Build the rule, the factors, or both; None where each site has its own."""
        if not (config.shared_rule or config.shared_factors):
            return None
        # The rule is (phm_dim, phm_dim, phm_dim) whatever a site's widths are; factors are as large as the site.
        return SharedFactors(
            config.phm_dim,
            rule=config.shared_rule,
            sizes=_common_sizes(config, sites) if config.shared_factors else None,
            rank=config.phm_rank,
            init=config.init,
            dtype=dtype,
        )

    def build(self, config: CompacterConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> CompacterAdapter:
        """Build a Compacter of the site's width."""
        return CompacterAdapter(
            site.width,
            bottleneck_size(config, site),
            phm_dim=config.phm_dim,
            rank=config.phm_rank,
            shared_rule=config.shared_rule,
            shared_factors=config.shared_factors,
            init=config.init,
            dtype=dtype,
            **bottleneck_options(config, site),
        )


def _common_sizes(config: CompacterConfig, sites: Sequence[SiteSpec]) -> tuple[int, int, int]:
    """Return (input, bottleneck, output) of every site. Raise ConfigError unless they are the same."""
    # Widths are the keys, so that equal sites fall together; of each the last path stays, to be named in the message.
    found = {(site.input_width, bottleneck_size(config, site), site.width): site.path for site in sites}
    if len(found) > 1:
        listed = ", ".join(f"{' -> '.join(map(str, sizes))} at {path!r}" for sizes, path in list(found.items())[:3])
        raise ConfigError(
            f"shared_factors=True needs the same widths at every site; found {listed}. Leave out sites with exclude=, or "
            "share the rule alone (shared_factors=False)"
        )
    return next(iter(found))
