"""LoRA and DoRA as a method: from config and site to module."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..config.settings import AdapterConfig, Int, Probability, Size, Targets, check_map, number_by_place
from ..errors import TargetError
from ..nn.dora import DoRA, magnitude_of
from ..nn.functional.projections import Projection, project, random_input
from ..nn.lora import LoRA as LoRAModule
from ..nn.lora import LoRAInit
from ..placement.layers import setting_at
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from ..placement.weights import projection_at
from ..runtime.site import AdapterSite
from ..structure.hosts import described_projection
from ..structure.paths import SITE

__all__ = ["LoRA", "LoRAConfig", "base_weight", "check_multiplies"]

Alpha = Annotated[float, Field(gt=0)]


class LoRAConfig(AdapterConfig):
    """A low-rank change of a weight: W + scaling * B A, with A (rank, in) and B (out, rank).

    The scaling is alpha / rank. Targets are linear, convolutional and embedding layers, Parameters of two or more axes (the
    projections of nn.MultiheadAttention, experts of a mixture), or roles: of a projection that is fused for query, key and
    value, `"@attention.q"` is the query's slice. The papers adapt the attention's query and value; rank and alpha are
    those of the first one for RoBERTa.

    Args:
        rank: Inner width. A map `{"default": 8, "layer.0.**": 16}` sets it by pattern or layer; the longest that fits wins.
        alpha: Numerator of the scaling; a map as well.
        use_rslora: Scale by alpha / sqrt(rank) instead, which keeps large ranks stable.
        use_dora: Weight-decomposed: the changed weight is brought to trained lengths, one for each output feature.
        dropout: Probability of dropping an input feature of A in training. Not at Parameters, whose input is not seen.
        bias: Train a bias with it (of a host that has none: it cannot be merged).
        gating: A trained gate in (0, 1) for each row; it cannot be merged.
        batch_axis: The axis of rows, for the gate; if not given it is the first one, which is checked.
        init: "lora" (A Kaiming-uniform, B zero) or "gaussian" (A normal, B zero); of an embedding A is the zero one.

    Every other setting: see `AdapterConfig`.

    Reference: Hu et al. 2022, arXiv:2106.09685; rank-stabilised: Kalajdzievski 2023, arXiv:2312.03732; DoRA: Liu et al.
    2024, arXiv:2402.09353; gating: Mao et al. 2022, arXiv:2110.07577.
    """

    by_row: ClassVar[tuple[str, ...]] = ("gating",)
    at_start: ClassVar[tuple[str, ...]] = ("init",)
    in_training: ClassVar[tuple[str, ...]] = ("dropout",)

    method: Literal["lora"] = "lora"
    targets: Targets = Field(default=("@attention.q", "@attention.v"), min_length=1)
    rank: Annotated[
        Size | Annotated[dict[str, Size], AfterValidator(check_map)],
        Field(description=number_by_place("a whole number of 1 or more", "8")),
    ] = 8
    alpha: Annotated[
        Alpha | Annotated[dict[str, Alpha], AfterValidator(check_map)],
        Field(description=number_by_place("a number above 0", "8")),
    ] = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    dropout: Probability = 0.0
    bias: bool = False
    gating: bool = False
    batch_axis: Annotated[Int, Field(ge=0)] | None = None
    init: LoRAInit = "lora"

    @model_validator(mode="after")
    def _check(self) -> "LoRAConfig":
        if self.use_dora and (self.gating or self.bias):
            raise ValueError(
                f"use_dora=True changes a weight's direction and length; gating={self.gating} and bias={self.bias} are "
                "LoRA's alone"
            )
        return self


class LoRA:
    """Low-rank changes of weights, plain, rank-stabilised and weight-decomposed."""

    name = "lora"
    config_type = LoRAConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lora": {}, "dora": {"use_dora": True}}

    def placements(self, config: LoRAConfig) -> tuple[Placement, ...]:
        """Place modules at the targets' weights."""
        return (Placement(level="projection", reads="own_input"),)

    def build(self, config: LoRAConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Build a pair of factors for the host's weight, and with DoRA its magnitudes."""
        projection, rank = projection_at(site, host), setting_at(config.rank, site)
        # What LoRA and DoRA take alike.
        both: dict[str, Any] = {
            "scaling": setting_at(config.alpha, site) / (math.sqrt(rank) if config.use_rslora else rank),
            "dropout": config.dropout,
            "init": config.init,
            "slices": site.slices,
            "dtype": dtype,
        }
        if config.use_dora:
            weight = base_weight(site, host)
            check_multiplies(site, host, projection)
            # On the meta device a file brings the magnitudes; there are no values to measure here.
            magnitude = None if weight.is_meta else magnitude_of(projection, weight.to(dtype), slices=site.slices)
            return DoRA(projection, rank, magnitude=magnitude, **both)
        both |= {"bias": config.bias, "gating": config.gating, "batch_axis": config.batch_axis or 0}
        return LoRAModule(projection, rank, **both)


def base_weight(site: SiteSpec, host: nn.Module) -> Tensor:
    """Return the weight at a site, without adapters that are merged into it.

    Raises:
        TargetError: it has no length to measure: quantised, or computed in a way that looking at it would move.
    """
    # A site at a Parameter names it, e.g. ("self_attn.in_proj_weight",); at a layer the weight is meant.
    name = site.parameters[0] if site.parameters else "weight"
    held = host._modules.get(SITE)
    # Another adapter may be merged into the weight: what the site keeps for `unmerge` is the base's own.
    if isinstance(held, AdapterSite) and name in held.originals:
        return held.originals[name].value
    way, _, leaf = name.rpartition(".")
    owner: Any = host.get_submodule(way)
    # Reading the weight must change nothing: one that is computed may move what it is computed from as it is read.
    is_steady = leaf in owner._parameters or leaf in owner._buffers  # a quantised weight may be a buffer
    if not is_steady and is_parametrized(owner, leaf):
        is_steady = not any(True for _ in owner.parametrizations[leaf].buffers())  # spectral norm's move as they are read
    if not is_steady:
        raise TargetError(
            f"the {leaf} of {site.path!r} is computed before each forward, in a way that looking at it would move "
            "(spectral norm) or does not show (legacy weight norm, pruning): it has no length to train from; use LoRA there"
        )
    weight: Tensor = getattr(owner, leaf)
    # Integers that a layer multiplies by scales of its own have no length.
    if not weight.is_floating_point():
        raise TargetError(f"the {leaf} of {site.path!r} is {weight.dtype}, quantised: it has no length; use LoRA there")
    return weight.detach()


@torch.no_grad()
def check_multiplies(site: SiteSpec, host: nn.Module, projection: Projection) -> None:
    """Raise TargetError if a host that is not plainly torch's does more than multiply by its weight and add its bias.

    A layer that a package describes is tried, too: its description may name the axes of the weight the wrong way round.
    """
    # A `forward` that is torch's own is known to multiply and add, and a Parameter is changed itself: nothing to try.
    is_plain = not projection.has_own_forward and described_projection(host) is None
    module: Any = host
    if is_plain or site.parameters or module.weight.is_meta:
        return
    z = random_input(projection, module.weight)
    # `forward`, not a call: hooks of others may change the output, and are not what is asked about.
    found, expected = module.forward(z), project(projection, z, module.weight, getattr(module, "bias", None))
    if not isinstance(found, Tensor) or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise TargetError(
            f"{site.path!r} ({type(host).__name__}) has a forward of its own that does more than multiply by its weight "
            "(it scales, say), so that the change of its weight's length cannot be told from its output; use LoRA there"
        )
