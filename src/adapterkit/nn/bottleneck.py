"""The bottleneck adapter: down-projection, non-linearity, up-projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor, nn

from .functional import non_linearities
from .functional.bottleneck import bottleneck, full_bottleneck
from .functional.non_linearities import NonLinearity
from .own_tensors import own_tensors

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

__all__ = ["AnyBottleneck", "BottleneckAdapter", "BottleneckInit", "BottleneckOptions"]

BottleneckInit = Literal["lora", "mam", "houlsby", "bert"]


class BottleneckOptions(TypedDict, total=False):
    """The optional arguments that every bottleneck has; described at `AnyBottleneck`."""

    input_size: int | None
    non_linearity: NonLinearity
    norm_before: bool
    norm_after: bool
    residual_before_norm: bool
    scaling: float | Literal["learned", "channel"]
    gating: bool
    dropout: float
    stochastic_depth: float
    batch_axis: int


class AnyBottleneck(nn.Module):
    """What every bottleneck does around its two projections. Abstract: the projections are a subclass's.

    With `z` what it reads, `x` the tensor at its site, `norm_b` and `norm_a` its own layer norms (where asked for):

        branch = gate(z) * dropout(scaling * drop_path(up(act(down(norm_b(z))))))
        delta  = norm_a(branch)                  and the site becomes x + delta, or
        delta  = norm_a(x + branch) - x          with `residual_before_norm`

    What computes this is `functional.bottleneck`; a module holds the parameters.

    Args:
        output_size: Width of the tensor at the site, in features.
        bottleneck_size: Inner width, in features.
        input_size: Width of what the adapter reads; `output_size` if not given.
        non_linearity: Name of the elementwise function in the middle.
        norm_before: Layer norm of its own on what it reads.
        norm_after: Layer norm of its own on what it adds.
        residual_before_norm: `norm_after` sees x + branch, not the branch alone; not the identity at init.
        scaling: A fixed factor, "learned" (one trained factor) or "channel" (one for each output feature).
        gating: Multiply by a gate in (0, 1) for each row: the mean over its tokens of sigmoid(w z + b).
        dropout: Probability of dropping an output feature in training, in [0, 1).
        stochastic_depth: Probability of dropping the whole branch for a row in training, in [0, 1).
        batch_axis: The axis of rows, for gating and stochastic depth.

    Shape:
        z: (..., input), x and the result: (..., output)

    Reference: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2020, arXiv:2005.00247; gating: Mao et
    al. 2022, arXiv:2110.07577; scaling: He et al. 2022, arXiv:2110.04366; stochastic depth and channel scaling: Steitz
    and Roth 2024, arXiv:2406.06820.
    """

    def __init__(
        self,
        output_size: int,
        bottleneck_size: int,
        *,
        input_size: int | None = None,
        non_linearity: NonLinearity = "relu",
        norm_before: bool = False,
        norm_after: bool = False,
        residual_before_norm: bool = False,
        scaling: float | Literal["learned", "channel"] = 1.0,
        gating: bool = False,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        batch_axis: int = 0,
    ) -> None:
        super().__init__()
        self.input_size = input_size or output_size
        self.output_size, self.bottleneck_size = output_size, bottleneck_size
        self.norm_before, self.norm_after, self.gating = norm_before, norm_after, gating
        self.residual_before_norm, self.scaling = residual_before_norm, scaling
        self.dropout, self.stochastic_depth, self.batch_axis = dropout, stochastic_depth, batch_axis
        self._activation = non_linearities.non_linearity(non_linearity)
        # A plain bottleneck takes a shorter way through `forward`.
        self._is_plain = scaling == 1.0 and not (norm_before or norm_after or gating or dropout or stochastic_depth)

    def reset_parameters(self) -> None:
        """Initialise every parameter, from torch's current random generator."""
        raise NotImplementedError

    def _project(self, h: Tensor) -> Tensor:
        """Apply both projections and what is between them. Shape: (..., input) to (..., output)."""
        raise NotImplementedError

    def _add_options(self, dtype: torch.dtype | None) -> None:
        """Register the parameters of the options, after those of the projections."""

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        if self.norm_before:
            self.norm_before_weight, self.norm_before_bias = parameter(self.input_size), parameter(self.input_size)
        if self.norm_after:
            self.norm_after_weight, self.norm_after_bias = parameter(self.output_size), parameter(self.output_size)
        if self.gating:
            self.gate_weight, self.gate_bias = parameter(1, self.input_size), parameter(1)
        if isinstance(self.scaling, str):
            self.scale = parameter(1 if self.scaling == "learned" else self.output_size)

    def _reset(self, init: Callable[[str, nn.Parameter], object]) -> None:
        """Initialise biases as zeros, norms and scaling as ones, and every other parameter with `init(name, parameter)`."""
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name in ("norm_before_weight", "norm_after_weight", "scale"):
                nn.init.ones_(parameter)
            else:
                init(name, parameter)

    def _full_forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the delta, with every option. Shape: z (..., input); x and result (..., output)."""
        p = own_tensors(self)
        return full_bottleneck(
            z,
            x,
            self._project,
            norm_before=(p["norm_before_weight"], p["norm_before_bias"]) if self.norm_before else None,
            norm_after=(p["norm_after_weight"], p["norm_after_bias"]) if self.norm_after else None,
            residual_before_norm=self.residual_before_norm,
            scaling=p["scale"] if isinstance(self.scaling, str) else self.scaling,
            gate=(p["gate_weight"], p["gate_bias"]) if self.gating else None,
            dropout=self.dropout,
            stochastic_depth=self.stochastic_depth,
            batch_axis=self.batch_axis,
            training=self.training,
        )

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"{self.input_size} -> {self.bottleneck_size} -> {self.output_size}, scaling={self.scaling}"


class BottleneckAdapter(AnyBottleneck):
    """Compute what a bottleneck adapter adds to the tensor at its site: `AnyBottleneck`, with two linear projections.

    The weights are parameters of this one module, not of nested Linear layers: one module call a site.

    Args:
        output_size: Width of the tensor at the site, in features.
        bottleneck_size: Inner width, in features.
        init: "lora" (also "mam"; down Kaiming-uniform, up zero: a new adapter is the identity), "houlsby" (truncated
            normal, 0.01) or "bert" (normal, 0.02); the last two start near the identity, not at it.
        dtype: What the parameters are.
        options: See `AnyBottleneck`.

    Shape:
        z: (..., input), x and the result: (..., output)

    Reference: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; "mam" init: He et al. 2022, arXiv:2110.04366. The
    up-projection starts at zero where the papers say near zero.
    """

    def __init__(
        self,
        output_size: int,
        bottleneck_size: int,
        *,
        init: BottleneckInit = "lora",
        dtype: torch.dtype | None = None,
        **options: Unpack[BottleneckOptions],
    ) -> None:
        super().__init__(output_size, bottleneck_size, **options)
        self.init = init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        # As nn.Linear has them: weights are (out, in).
        self.down_weight, self.down_bias = parameter(bottleneck_size, self.input_size), parameter(bottleneck_size)
        self.up_weight, self.up_bias = parameter(output_size, bottleneck_size), parameter(output_size)
        self._add_options(dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter as `init` says, from torch's current random generator."""
        self._reset(self._init_weight)

    def _init_weight(self, name: str, weight: nn.Parameter) -> None:
        if self.init == "bert":
            nn.init.normal_(weight, std=0.02)
        elif self.init == "houlsby":
            nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)  # cut off at two standard deviations
        elif name == "up_weight":
            nn.init.zeros_(weight)
        else:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear: within 1 / sqrt(fan_in)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        return own_tensors(self)["up_weight"].dtype  # type: ignore[no-any-return]  # a tensor

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the delta for the site. Shape: z (..., input); x and result (..., output)."""
        return self._project(z) if self._is_plain else self._full_forward(z, x)

    def _project(self, h: Tensor) -> Tensor:
        p = own_tensors(self)
        down, up = (p["down_weight"], p["down_bias"]), (p["up_weight"], p["up_bias"])
        return bottleneck(h, down, up, self._activation)
