"""Token models whose blocks add, normalise or attend in their own way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import DEPTH, HEADS, VOCAB, WIDTH, Attention, Block, FeedForward, Gated, Tokens, rotated

__all__ = [
    "GPTJ",
    "T5",
    "AlbertGroup",
    "ByKeyword",
    "Conformer",
    "DeepNorm",
    "Experts",
    "Output",
    "ReZero",
    "Reversible",
    "SandwichNorm",
    "Sequential",
    "gemma",
    "llama",
    "mixtral",
]


def llama() -> Block:
    """Rotary positions, grouped queries, RMS norms, a gated feed-forward."""
    return Block(Attention(key_heads=2, bias=False, causal=True, turn=rotated), Gated(), nn.RMSNorm)


class Experts(nn.Module):
    """Each token goes to two experts of four, and to one that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts, self.shared = nn.ModuleList(Gated() for _ in range(4)), Gated()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)  # (tokens, hidden)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, places, None])
        return out.view_as(x) + self.shared(x)


def mixtral() -> Block:
    """A mixture of experts in the place of the feed-forward."""
    return Block(Attention(causal=True, turn=rotated), Experts(), nn.RMSNorm)


class GPTJ(Block):
    """Both branches start from one norm, and are added at once."""

    def __init__(self) -> None:
        super().__init__(Attention(causal=True, turn=rotated), FeedForward())
        self.norm2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        return self.mixer(normed) + self.mlp(normed) + x


class SandwichNorm(Block):
    """A norm before each branch and one at its end."""

    def __init__(self, mixer: nn.Module, feedforward: nn.Module) -> None:
        super().__init__(mixer, feedforward, nn.RMSNorm)
        self.after1, self.after2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.after1(self.mixer(self.norm1(x)))
        return x + self.after2(self.mlp(self.norm2(x)))


def gemma() -> Block:
    """As Gemma 2."""
    return SandwichNorm(Attention(key_heads=1, bias=False, causal=True, turn=rotated), Gated())


class DeepNorm(Block):
    """norm(alpha * x + f(x))."""

    alpha = (2 * DEPTH) ** 0.25

    def __init__(self) -> None:
        super().__init__(Attention(), FeedForward())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.alpha * x + self.mixer(x))
        return self.norm2(self.alpha * x + self.mlp(x))


class ReZero(Block):
    """x + a * f(x) with one learned number for each block, and no norms."""

    def __init__(self) -> None:
        super().__init__(Attention(), FeedForward(), lambda _width: nn.Identity())
        self.resweight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.resweight * self.mixer(x)
        return x + self.resweight * self.mlp(x)


class _HalfStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(self.norm(x))))


class _Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pointwise1 = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, 64, 1)
        self.pointwise2 = nn.Conv1d(WIDTH, WIDTH, 1)
        self.depthwise, self.batch_norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.pointwise1(self.norm(x).transpose(1, 2)), 1)  # (batch, hidden, seq)
        return self.pointwise2(F.silu(self.batch_norm(self.depthwise(x)))).transpose(1, 2)


