"""Bottleneck adapters as a method: from config and site to module."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import nn

from ..config.settings import Int, Probability, Size, TensorConfig, check_map, number_by_place
from ..errors import ConfigError
from ..nn.bottleneck import BottleneckAdapter, BottleneckInit, BottleneckOptions
from ..nn.functional.non_linearities import NonLinearity
from ..placement.layers import setting_at
from ..placement.rule import Placement
from ..placement.spec import SiteSpec

__all__ = [
    "AnyBottleneckConfig",
    "Bottleneck",
    "BottleneckConfig",
    "bottleneck_options",
    "bottleneck_placement",
    "bottleneck_size",
]

Factor = Annotated[float, Field(gt=0)]


class AnyBottleneckConfig(TensorConfig):
    """The settings of every method that is a bottleneck, whatever its projections are: see `BottleneckConfig`."""

    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (("reduction_factor", "bottleneck_size"),)
    by_row: ClassVar[tuple[str, ...]] = ("gating", "stochastic_depth")
    at_start: ClassVar[tuple[str, ...]] = ("init",)
    in_training: ClassVar[tuple[str, ...]] = ("dropout", "stochastic_depth")
    # Not the field's default: None tells that none was given, so that `bottleneck_size` alone is no contradiction.
    default_reduction_factor: ClassVar[float] = 16.0

    reduction_factor: Annotated[
        Factor | Annotated[dict[str, Factor], AfterValidator(check_map)] | None,
        Field(description=number_by_place("a number above 0", "16")),
    ] = None
    bottleneck_size: Annotated[
        Size | Annotated[dict[str, Size], AfterValidator(check_map)] | None,
        Field(description=number_by_place("a whole number of 1 or more", "64")),
    ] = None
    non_linearity: NonLinearity = "relu"
    at: Literal["output", "input", "renormalised", "sum", "normalised"] = "output"
    placement: Literal["sequential", "parallel"] = "sequential"
    residual: str | None = None
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    residual_before_layer_norm: bool = False
    scaling: Annotated[
        float | Literal["learned", "channel"], Field(description="a finite number, 'learned' or 'channel'")
    ] = 1.0
    batch_axis: Int | None = None
    gating: bool = False
    dropout: Probability = 0.0
    stochastic_depth: Probability = 0.0

    @model_validator(mode="after")
    def _check_one_size(self) -> "AnyBottleneckConfig":
        if self.reduction_factor is not None and self.bottleneck_size is not None:
            raise ValueError(
                f"give reduction_factor or bottleneck_size, not both; found reduction_factor={self.reduction_factor} and "
                f"bottleneck_size={self.bottleneck_size}"
            )
        return self

    @model_validator(mode="after")
    def _check_tensors(self) -> "AnyBottleneckConfig":
        """Refuse settings that name a tensor which the adapter, placed so, neither reads nor changes."""
        if self.at != "output" and (self.placement == "parallel" or self.residual is not None):
            raise ValueError(f"placement='parallel' and residual= need at='output'; found at={self.at!r}")
        if self.input is not None and self.at == "output" and (self.placement == "sequential" or self.residual is not None):
            raise ValueError(
                f"input={self.input!r} names what the adapter reads at its host's input; with at={self.at!r}, "
                f"placement={self.placement!r} and residual={self.residual!r} it reads something else: leave input= out"
            )
        if self.output is not None and self.at != "output":
            raise ValueError(
                f"output={self.output!r} names a tensor that the host returns; with at={self.at!r} none is adapted: leave "
                "output= out"
            )
        return self

    @model_validator(mode="after")
    def _check_norm(self) -> "AnyBottleneckConfig":
        if self.residual_before_layer_norm and not self.layer_norm_after:
            raise ValueError("residual_before_layer_norm=True needs layer_norm_after=True; found layer_norm_after=False")
        return self


class BottleneckConfig(AnyBottleneckConfig):
    """A bottleneck at each target: project down, non-linearity, project up, add.

    With `x` the tensor at the site and `f` the bottleneck, the placements are

        at="output"                        x + f(x)         after a module: Houlsby; a whole pre-LN block: Pfeiffer
        at="input"                         x + f(x)         before a module, on its input
        at="renormalised"                  x + f(norm(x))   on the input of a norm: Pfeiffer in a post-LN block
        placement="parallel"               x + f(input)     beside a module: reads the module's own input
        residual="ln_2"                    x + f(x + r)     r is the input of the nearest module with that name
        placement="parallel", residual=…   x + f(r)         the parallel adapter that reads the residual stream
        at="sum"                           s + f(LN(s))     after the residual addition s = x + r that x is a branch of,
                                                            before the norm LN of a post-norm block: Pfeiffer;
                                           s + f(s)         where no norm follows (pre-norm)
        at="normalised"                    z + f(z)         z = LN(s), or s where no norm follows: AdapterPlus

    Args:
        reduction_factor: hidden size / bottleneck size; 16 if neither is given. A map `{"default": 16, "11": 4}` sets
            it by layer or pattern. The width is rounded down, at least 1.
        bottleneck_size: Inner width in features, instead of `reduction_factor`; a map as well.
        non_linearity: The function in the middle.
        at: Where the adapter adds.
        placement: Whether it reads the tensor that it adds to, or the input of the module that made it.
        residual: Name (a pattern) of the module whose input is the residual stream, the one nearest to the target; or
            "@stream": wherever tracing finds it.
        layer_norm_before: A layer norm of its own on what it reads.
        layer_norm_after: A layer norm of its own on what it adds.
        residual_before_layer_norm: That norm sees x + f, not f alone. Such an adapter is not the identity at init.
        scaling: A factor, "learned" (one trained factor) or "channel" (one for each feature).
        batch_axis: The axis of rows, where `gating` or `stochastic_depth` needs it; if not given it is the first one,
            which is checked.
        gating: A trained gate in (0, 1) for each row.
        dropout: Probability of dropping an output feature in training.
        stochastic_depth: Probability of dropping the adapter for a row in training.
        init: "lora" (= "mam": up-projection zero), "houlsby" or "bert" (near the identity, not at it).

    Every other setting: see `TensorConfig`.

    Reference: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2022,
    arXiv:2110.04366 (parallel).
    """

    method: Literal["bottleneck"] = "bottleneck"
    init: BottleneckInit = "lora"


# One adapter in each block, after its last sub-layer: on the sum with the residual stream.
_PFEIFFER = {"targets": ("@block.last",), "at": "sum"}
# Two adapters in each block, one after each sub-layer: on the branch, before the residual addition.
_HOULSBY = {"targets": ("@sublayer.out",), "non_linearity": "swish"}
# He et al. 2022; reads the residual stream, as the adapters library does.
_BESIDE = {"targets": ("@block.last",), "placement": "parallel", "residual": "@stream"}
_PARALLEL = {**_BESIDE, "reduction_factor": 2, "scaling": 4.0}


class Bottleneck:
    """Houlsby, Pfeiffer and parallel adapters, and all between."""

    name = "bottleneck"
    config_type = BottleneckConfig

    # Each under its name in the papers and under that of the adapters library ("seq_bn": a sequential bottleneck).
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pfeiffer": _PFEIFFER,
        "seq_bn": _PFEIFFER,
        "houlsby": _HOULSBY,
        "double_seq_bn": _HOULSBY,
        "parallel": _PARALLEL,
        "par_bn": _PARALLEL,
        "scaled_parallel": {**_PARALLEL, "scaling": "learned"},
        "scaled_par_bn": {**_PARALLEL, "scaling": "learned"},
        "adapter_plus": {
            "targets": ("@block.last",),
            "at": "normalised",
            "reduction_factor": 96,
            "non_linearity": "gelu",
            "scaling": "channel",
            "stochastic_depth": 0.1,
            "init": "houlsby",
        },
    }

    def placements(self, config: BottleneckConfig) -> tuple[Placement, ...]:
        """Place one module at each target, as `at`, `placement` and `residual` say."""
        return (bottleneck_placement(config),)

    def build(self, config: BottleneckConfig, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> BottleneckAdapter:
        """Build a bottleneck of the site's width."""
        size, options = bottleneck_size(config, site), bottleneck_options(config, site)
        return BottleneckAdapter(site.width, size, init=config.init, dtype=dtype, **options)


