"""LoRA: a low-rank update of a projection's weight."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CompatibilityError
from .functional.low_rank import LowRank
from .functional.projections import Projection, check_has_input
from .functional.slices import Slices
from .own_tensors import own_tensors

__all__ = ["LoRA", "LoRAInit", "reset_pair"]

LoRAInit = Literal["lora", "gaussian"]


class LoRA(nn.Module):
    """Compute what a low-rank update of its weight adds to a projection's output.

        delta = gate(z) * scaling * (B A dropout(z) + bias)

    For a bare Parameter, `adapted` gives the updated weight instead.

    Args:
        projection: The host's weight and geometry.
        rank: Inner width; of each slice, and of all groups of a grouped conv together (rounded up to a multiple of them).
        scaling: A fixed factor: alpha / rank, or alpha / sqrt(rank).
        dropout: Probability of dropping an input feature in training, in [0, 1). An embedding's input is one-hot: its one
            feature is dropped, and with it the token's delta.
        bias: Train a bias as well, which starts at zero.
        gating: Multiply by a gate in (0, 1) for each row: the mean over its tokens of sigmoid(w z + b). (For an embedding,
            z is one-hot: w has a value for each id.) Cannot be merged.
        batch_axis: The axis of rows, for gating.
        init: "lora" (A Kaiming-uniform, B zero; of an embedding A zero, B standard normal) or "gaussian" (A normal, 1 /
            rank, B zero). Both make a new adapter the identity.
        slices: Slices of a fused projection, each with its own A and B; nothing is added outside them. () for the whole.
        dtype: What the parameters are.

    Shape:
        z: (..., in), (batch, in, *spatial) or ids (...); x and the result: (..., out) or (batch, out, *spatial)

    Raises:
        ConfigError: see `LowRank`; dropout, bias or gating for a Parameter, where no input is known.

    Reference: Hu et al. 2021, arXiv:2106.09685; alpha / sqrt(rank): Kalajdzievski 2023, arXiv:2312.03732; gating: Mao et
    al. 2022, arXiv:2110.07577.
    """

    def __init__(
        self,
        projection: Projection,
        rank: int,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        bias: bool = False,
        gating: bool = False,
        batch_axis: int = 0,
        init: LoRAInit = "lora",
        slices: Slices = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_has_input(projection, dropout=dropout, bias=bias, gating=gating)
        self.low_rank = LowRank(projection, rank, slices)
        self.scaling, self.dropout, self.batch_axis, self.init = scaling, dropout, batch_axis, init
        self.lora_A = nn.Parameter(torch.empty(self.low_rank.a_shape, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.low_rank.b_shape, dtype=dtype))
        if bias:
            self.lora_bias = nn.Parameter(torch.empty(self.low_rank.layout.covered, dtype=dtype))
        if gating:
            self.gate_weight = nn.Parameter(torch.empty(1, projection.in_features, dtype=dtype))
            self.gate_bias = nn.Parameter(torch.empty(1, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter as `init` says, from torch's current random generator."""
        reset_pair(self.low_rank, self.lora_A, self.lora_B, self.init)
        for name, parameter in self.named_parameters():
            if name in ("lora_bias", "gate_bias"):
                nn.init.zeros_(parameter)
            elif name == "gate_weight":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        return own_tensors(self)["lora_B"].dtype  # type: ignore[no-any-return]  # a tensor

    def forward(self, z: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """Return the delta for the host's output. Shape: as x."""
        p = own_tensors(self)
        low_rank = self.low_rank
        h = low_rank.down(z, p["lora_A"], dropout=self.dropout if self.training else 0.0)
        # On the thin tensor in the middle: the output is many times as large.
        delta = low_rank.up(h if self.scaling == 1.0 else h * self.scaling, p["lora_B"])
        if "lora_bias" in p:
            delta = delta + low_rank.over_channels(self._bias_delta())
        return delta * self._gate(z) if "gate_weight" in p else delta

    def _gate(self, z: Tensor) -> Tensor:
        """Return the gate of each row. Shape: z as in `forward`, result broadcasts to x."""
        projection = self.low_rank.projection
        axis = projection.channel_axis
        if projection.kind == "embedding":
            gate = F.embedding(z, self.gate_weight.t()) + self.gate_bias  # (..., 1)
        else:
            gate = F.linear(z.movedim(axis, -1), self.gate_weight, self.gate_bias).movedim(-1, axis)
        gate = torch.sigmoid(gate)  # of size 1 on the axis of features
        # All axes but those of the rows and the features: tokens, or what is spatial.
        tokens = [n for n in range(gate.dim()) if n not in (self.batch_axis % gate.dim(), axis % gate.dim())]
        return gate.mean(dim=tokens, keepdim=True) if tokens else gate

    def bias_delta(self) -> Tensor | None:
        """Return what is added to the host's bias, or None without a trained bias. Shape: (out,)."""
        return self._bias_delta() if "lora_bias" in self._parameters else None

    def _bias_delta(self) -> Tensor:
        return self.low_rank.layout.spread(self.lora_bias * self.scaling)

    def why_not_summed(self) -> str | None:
        """Explain why the change cannot be part of a weighted sum; None if it can."""
        is_gated = "gate_weight" in self._parameters
        return "is a gated LoRA, whose gate depends on the input: its change is none of the weight" if is_gated else None

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B whose product is added to the host's weight: B is scaled. Shape: as `lora_A` and `lora_B`."""
        return self.lora_A, self.lora_B * self.scaling

    def weight_delta(self) -> Tensor:
        """Return what is added to the host's weight. Shape: as the weight."""
        return self.low_rank.delta(self.lora_A, self.lora_B) * self.scaling

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the updated weight, in the dtype of the one given. Shape: as the weight."""
        return (weight + self.weight_delta()).to(weight.dtype)

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the host's tensors that change if the adapter is merged into them.

        Raises:
            CompatibilityError: the adapter is gated, or has a bias where the host has none.
        """
        if "gate_weight" in self._parameters:
            raise CompatibilityError(
                f"a gated LoRA cannot be merged: its gate depends on the input, of {self.low_rank.projection.in_features} "
                "features. Activate it beside the layer instead"
            )
        merged = {"weight": self.adapted(tensors["weight"])}
        if "lora_bias" in self._parameters:
            if "bias" not in tensors:
                raise CompatibilityError(
                    f"this LoRA has a trained bias of {len(self.lora_bias)} features and the host has none to merge it "
                    "into. Activate it beside the layer instead, or train one with bias=False"
                )
            merged["bias"] = tensors["bias"] + self._bias_delta()
        return merged

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        p = self.low_rank.projection
        return f"{p.kind}, {p.in_features} -> {self.low_rank.rank} -> {p.out_features}, scaling={self.scaling:g}"


def reset_pair(low_rank: LowRank, a: Tensor, b: Tensor, init: LoRAInit) -> None:
    """Initialise A and B from torch's current random generator, so that their product is zero."""
    if init == "gaussian":
        nn.init.normal_(a, std=1 / low_rank.rank)
        nn.init.zeros_(b)
    elif low_rank.projection.kind == "embedding":
        nn.init.zeros_(a)
        nn.init.normal_(b)
    else:
        # In one bound for all leading axes of a Parameter: each of its matrices is a projection of its own.
        # 1 / sqrt(fan_in) is the bound of kaiming_uniform_ with a = sqrt(5), which nn.Linear has.
        fan_in = a.shape[-1] if low_rank.projection.kind == "parameter" else a[0].numel()
        nn.init.uniform_(a, -(fan_in**-0.5), fan_in**-0.5)
        nn.init.zeros_(b)
