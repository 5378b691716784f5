"""Settings of bottleneck adapters (Houlsby, Pfeiffer, parallel and all between)."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from ..modules.bottleneck import BottleneckInit
from ..ops.activations import NonLinearity
from .base import ActivationConfig, Int, Probability, Size, check_map, number_by_place

__all__ = ["AnyBottleneckConfig", "BottleneckConfig"]

Factor = Annotated[float, Field(gt=0)]


class AnyBottleneckConfig(ActivationConfig):
    """The settings of every method that is a bottleneck, whatever its projections are: see `BottleneckConfig`."""

    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (("reduction_factor", "bottleneck_size"),)
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
    def _check(self) -> "AnyBottleneckConfig":
        if self.reduction_factor is not None and self.bottleneck_size is not None:
            raise ValueError("give reduction_factor or bottleneck_size, not both")
        if self.at != "output" and (self.placement == "parallel" or self.residual is not None):
            raise ValueError(f"placement='parallel' and residual= need at='output'; found at={self.at!r}")
        if self.input is not None and self.at == "output" and (self.placement == "sequential" or self.residual is not None):
            raise ValueError("input= names what the adapter reads at its host's input; here it reads something else")
        if self.output is not None and self.at != "output":
            raise ValueError(f"output= names a tensor that the host returns; with at={self.at!r} none is adapted")
        if self.residual_before_layer_norm and not self.layer_norm_after:
            raise ValueError("residual_before_layer_norm needs layer_norm_after=True")
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
        batch_axis: The axis of rows, where `gating` or `stochastic_depth` needs it; 0 if not given.
        gating: A trained gate in (0, 1) for each row.
        dropout: Probability of dropping an output feature in training.
        stochastic_depth: Probability of dropping the adapter for a row in training.
        init: "lora" (= "mam": up-projection zero), "houlsby" or "bert" (near the identity, not at it).

    Every other setting: see `ActivationConfig`.

    Reference: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2022,
    arXiv:2110.04366 (parallel).
    """

    method: Literal["bottleneck"] = "bottleneck"
    init: BottleneckInit = "lora"
