"""Models in the manner of nanoGPT, x-transformers and open_clip."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import DEPTH, HEADS, TOKENS, VOCAB, WIDTH, rotated

__all__ = ["NanoGPT", "OpenCLIP", "XTransformer"]


class _Norm(nn.Module):
    """A layer norm whose bias can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class _CausalAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.resid_dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(x).split(WIDTH, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).flatten(2)))


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class _GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = _Norm(), _CausalAttention(), _Norm(), _MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Fused projections, norms without bias, learned positions, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(16, WIDTH),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(_GPTBlock() for _ in range(DEPTH)),
                "ln_f": _Norm(),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        parts = self.transformer
        x = parts.drop(parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1])))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _ByProducts(nn.Module):
    """Attention as explicit products, with a bias on its scores."""

    def __init__(self, *, alibi: bool, rotary: bool, causal: bool) -> None:
        super().__init__()
        self.alibi, self.rotary, self.causal = alibi, rotary, causal
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        distance = torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None]  # (queries, keys)
        if self.alibi:
            scores = scores - 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None] * distance.abs()
        if self.causal:
            scores = scores.masked_fill(distance > 0, -torch.finfo(scores.dtype).max)
        out = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class _GLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class _Residual(nn.Module):
    """The addition as a module: the stream times a learned scale, if asked for, and a gate of the branch."""

    def __init__(self, *, scaled: bool, gate: str | None) -> None:
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(WIDTH)) if scaled else None
        self.gate = nn.Linear(WIDTH, 1) if gate == "sigmoid" else None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.residual_scale is not None:
            residual = residual * self.residual_scale
        if self.gate is not None:
            x = x * self.gate(residual).sigmoid()
        return x + residual


class _GRUGate(nn.Module):
    """A recurrent cell in the place of the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.gru(x.flatten(0, 1), residual.flatten(0, 1)).view_as(x)


class XTransformer(nn.Module):
    """Layers as lists of a norm, a block and a residual module; what they are is a string beside them."""

    def __init__(
        self,
        kinds: str = "af",
        *,
        gate: Literal["sigmoid", "gru"] | None = None,
        scale_residual: bool = False,
        alibi: bool = False,
        pre_norm: bool = True,
    ) -> None:
        super().__init__()
        self.kinds, self.pre_norm = kinds * DEPTH, pre_norm
        self.token_emb, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList()
        for kind in self.kinds:
            attention = _ByProducts(alibi=alibi and kind == "a", rotary=kind == "a" and not alibi, causal=kind == "a")
            block = nn.Sequential(_GLU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH)) if kind == "f" else attention
            residual = _GRUGate() if gate == "gru" else _Residual(scaled=scale_residual, gate=gate)
            self.layers.append(nn.ModuleList([nn.LayerNorm(WIDTH), block, residual]))
        self.final_norm, self.to_logits = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.token_emb(x)
        for kind, (norm, block, residual_fn) in zip(self.kinds, self.layers, strict=True):
            residual = x
            if self.pre_norm:
                x = norm(x)
            x = residual_fn(block(x, context=context) if kind == "c" else block(x), residual)
            if not self.pre_norm:
                x = norm(x)
        return self.to_logits(self.final_norm(x))


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _CLIPBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS), _Scale()
        self.mlp = nn.Sequential()
        for name, layer in (("c_fc", nn.Linear(WIDTH, 64)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(64, WIDTH))):
            self.mlp.add_module(name, layer)
        self.ln_2, self.ls_2 = nn.LayerNorm(WIDTH), _Scale()

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Shape: (seq, batch, hidden)."""
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.ls_1(self.attention(self.ln_1(x), mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class _Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_CLIPBlock() for _ in range(DEPTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.permute(1, 0, 2)  # (seq, batch, hidden)
        for block in self.resblocks:
            x = block(x, mask)
        return x.permute(1, 0, 2)  # (batch, seq, hidden)


class _Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(WIDTH), _Tower(), nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (batch, patches, hidden)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x)))[:, 0] @ self.proj


class OpenCLIP(nn.Module):
    """An image and a text tower whose blocks have the batch on axis 1, and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer = _Visual(), _Tower()
        self.token_embedding, self.ln_final = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 16) / 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("attn_mask", torch.full((TOKENS, TOKENS), -torch.inf).triu(1), persistent=False)

    def encode_text(self, text: Tensor) -> Tensor:
        """Shape: (batch, seq) to (batch, 16)."""
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        features = [F.normalize(x, dim=-1) for x in (self.visual(image), self.encode_text(text))]
        return {"image_features": features[0], "text_features": features[1], "logit_scale": self.logit_scale.exp()}
