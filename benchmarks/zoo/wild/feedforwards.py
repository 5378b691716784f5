"""Feed-forwards, dense and of experts, each of which says which projections come first and last in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import Layout, Make
from .spec import Spec
from .weights import Weight, whole

__all__ = ["Conv", "Dense", "Experts", "feedforward_of"]

EXPERTS = 3


def feedforward_of(spec: Spec, width: int, layout: Layout, make: Make) -> nn.Module:
    """Make the feed-forward of a spec."""
    if spec.feedforward == "conv":
        return Conv(width, layout)
    if spec.feedforward == "moe":
        return Experts(spec, width, layout, nn.Linear if layout.axis != -1 else make)
    return Dense(spec.feedforward, width, layout.axis, make)


class Dense(nn.Module):
    """Up, GELU, down; or down(silu(gate) * up), with gate and up apart or as one.

    Attributes:
        weights: What the roles of its projections name.
        kinds: What it is, in the library's words.
    """

    kinds = ("feedforward",)

    def __init__(self, kind: str, width: int, axis: int, make: Make) -> None:
        super().__init__()
        self.kind, self.axis, inner = kind, axis, 2 * width
        self.up = make(width, 2 * inner if kind == "glu_fused" else inner)
        if kind == "glu":
            self.gate = make(width, inner)
        self.down = make(inner, width)
        first = [whole(self.up), whole(self.gate)] if kind == "glu" else [whole(self.up)]
        self.weights: dict[str, list[Weight]] = {"first": first, "last": [whole(self.down)]}

    def forward(self, x: Tensor) -> Tensor:
        """Each token for itself."""
        if self.kind == "mlp":
            return self.down(F.gelu(self.up(x)))
        up, gate = (self.up(x), self.gate(x)) if self.kind == "glu" else self.up(x).chunk(2, self.axis)
        return self.down(F.silu(gate) * up)


class Conv(nn.Module):
    """Two convolutions over neighbouring tokens, as in FastSpeech."""

    kinds = ("convolution", "feedforward")  # a matter of words

    def __init__(self, width: int, layout: Layout) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(width, 2 * width, 3, padding=1), nn.Conv1d(2 * width, width, 1)
        self.layout = layout
        self.weights: dict[str, list[Weight]] = {"first": [whole(self.up)], "last": [whole(self.down)]}

    def forward(self, x: Tensor) -> Tensor:
        """In any layout: the convolutions see (batch, features, tokens)."""
        y = self.down(F.relu(self.up(self.layout.tokens(x).mT)))
        return self.layout.back(y.mT, x)


class Experts(nn.Module):
    """A mixture of experts with one kind of router; each expert up, GELU, down.

    The weights of all experts for all tokens are one matrix `combine`, (tokens, experts), but for Soft-MoE.
    """

    def __init__(self, spec: Spec, width: int, layout: Layout, make: Make) -> None:
        super().__init__()
        self.router_kind, self.kind, self.layout = spec.router, spec.experts, layout
        # Soft-MoE mixes the tokens that it gives to an expert: a matter of words.
        self.kinds = ("feedforward", "mixer") if spec.router == "soft" else ("feedforward",)
        if spec.router != "hash":
            self.router = nn.Linear(width, EXPERTS, bias=False)
        if spec.router == "sigmoid":
            self.register_buffer("correction", torch.tensor([0.1, -0.1, 0.0]))
        if spec.experts == "tensor":
            self.w_up = nn.Parameter(torch.randn(EXPERTS, width, 2 * width) / width**0.5)
            self.w_down = nn.Parameter(torch.randn(EXPERTS, 2 * width, width) / width**0.5)
            self.weights = {"first": [Weight(self, "w_up")], "last": [Weight(self, "w_down")]}
            return
        self.experts = nn.ModuleList(Dense("mlp", width, -1, make) for _ in range(EXPERTS))
        held = list(self.experts)
        if spec.experts == "shared":
            self.shared = Dense("mlp", width, -1, make)
            held.append(self.shared)
        self.weights = {word: [weight for one in held for weight in one.weights[word]] for word in ("first", "last")}

    def forward(self, x: Tensor) -> Tensor:
        """In any layout; the router sees (batch, tokens, features)."""
        tokens = self.layout.tokens(x)
        flat = tokens.flatten(0, 1)
        out = self._slots(tokens).flatten(0, 1) if self.router_kind == "soft" else self._routed(flat, tokens.shape[1])
        if self.kind == "shared":
            out = out + self.shared(flat)
        return self.layout.back(out.view_as(tokens), x)

    def _routed(self, flat: Tensor, length: int) -> Tensor:
        combine = self._combine(flat, length)
        if self.kind == "tensor":  # all experts on all tokens
            hidden = F.gelu(torch.einsum("td,edh->eth", flat, self.w_up))
            return torch.einsum("te,etd->td", combine, torch.einsum("eth,ehd->etd", hidden, self.w_down))
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):  # each on its own tokens
            rows = combine[:, i].nonzero()[:, 0]
            out.index_add_(0, rows, expert(flat[rows]) * combine[rows, i, None])
        return out

    def _combine(self, flat: Tensor, length: int) -> Tensor:
        """Return each expert's weight for each token. Shape: (tokens, experts)."""
        if self.router_kind == "hash":
            return F.one_hot(torch.arange(len(flat)) % length % EXPERTS, EXPERTS).to(flat)
        logits = self.router(flat)
        if self.router_kind == "dense":
            return logits.softmax(-1)
        if self.router_kind == "expert_choice":  # each expert takes the tokens that want it most
            weights = logits.softmax(-1)
            value, index = weights.topk(len(flat) // 2, 0)
            return torch.zeros_like(weights).scatter(0, index, value)
        if self.router_kind == "sigmoid":
            weights = logits.sigmoid()
            index = (weights + self.correction).topk(2, -1).indices
            value = weights.gather(-1, index)
            return torch.zeros_like(weights).scatter(-1, index, value / value.sum(-1, keepdim=True))
        weights = logits.softmax(-1)
        value, index = weights.topk(1 if self.router_kind == "top1" else 2, -1)
        value = value if self.router_kind == "top1" else value / value.sum(-1, keepdim=True)
        return torch.zeros_like(weights).scatter(-1, index, value)

    def _slots(self, tokens: Tensor) -> Tensor:
        """Give each expert one weighted mean of all tokens, and each token a weighted mean of the results (Soft-MoE)."""
        logits = self.router(tokens)  # (batch, tokens, experts)
        slots = torch.einsum("bte,btd->bed", logits.softmax(1), tokens)
        if self.kind == "tensor":
            out = torch.einsum("beh,ehd->bed", F.gelu(torch.einsum("bed,edh->beh", slots, self.w_up)), self.w_down)
        else:
            out = torch.stack([expert(slots[:, i]) for i, expert in enumerate(self.experts)], 1)
        return torch.einsum("bte,bed->btd", logits.softmax(-1), out)
