"""The bottleneck adapter: down-projection, non-linearity, up-projection."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import activations
from ..ops.activations import NonLinearity

__all__ = ["BottleneckAdapter", "BottleneckInit"]

BottleneckInit = Literal["lora", "mam", "houlsby", "bert"]


class BottleneckAdapter(nn.Module):
    """Compute what a bottleneck adapter adds to the tensor at its site.

    With `z` what it reads, `x` the tensor at its site, `norm_b` and `norm_a` its own layer norms (where asked for):

        branch = gate(z) * dropout(scaling * drop_path(up(act(down(norm_b(z))))))
        delta  = norm_a(branch)                  and the site becomes x + delta, or
        delta  = norm_a(x + branch) - x          with `residual_before_norm`

    The weights are parameters of this one module, not of nested Linear layers: one module call a site.

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
        init: "lora" (also "mam"; down Kaiming-uniform, up zero: a new adapter is the identity), "houlsby" (truncated
            normal, 0.01) or "bert" (normal, 0.02); the last two start near the identity, not at it.
        dtype: What the parameters are.

    Shape:
        z: (..., input), x and the result: (..., output)

    Reference: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2020, arXiv:2005.00247; gating: Mao et
    al. 2022, arXiv:2110.07577; "mam" init and scaling: He et al. 2022, arXiv:2110.04366; stochastic depth and channel
    scaling: Steitz and Roth 2024, arXiv:2406.06820. The up-projection starts at zero where the papers say near zero.
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
        init: BottleneckInit = "lora",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = input_size or output_size
        self.output_size, self.bottleneck_size = output_size, bottleneck_size
        self.residual_before_norm, self.scaling = residual_before_norm, scaling
        self.dropout, self.stochastic_depth, self.init = dropout, stochastic_depth, init
        self.batch_axis = batch_axis
        self._activation = activations.non_linearity(non_linearity)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        self.down_weight, self.down_bias = parameter(bottleneck_size, self.input_size), parameter(bottleneck_size)
        self.up_weight, self.up_bias = parameter(output_size, bottleneck_size), parameter(output_size)
        if norm_before:
            self.norm_before_weight, self.norm_before_bias = parameter(self.input_size), parameter(self.input_size)
        if norm_after:
            self.norm_after_weight, self.norm_after_bias = parameter(output_size), parameter(output_size)
        if gating:
            self.gate_weight, self.gate_bias = parameter(1, self.input_size), parameter(1)
        if isinstance(scaling, str):
            self.scale = parameter(1 if scaling == "learned" else output_size)
        # A plain bottleneck takes a shorter way through `forward`.
        self._is_plain = scaling == 1.0 and not (norm_before or norm_after or gating or dropout or stochastic_depth)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter as `init` says, from torch's current random generator."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name in ("norm_before_weight", "norm_after_weight", "scale"):
                nn.init.ones_(parameter)
            elif self.init == "bert":
                nn.init.normal_(parameter, std=0.02)
            elif self.init == "houlsby":
                nn.init.trunc_normal_(parameter, std=0.01, a=-0.02, b=0.02)
            elif name == "up_weight":
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the adapter computes in."""
        return self._parameters["up_weight"].dtype  # type: ignore[union-attr]  # never None here

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the delta for the site. Shape: z (..., input); x and result (..., output)."""
        if not self._is_plain:
            return self._full_forward(z, x)
        # Straight from the dict: four attribute look-ups on a module cost more than a small kernel.
        p: Any = self._parameters
        h = self._activation(F.linear(z, p["down_weight"], p["down_bias"]))
        return F.linear(h, p["up_weight"], p["up_bias"])

    def _full_forward(self, z: Tensor, x: Tensor) -> Tensor:
        """`forward` with every option. Shape: z (..., input); x and result (..., output)."""
        p = self._parameters
        h = z
        if "norm_before_weight" in p:
            h = F.layer_norm(h, (self.input_size,), p["norm_before_weight"], p["norm_before_bias"])
        h = self._activation(F.linear(h, self.down_weight, self.down_bias))
        branch = F.linear(h, self.up_weight, self.up_bias)
        if self.stochastic_depth and self.training:
            keep = 1.0 - self.stochastic_depth
            shape = [n if axis == self.batch_axis else 1 for axis, n in enumerate(branch.shape)]
            rows = torch.rand(shape, device=branch.device) < keep
            branch = branch * rows / keep
        branch = branch * (self.scale if isinstance(self.scaling, str) else self.scaling)
        if self.dropout:
            branch = F.dropout(branch, self.dropout, self.training)
        if "gate_weight" in p:
            gate = torch.sigmoid(F.linear(z, self.gate_weight, self.gate_bias))  # (batch, ..., 1)
            tokens = [axis for axis in range(gate.dim() - 1) if axis != self.batch_axis]
            branch = branch * (gate.mean(dim=tokens, keepdim=True) if tokens else gate)
        if "norm_after_weight" not in p:
            return branch
        norm = (self.output_size,), p["norm_after_weight"], p["norm_after_bias"]
        if self.residual_before_norm:
            return F.layer_norm(x + branch, *norm) - x
        return F.layer_norm(branch, *norm)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.input_size} -> {self.bottleneck_size} -> {self.output_size}, scaling={self.scaling}"
