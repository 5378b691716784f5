"""Invertible adapters: a coupling of the two halves of an embedding, run forward at one site and backward at another."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .functional import non_linearities
from .functional.non_linearities import NonLinearity
from .own_tensors import own_tensors

__all__ = ["Coupling", "CouplingKind", "Direction", "InvertibleAdapter"]

CouplingKind = Literal["nice", "glow"]
Direction = Literal["forward", "inverse"]


class Coupling(nn.Module):
    """An invertible map of features e = (e1, e2), each half changed by a function of the other.

    With F and G two-layer networks, Linear act Linear:

        "nice"   y1 = e1 + F(e2)                     y2 = e2 + G(y1)
        "glow"   y1 = e1 exp(tanh s) + t             y2 = e2 exp(tanh s') + t',   (s, t) = F(e2), (s', t') = G(y1)

    and backward e2 from y1 and y2 first, then e1. What is returned is the change, y - e or e - y: nothing is lost where
    it is small. The second layers start at zero, so that a new one changes nothing (the library that the paper came with:
    normal, 0.02). A scale of GLOW is 1 there, and stays in (1/e, e): neither way does rounding grow by more than that.

    Of an odd width the first half is the smaller one. The inner width is half the width over the reduction factor.

    Args:
        width: Features of the embedding; at least 2.
        block: "nice" (additive) or "glow" (affine).
        reduction_factor: Half the width / inner width, which is rounded down, at least 1.
        non_linearity: Name of the function between the layers of F and G.
        dtype: What the parameters are.

    Shape:
        input and output: (..., width)

    Raises:
        ConfigError: width is below 2: there are no halves.

    Reference: Pfeiffer et al. 2020, arXiv:2005.00052, section 4 (MAD-X); NICE: Dinh et al. 2015, arXiv:1410.8516; GLOW:
    Kingma and Dhariwal 2018, arXiv:1807.03039, whose scale is exp(s), without bounds.
    """

    def __init__(
        self,
        width: int,
        *,
        block: CouplingKind = "nice",
        reduction_factor: float = 2.0,
        non_linearity: NonLinearity = "relu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 2:
            raise ConfigError(f"an invertible adapter couples two halves of the features; found a width of {width}")
        self.width, self.block = width, block
        self._activation = non_linearities.non_linearity(non_linearity)
        first, second = width // 2, width - width // 2
        inner = max(1, int(first // reduction_factor))
        outputs = 2 if block == "glow" else 1  # s and t, or t alone
        # F reads the second half to change the first. G reads the first to change the second.
        for name, read, written in (("f", second, first), ("g", first, second)):
            for layer, shape in (("down", (inner, read)), ("up", (outputs * written, inner))):
                self.register_parameter(f"{name}_{layer}_weight", nn.Parameter(torch.empty(shape, dtype=dtype)))
                self.register_parameter(f"{name}_{layer}_bias", nn.Parameter(torch.empty(shape[0], dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise first layers Kaiming-uniform, second layers and biases zero, from torch's current random generator."""
        for name, parameter in self.named_parameters():
            if name.endswith("down_weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                nn.init.zeros_(parameter)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the coupling computes in."""
        return own_tensors(self)["f_up_bias"].dtype  # type: ignore[no-any-return]  # a tensor

    def forward(self, z: Tensor, *, inverse: bool = False) -> Tensor:
        """Return what the coupling, or its inverse, adds to z. Shape: (..., width)."""
        half = self.width // 2
        first, second = z[..., :half], z[..., half:]
        if inverse:
            # The last change first: e2 was changed by y1, which is known; then e1, which was changed by e2.
            change_2 = _undo(second, *self._network("g", first))
            change_1 = _undo(first, *self._network("f", second + change_2))
        else:
            change_1 = _do(first, *self._network("f", second))
            change_2 = _do(second, *self._network("g", first + change_1))
        return torch.cat((change_1, change_2), -1)

    def _network(self, name: Literal["f", "g"], half: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return log-scale (None for NICE) and shift of the other half. Shape: (..., half) to (..., other half), each."""
        p = own_tensors(self)
        # The second site may lie on another device than the first one, where the parameters are.
        weights = (p[f"{name}_{part}"].to(half.device) for part in ("down_weight", "down_bias", "up_weight", "up_bias"))
        down_weight, down_bias, up_weight, up_bias = weights
        out = F.linear(self._activation(F.linear(half, down_weight, down_bias)), up_weight, up_bias)
        if self.block == "nice":
            return None, out
        log_scale, shift = out.chunk(2, -1)
        return torch.tanh(log_scale), shift

    def extra_repr(self) -> str:
        """Return the settings, for `print(model)`."""
        return f"{self.width}, block={self.block!r}"


class InvertibleAdapter(nn.Module):
    """One of the two places of a coupling; without parameters of its own.

    Args:
        direction: "forward" behind the embedding, "inverse" before the output embedding.
        is_undone: Whether heads that read the last hidden states as embeddings are to undo the forward one: see `undone`.

    Attributes:
        shared: The coupling; set from outside, after construction.
        is_inverse: Of several such adapters the last is undone first; see `traits.TakesBack`.

    Shape:
        z, x and the result: (..., width)

    Reference: Pfeiffer et al. 2020, arXiv:2005.00052, section 4.
    """

    shared: Coupling

    def __init__(self, direction: Direction, *, is_undone: bool = True) -> None:
        super().__init__()
        self.direction = direction
        self.is_undone = is_undone and direction == "forward"
        self.is_inverse = direction == "inverse"

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        return self.shared.compute_dtype

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the delta for the site. Shape: (..., width)."""
        delta: Tensor = self.shared(z, inverse=self.direction == "inverse")
        return delta

    def undone(self, x: Tensor) -> Tensor:
        """Return what the embedding was before the coupling, for heads that read it. Shape: (..., width)."""
        delta: Tensor = self.shared(x.to(self.compute_dtype), inverse=True)
        return x + delta.to(x.dtype)

    def extra_repr(self) -> str:
        """Return the direction, for `print(model)`."""
        return self.direction


def _do(half: Tensor, log_scale: Tensor | None, shift: Tensor) -> Tensor:
    """Return what half * exp(log_scale) + shift adds to half. Shape: (..., half)."""
    # expm1, since exp(s) - 1 would lose its digits where s is near 0, as it is in a new adapter.
    return shift if log_scale is None else half * torch.expm1(log_scale) + shift


def _undo(half: Tensor, log_scale: Tensor | None, shift: Tensor) -> Tensor:
    """Return what (half - shift) * exp(-log_scale) adds to half. Shape: (..., half)."""
    return -shift if log_scale is None else half * torch.expm1(-log_scale) - shift * torch.exp(-log_scale)