def bottleneck_size(config: AnyBottleneckConfig, site: SiteSpec) -> int:
    """Return the inner width at a site: as given, or the width there divided by the reduction factor, at least 1."""
    size = setting_at(config.bottleneck_size, site)
    if size is not None:
        return int(size)
    factor = setting_at(config.reduction_factor, site) or config.default_reduction_factor
    # A factor near zero, such as 1e-9, would ask for more memory than there is before anything could complain.
    if site.width / factor >= 2**31:
        raise ConfigError(
            f"reduction_factor={factor} makes a bottleneck of {site.width / factor:.3g} features at {site.path!r}"
        )
    # e.g. 768 features by a factor of 16: 48. A factor above the width still leaves one feature.
    return max(1, int(site.width // factor))


def bottleneck_options(config: AnyBottleneckConfig, site: SiteSpec) -> BottleneckOptions:
    """Return the settings that every bottleneck has, as its module takes them."""
    return {
        "input_size": site.input_width,
        "non_linearity": config.non_linearity,
        "norm_before": config.layer_norm_before,
        "norm_after": config.layer_norm_after,
        "residual_before_norm": config.residual_before_layer_norm,
        "scaling": config.scaling,
        "gating": config.gating,
        "dropout": config.dropout,
        "stochastic_depth": config.stochastic_depth,
        # Not given means 0: `placement.resolve` has refused it where rows may lie on another axis.
        "batch_axis": config.batch_axis or 0,
    }


def bottleneck_placement(config: AnyBottleneckConfig) -> Placement:
    """Translate `at`, `placement` and `residual` into where modules sit and what they read."""
    if config.at == "renormalised":  # on the input of a norm, reading what that norm makes of it
        return Placement(at="input", reads="norm")
    # Beside the module: without residual= it reads what the module itself takes.
    if config.placement == "parallel":
        return Placement(reads="residual" if config.residual is not None else "own_input", residual=config.residual)
    if config.at in ("sum", "normalised"):
        return Placement(at=config.at)
    return Placement(at=config.at, reads="site" if config.residual is None else "sum", residual=config.residual)
