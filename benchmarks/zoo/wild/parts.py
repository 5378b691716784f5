"""What attentions and feed-forwards are made of: layouts, projections and norms in all the ways that people write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BATCH",
    "HEADS",
    "LAYOUTS",
    "TOKENS",
    "WIDTH",
    "Layout",
    "Lora",
    "Make",
    "mixed",
    "norm_of",
    "projections",
    "scores",
]

BATCH, TOKENS, WIDTH, HEADS, ROWS = 2, 6, 16, 2, 3  # all axes have different lengths
EPS = 1e-5


@dataclass(frozen=True)
class Layout:
    """Where the axes of the stream lie.

    Attributes:
        axis: The features' axis.
        shape: Of a stream with so many tokens and features.
        order: The axes of the batch (one or two), of the tokens and of the features.
    """

    axis: int
    shape: Callable[[int, int], tuple[int, ...]]
    order: tuple[int, ...]

    def tokens(self, x: Tensor) -> Tensor:
        """Return the stream as (batch, tokens, features)."""
        return x.permute(self.order).flatten(0, -3)

    def back(self, y: Tensor, like: Tensor) -> Tensor:
        """Return (batch, tokens, features) in this layout."""
        batch = [like.shape[axis] for axis in self.order[:-2]]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return y.unflatten(0, batch).permute(inverse)

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        """Make a projection of the features."""
        return nn.Linear(inputs, outputs, bias) if self.axis == -1 else nn.Conv1d(inputs, outputs, 1, bias=bias)


LAYOUTS = {
    "first": Layout(-1, lambda tokens, width: (BATCH, tokens, width), (0, 1, 2)),
    "second": Layout(-1, lambda tokens, width: (tokens, BATCH, width), (1, 0, 2)),
    "third": Layout(-1, lambda tokens, width: (ROWS, tokens, BATCH, width), (2, 0, 1, 3)),
    "channels": Layout(1, lambda tokens, width: (BATCH, width, tokens), (0, 2, 1)),
}
Make = Callable[[int, int], nn.Module]  # of a projection: its inputs and outputs


class Lora(nn.Module):
    """A projection with a low-rank branch beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(inputs, outputs), nn.Linear(inputs, 2, False), nn.Linear(2, outputs, False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        return self.base(x) + self.b(self.a(x))


@torch.library.custom_op("adapterkit_zoo::quantised_product", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


class OpLinear(nn.Linear):
    """A projection by an operation that nobody knows, as quantised ones are."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        return _linear(input, self.weight, self.bias)


def projections(layout: Layout, side: str) -> Make:
    """Return what makes the projections of a model."""
    return {"lora": Lora, "quantised": OpLinear}.get(side, layout.linear)


# --- norms ------------------------------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """A layer norm of the features on any axis."""

    def __init__(self, width: int, axis: int) -> None:
        super().__init__(width)
        self.axis = axis

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        return super().forward(input.movedim(self.axis, -1)).movedim(-1, self.axis)


class RMSNorm(nn.Module):
    """As LLaMA's: a module, its arithmetic by hand, with a weight."""

    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.weight, self.axis = nn.Parameter(torch.ones(width)), axis

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.weight
        return x.movedim(-1, self.axis)


def norm_of(by: str, width: int, axis: int) -> Callable[[Tensor], Tensor]:
    """Return a norm over the features: a module, or a function."""
    if by == "layer":
        return nn.LayerNorm(width) if axis == -1 else LayerNorm(width, axis)
    if by == "rms":
        return RMSNorm(width, axis)
    if by == "torch":
        return lambda x: F.layer_norm(x.movedim(axis, -1), (width,), eps=EPS).movedim(-1, axis)
    return lambda x: x / (x.square().mean(axis, keepdim=True) + EPS).sqrt()


def scores(q: Tensor, k: Tensor, core: str) -> Tensor:
    """Return q k^T / sqrt(d). Shape: (batch, heads, tokens, tokens)."""
    product = torch.einsum("bhid,bhjd->bhij", q, k) if core == "einsum" else q @ k.mT
    return product / math.sqrt(q.shape[-1])


def mixed(weights: Tensor, v: Tensor, core: str) -> Tensor:
    """Return the values that the weights choose. Shape: (batch, heads, tokens, head_dim)."""
    return torch.einsum("bhij,bhjd->bhid", weights, v) if core == "einsum" else weights @ v
