"""Attentions, each of which says which projection makes its queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import HEADS, TOKENS, Layout, Make, mixed, scores
from .spec import Spec
from .weights import Weight, part_of, whole

__all__ = ["Attention", "ConvMix", "TokenMLP", "TorchAttention", "attention_of"]

WINDOW = 3
State = dict[str, Tensor]


def attention_of(spec: Spec, width: int, layout: Layout, make: Make) -> nn.Module:
    """Make the attention of a spec, or what mixes tokens in its place."""
    if spec.attention == "torch":
        return TorchAttention(width, batch_first=spec.layout == "first")
    if spec.attention == "conv_mix":
        return ConvMix()
    if spec.attention == "token_mlp":
        return TokenMLP(make)
    return Attention(spec, width, layout, make)


class Attention(nn.Module):
    """Attention of every kind that has a projection to queries, keys and values.

    Attributes:
        weights: What the roles of its projections name.
        kinds: What it is, in the library's words.
    """

    def __init__(self, spec: Spec, width: int, layout: Layout, make: Make) -> None:
        super().__init__()
        self.kind, self.core, self.qkv, self.layout, self.head_dim = (
            spec.attention,
            spec.core,
            spec.qkv,
            layout,
            width // HEADS,
        )
        self.kinds = {
            "cross": ("crossattention",),
            "cross_one": ("crossattention",),
            # Whether softmax-free attention is one, is a matter of words.
            "linear": ("mixer", "attention"),
        }.get(spec.attention, ("attention",))
        key_width = width // 2 if spec.attention == "gqa" else width
        self.sizes = (width, key_width, key_width)
        self._project(make, width, key_width)
        self.o = make(width, width)
        if self.kind.startswith("gated"):
            self.gate = make(width, width)
        if self.kind == "talking":
            self.mix_before, self.mix_after = nn.Linear(HEADS, HEADS, False), nn.Linear(HEADS, HEADS, False)
        if self.kind == "value_residual":
            self.share = nn.Parameter(torch.tensor([0.6, 0.4]))
        self.weights["last"] = [whole(self.o)]

    def _project(self, make: Make, width: int, key_width: int) -> None:
        """Make the projections, and say whose is which."""
        q, k = width, key_width
        self.weights: dict[str, list[Weight]]
        if self.qkv == "fused":
            self.qkv_proj = make(width, q + 2 * k)
            parts = {"q": (0, q), "k": (q, q + k), "v": (q + k, q + 2 * k)}
            self.weights = {part: [part_of(self.qkv_proj, part, span)] for part, span in parts.items()}
        elif self.qkv == "kv":
            self.q, self.kv = make(width, q), make(width, 2 * k)
            parts = {"k": (0, k), "v": (k, 2 * k)}
            self.weights = {part: [part_of(self.kv, part, span)] for part, span in parts.items()}
            self.weights["q"] = [whole(self.q)]
        else:
            self.q, self.k, self.v = make(width, q), make(width, k), make(width, k)
            self.weights = {part: [whole(getattr(self, part))] for part in "qkv"}

    def forward(self, x: Tensor, memory: Tensor | None = None, state: State | None = None) -> Tensor:
        """Attend to `memory`, or to x itself. `state`: what layers hand on to later ones."""
        memory = x if memory is None else memory
        q, k, v = (self._heads(y) for y in self._projected(x, memory))
        if self.kind == "gated_values":
            v = v * self._heads(self.gate(memory)).sigmoid()
        if self.kind == "value_residual" and state is not None:
            v = self.share[0] * v + self.share[1] * state.setdefault("values", v)
        out = self._windowed(q, k, v) if self.kind == "window" else self._attend(q, k, v, state)
        out = self.layout.back(out.transpose(1, 2).flatten(2), x)
        if self.kind == "gated_output":
            out = out * self.gate(x).sigmoid()
        return self.o(out)

    def _projected(self, x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        axis = self.layout.axis
        if self.qkv == "fused":
            return self.qkv_proj(x).split(self.sizes, axis)
        if self.qkv == "kv":
            return self.q(x), *self.kv(memory).chunk(2, axis)
        return self.q(x), self.k(memory), self.v(memory)

    def _heads(self, y: Tensor) -> Tensor:
        """Shape: (batch, heads, tokens, head_dim), with as many heads for keys as for queries."""
        y = self.layout.tokens(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return y if y.shape[1] == HEADS else y.repeat_interleave(HEADS // y.shape[1], 1)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within windows of tokens, which become rows of the batch."""
        rows = len(q)
        q, k, v = (y.unflatten(2, (-1, WINDOW)).transpose(1, 2).flatten(0, 1) for y in (q, k, v))
        return self._attend(q, k, v, None).unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: State | None) -> Tensor:
        """Shape: (batch, heads, tokens, head_dim)."""
        if self.kind == "linear":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            return (q @ (k.mT @ v)) / (q @ k.sum(2, keepdim=True).mT)
        if self.kind == "sparse":
            return _sparse(q, k, v)
        if self.kind == "talking":
            weights = self._over_heads(self.mix_before, scores(q, k, "hand")).softmax(-1)
            return self._over_heads(self.mix_after, weights) @ v
        if self.kind == "residual_scores" and state is not None:
            found = scores(q, k, "hand")
            state["scores"] = found + state["scores"] if "scores" in state else found
            return state["scores"].softmax(-1) @ v
        if self.core == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        return mixed(scores(q, k, self.core).softmax(-1), v, self.core)

    @staticmethod
    def _over_heads(mix: nn.Module, x: Tensor) -> Tensor:
        return mix(x.movedim(1, -1)).movedim(-1, 1)


def _sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the queries that stand out on a sample of the keys; the others get the mean value (Informer)."""
    sampled = scores(q, k[:, :, ::2], "hand")
    top = (sampled.amax(-1) - sampled.mean(-1)).topk(3, -1).indices[..., None]  # (batch, heads, 3, 1)
    chosen = q.gather(2, top.expand(-1, -1, -1, q.shape[-1]))
    update = scores(chosen, k, "hand").softmax(-1) @ v
    context = v.mean(2, keepdim=True).expand_as(q).clone()
    return context.scatter(2, top.expand_as(update), update)


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, whose projections are one Parameter."""

    kinds = ("attention",)

    def __init__(self, width: int, *, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=batch_first)
        parts = {"q": (0, width), "k": (width, 2 * width), "v": (2 * width, 3 * width)}
        self.weights = {part: [Weight(self.attn, "in_proj_weight", ((part, (span,)),))] for part, span in parts.items()}

    def forward(self, x: Tensor) -> Tensor:
        """Attend to x itself."""
        return self.attn(x, x, x, need_weights=False)[0]


class ConvMix(nn.Module):
    """Mix tokens with pointwise convolutions over their axis, as in an MLP-Mixer."""

    kinds = ("mixer",)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(TOKENS, 2 * TOKENS, 1), nn.Conv1d(2 * TOKENS, TOKENS, 1)
        self.weights: dict[str, list[Weight]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (batch, tokens, features)."""
        return self.down(F.gelu(self.up(x)))


class TokenMLP(nn.Module):
    """Mix tokens with an MLP on the transposed tensor."""

    kinds = ("mixer",)

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.up, self.down = make(TOKENS, 2 * TOKENS), make(2 * TOKENS, TOKENS)
        self.weights: dict[str, list[Weight]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (batch, tokens, features)."""
        return self.down(F.gelu(self.up(x.mT))).mT
