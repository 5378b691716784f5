"""DoRA: a weight in two factors, its direction (updated by a low-rank pair) and a trained magnitude."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..errors import CompatibilityError, ConfigError
from .functional.low_rank import LowRank
from .functional.projections import Projection, check_has_input
from .functional.slices import Slices
from .lora import LoRAInit, reset_pair

__all__ = ["DoRA", "as_stored", "magnitude_of"]


class DoRA(nn.Module):
    """Compute what replacing the host's weight W by m * V / |V|, V = W + scaling * B A, adds to its output.

    The norm is that of each output feature. With g = m / |V|, b the host's bias, and x its output, W z + b:

        delta = (g - 1) * (x - b) + g * scaling * B A dropout(z)

    so W is read for the norm and not multiplied by z once more. Gradients take |V| for a constant (the paper, section
    4.3). `x` must be what the host itself returned: another adapter's delta in it would be scaled like W z.

    For a bare Parameter, `adapted` gives the updated weight instead; its norms are over the last axis.

    Args:
        projection: The host's weight and geometry.
        rank: Inner width; of each slice, and of all groups of a grouped conv together.
        magnitude: What m starts as: `magnitude_of(projection, weight, slices=slices)`, with the host's weight in the
            adapter's dtype. None where the host's weight has no values (the meta device): m starts as ones.
        scaling: A fixed factor: alpha / rank, or alpha / sqrt(rank).
        dropout: Probability of dropping an input feature in training, in [0, 1). It acts on B A z only, not on W z.
        init: Of A and B, as in `LoRA`; a new adapter is the identity.
        slices: Slices of a fused projection, each with its own A, B and m; the rest of W stays as it is. () for the whole.
        dtype: What the parameters are.

    Shape:
        z: (..., in), (batch, in, *spatial) or ids (...); x and the result: (..., out) or (batch, out, *spatial)

    Raises:
        ConfigError: see `LowRank`; dropout for a Parameter; a magnitude of another shape.

    Reference: Liu et al. 2024, arXiv:2402.09353.
    """

    reads_bare_output = True  # see `traits.ReadsBareOutput`

    def __init__(
        self,
        projection: Projection,
        rank: int,
        *,
        magnitude: Tensor | None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        init: LoRAInit = "lora",
        slices: Slices = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_has_input(projection, dropout=dropout)
        self.low_rank = LowRank(projection, rank, slices)
        self.scaling, self.dropout, self.init = scaling, dropout, init
        self.lora_A = nn.Parameter(torch.empty(self.low_rank.a_shape, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.low_rank.b_shape, dtype=dtype))
        # That of B without its rank and kernel: (covered,), after the leading axes of a Parameter.
        shape = self.low_rank.b_shape[: -1 - len(projection.kernel)]
        if magnitude is not None and magnitude.shape != shape:
            raise ConfigError(f"magnitude has shape {tuple(magnitude.shape)}, and there are {shape} output features")
        self.magnitude = nn.Parameter(torch.ones(shape, dtype=dtype))
        self.reset_parameters()
        if magnitude is not None:
            with torch.no_grad():
                self.magnitude.copy_(magnitude)

    def reset_parameters(self) -> None:
        """Initialise A and B as `init` says, from torch's current random generator. m, which is of W, stays."""
        reset_pair(self.low_rank, self.lora_A, self.lora_B, self.init)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        return self.magnitude.dtype

    def forward(self, z: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """Return the delta for the host's output. Shape: as x."""
        low_rank, dtype = self.low_rank, self.compute_dtype
        weight: Tensor = host.weight  # type: ignore[assignment]  # a projection has one
        bias: Tensor | None = getattr(host, "bias", None)
        factor = self._factor(weight)  # (covered,)
        # A host may compute in a narrower dtype than it stores, under autocast: x decides.
        product = x.to(dtype)  # W z, once the bias is taken off
        if bias is not None:
            product = product - low_rank.over_channels(bias.to(x.dtype).to(dtype))
        h = low_rank.down(z, self.lora_A, dropout=self.dropout if self.training else 0.0)
        # g scales the rows of B, which is much smaller than the output.
        b = self.lora_B * (factor * self.scaling).view(-1, *[1] * (self.lora_B.dim() - 1))
        # `spread` fills with zeros, so g - 1 is spread: features outside the slices have a g of 1.
        return low_rank.over_channels(low_rank.layout.spread(factor - 1)) * product + low_rank.up(h, b)

    def weight_delta(self) -> Tensor:
        """Return what is added to the host's weight before it is scaled. Shape: as the weight."""
        return self.low_rank.delta(self.lora_A, self.lora_B) * self.scaling

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the weight m * V / |V|, in the dtype of the one given. Shape: as the weight."""
        factor = 1 + self.low_rank.layout.spread(self._factor(weight) - 1)
        return ((weight + self.weight_delta()) * self.low_rank.over_outputs(factor)).to(weight.dtype)

    def why_not_summed(self) -> str | None:
        """Explain why the change cannot be part of a weighted sum."""
        return "is a DoRA, whose magnitudes multiply the weight and do not add up"

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the host's tensors that change if the adapter is merged into them: the weight."""
        return {"weight": self.adapted(tensors["weight"])}

    def _factor(self, weight: Tensor) -> Tensor:
        """Return the factor m / |V| of each output feature. Shape: weight as the host's, result (..., covered)."""
        # In the dtype that m was taken in, so that it starts as the same bits. Autocast would make B A narrow, and the
        # norm another one than where the adapter is merged.
        with torch.no_grad(), as_stored(weight):
            norm = _norms(self.low_rank, weight.to(self.compute_dtype) + self.weight_delta())
            # A feature of zeros has no direction: it stays zeros.
            norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
        factor: Tensor = self.magnitude / norm
        return factor

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        p = self.low_rank.projection
        return f"{p.kind}, {p.in_features} -> {self.low_rank.rank} -> {p.out_features}, scaling={self.scaling:g}"


def magnitude_of(projection: Projection, weight: Tensor, *, slices: Slices = ()) -> Tensor:
    """Return the norm of each output feature's weights, of all features or of those in slices.

    Shape: weight as the projection's, result (out,) or (covered,); with the leading axes of a Parameter before.

    Raises:
        CompatibilityError: the weight has another shape: it is packed, as those of quantised layers are.
    """
    if weight.shape != projection.shape:
        raise CompatibilityError(
            f"DoRA needs the norms of a weight of shape {projection.shape}, which is stored as {tuple(weight.shape)}; "
            "quantised weights must be unpacked first, or use LoRA"
        )
    return _norms(LowRank(projection, 1, slices), weight)


def _norms(low_rank: LowRank, weight: Tensor) -> Tensor:
    """Return the norm of each output feature in the slices. Shape: weight as the host's, result (..., covered)."""
    projection = low_rank.projection
    first = weight.dim() - 2 if projection.kind == "parameter" else 0  # the axes before have each a weight
    others = tuple(axis for axis in range(first, weight.dim()) if axis != projection.out_axis % weight.dim())
    return low_rank.layout.pick(torch.linalg.vector_norm(weight, dim=others))


def as_stored(tensor: Tensor) -> AbstractContextManager[object]:
    """Compute in the dtypes of the tensors, even under autocast on this tensor's device."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
