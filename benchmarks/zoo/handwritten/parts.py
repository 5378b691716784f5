"""Parts that several of the hand-written models are made of, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BATCH",
    "DEPTH",
    "HEADS",
    "TOKENS",
    "VOCAB",
    "WIDTH",
    "Attention",
    "Block",
    "FeedForward",
    "Gated",
    "Tokens",
    "features",
    "image",
    "rotated",
    "tokens",
]

BATCH, TOKENS, WIDTH, HEADS, VOCAB, DEPTH = 2, 7, 32, 4, 61, 2


class Attention(nn.Module):
    """Multi-head attention with as few heads for keys as are asked for.

    Args:
        turn: What queries and keys go through, such as rotary positions.
    """

    def __init__(
        self,
        width: int = WIDTH,
        *,
        key_heads: int = HEADS,
        bias: bool = True,
        causal: bool = False,
        turn: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.groups, self.causal, self.turn = width // HEADS, HEADS // key_heads, causal, turn
        self.q, self.o = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.k, self.v = (nn.Linear(width, key_heads * self.head_dim, bias) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q = self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, seq, head_dim)
        k, v = (p(memory).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.k, self.v))
        if self.turn is not None:
            q, k = self.turn(q), self.turn(k)
        k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=self.causal)
        return self.o(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Up, GELU, down."""

    def __init__(self, width: int = WIDTH, inner: int | None = None, *, bias: bool = True) -> None:
        inner = inner or 2 * width
        super().__init__(nn.Linear(width, inner, bias), nn.GELU(), nn.Linear(inner, width, bias))


class Gated(nn.Module):
    """Down(silu(gate) * up), as in LLaMA."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """The plain pre-norm block; others replace its parts or its forward."""

    def __init__(self, mixer: nn.Module, feedforward: nn.Module, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = norm(WIDTH), mixer, norm(WIDTH), feedforward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions. Shape: (batch, heads, seq, head_dim)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / 100 ** (torch.arange(half) / half)  # (seq, half)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def tokens(length: int = TOKENS) -> Tensor:
    """Token ids. Shape: (batch, seq)."""
    return torch.randint(0, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(0))


def features(length: int = TOKENS, width: int = WIDTH, *, batch_first: bool = True) -> Tensor:
    """Hidden states. Shape: (batch, seq, hidden), or (seq, batch, hidden)."""
    shape = (BATCH, length, width) if batch_first else (length, BATCH, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(length))


def image(side: int = 16) -> Tensor:
    """Shape: (batch, channels, height, width)."""
    return torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))