class Conformer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.ff1, self.attn_norm, self.attn = _HalfStep(), nn.LayerNorm(WIDTH), Attention()
        self.conv, self.ff2, self.norm = _Convolution(), _HalfStep(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ff1(x)
        x = x + self.attn(self.attn_norm(x))
        x = x + self.conv(x)
        return self.norm(x + 0.5 * self.ff2(x))


class AlbertGroup(nn.Module):
    """Post-norm, one set of weights, run for every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.project = nn.Embedding(VOCAB, 16), nn.Linear(16, WIDTH)
        self.layer_groups = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.project(self.embedding(input_ids))
        for _ in range(3):
            x = self.layer_groups[0](x)
        return x


class _T5Attention(nn.Module):
    """With a bias by distance that the first layer computes and the others are given."""

    def __init__(self, *, has_bias: bool) -> None:
        super().__init__()
        self.layer_norm, self.attention = nn.RMSNorm(WIDTH), Attention(bias=False)
        self.bias = nn.Embedding(8, HEADS) if has_bias else None
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, bias: Tensor | None, memory: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.bias is not None:
            at = torch.arange(x.shape[1])
            bias = self.bias((at[None] - at[:, None]).clamp(-4, 3) + 4).permute(2, 0, 1)[None]  # (1, heads, seq, seq)
        return x + self.dropout(self.attention(self.layer_norm(x), memory, bias)), bias


class _T5FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm, self.DenseReluDense, self.dropout = nn.RMSNorm(WIDTH), Gated(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x)))


class _T5Block(nn.Module):
    def __init__(self, *, first: bool, is_decoder: bool) -> None:
        super().__init__()
        attentions = [_T5Attention(has_bias=first), *([_T5Attention(has_bias=False)] if is_decoder else [])]
        self.layer = nn.ModuleList([*attentions, _T5FeedForward()])

    def forward(self, x: Tensor, bias: Tensor | None, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, bias = self.layer[0](x, bias)
        if memory is not None:
            x, _ = self.layer[1](x, None, memory)
        return self.layer[-1](x), bias


class T5(nn.Module):
    """Encoder and decoder whose sub-layers are numbered in each block, and whose scores have a relative bias."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCAB, WIDTH)
        self.encoder = nn.ModuleList(_T5Block(first=i == 0, is_decoder=False) for i in range(DEPTH))
        self.decoder = nn.ModuleList(_T5Block(first=i == 0, is_decoder=True) for i in range(DEPTH))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory, x = self.shared(input_ids), self.shared(decoder_input_ids)
        bias = None
        for block in self.encoder:
            memory, bias = block(memory, bias, None)
        bias = None
        for block in self.decoder:
            x, bias = block(x, bias, memory)
        return self.norm(x) @ self.shared.weight.T


class _ReversibleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(WIDTH), Attention())
        self.g = nn.Sequential(nn.LayerNorm(WIDTH), FeedForward())

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


class Reversible(nn.Module):
    """Two streams, each of which is added to by a branch of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(_ReversibleBlock() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(2 * WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x1 = x2 = self.embedding(input_ids)
        for block in self.blocks:
            x1, x2 = block(x1, x2)
        return self.norm(torch.cat([x1, x2], -1))


class _DropPath(nn.Module):
    """Leaves the whole branch out for some rows, in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(0.9) / 0.9


class _Residual(nn.Module):
    """x + drop_path(f(norm(x))), whatever f is."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn, self.drop_path = nn.LayerNorm(WIDTH), branch, _DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fn(self.norm(x)))


class Sequential(Tokens):
    """Blocks as an nn.Sequential of wrappers that add, under stochastic depth."""

    def __init__(self) -> None:
        super().__init__([nn.Sequential(_Residual(Attention()), _Residual(FeedForward())) for _ in range(DEPTH)])


@dataclass
class Output:
    """What the model below returns."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    lengths: dict[str, Tensor]


class ByKeyword(nn.Module):
    """Called by keyword alone, with a mask and an option; its blocks return dicts, and it a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleDict({f"layer_{i}": _DictBlock() for i in range(DEPTH)})

    def forward(self, *, words: Tensor, keep: Tensor, with_all: bool = False) -> Output:
        state = {"hidden": self.embedding(words), "keep": keep}
        seen = [state["hidden"]]
        for layer in self.layers.values():
            state = layer(state=state)
            seen.append(state["hidden"])
        return Output(seen[-1], tuple(seen) if with_all else (), {"of_rows": keep.sum(-1)})


class _DictBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), FeedForward()
        self.norms = nn.ModuleDict({"attention": nn.LayerNorm(WIDTH), "mlp": nn.LayerNorm(WIDTH)})

    def forward(self, *, state: dict[str, Tensor]) -> dict[str, Tensor]:
        x, bias = state["hidden"], state["keep"][:, None, None].bool()
        x = x + self.attention(self.norms["attention"](x), bias=bias)
        return {**state, "hidden": x + self.mlp(self.norms["mlp"](x))}
