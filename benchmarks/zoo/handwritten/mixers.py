"""Models that mix tokens by something else than attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import HEADS, WIDTH, Block, FeedForward, Gated

__all__ = ["GMLP", "RWKV", "FNet", "LinearAttention", "Mamba", "mlp_mixer", "retnet"]


class _StateSpace(nn.Module):
    """A selective state space, one position after the other."""

    inner, states = 2 * WIDTH, 4

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 2 * self.inner), nn.Linear(self.inner, WIDTH)
        self.conv1d = nn.Conv1d(self.inner, self.inner, 3, padding=2, groups=self.inner)
        self.x_proj, self.dt_proj = nn.Linear(self.inner, 2 + 2 * self.states), nn.Linear(2, self.inner)
        self.a_log = nn.Parameter(torch.arange(1.0, self.states + 1).log().repeat(self.inner, 1))
        self.d = nn.Parameter(torch.ones(self.inner))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :-2].transpose(1, 2))  # (batch, seq, inner)
        step, b, c = self.x_proj(x).split([2, self.states, self.states], -1)
        step = F.softplus(self.dt_proj(step))[..., None]
        decay = torch.exp(-step * self.a_log.exp())  # (batch, seq, inner, states)
        state, rows = torch.zeros_like(decay[:, 0]), []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + (step * x[..., None])[:, i] * b[:, i, None]
            rows.append((state * c[:, i, None]).sum(-1))
        return self.out_proj((torch.stack(rows, 1) + self.d * x) * F.silu(gate))


class Mamba(nn.Module):
    """A single branch for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(WIDTH), _StateSpace()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class _Retention(nn.Module):
    """Products of queries and keys that decay with distance, without softmax; a norm and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5))
        self.norm = nn.RMSNorm(WIDTH // HEADS, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at[None]
        decay = (1 - 2.0 ** -torch.arange(2, 2 + HEADS))[:, None, None] ** distance.clamp(min=0) * (distance >= 0)
        out = self.norm((q @ k.transpose(-1, -2) * decay) @ v).transpose(1, 2).flatten(2)
        return self.o(F.silu(self.g(x)) * out)


def retnet() -> Block:
    """Retention and a gated feed-forward."""
    return Block(_Retention(), Gated(), nn.RMSNorm)


class _Kernel(nn.Module):
    """Attention whose softmax is left out, so that keys and values are multiplied first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        out = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(2)[..., None])
        return self.o(out.transpose(1, 2).flatten(2))


class LinearAttention(Block):
    """Post-norm, with linear attention."""

    def __init__(self) -> None:
        super().__init__(_Kernel(), FeedForward())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.mixer(x))
        return self.norm2(x + self.mlp(x))


class _TimeMix(nn.Module):
    """A running weighted mean over the positions before."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((3, WIDTH), 0.4))
        self.decay, self.first = nn.Parameter(torch.linspace(-2, 0.5, WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.receptance, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        r, k, v = (x * m + F.pad(x, (0, 0, 1, -1)) * (1 - m) for m in self.mix)
        r, k, v = self.receptance(r).sigmoid(), self.key(k).clamp(max=8), self.value(v)
        total = weight = torch.zeros_like(k[:, 0])
        rows = []
        for i in range(x.shape[1]):
            now = torch.exp(self.first + k[:, i])
            rows.append((total + now * v[:, i]) / (weight + now))
            fade, add = torch.exp(-torch.exp(self.decay)), torch.exp(k[:, i])
            total, weight = fade * total + add * v[:, i], fade * weight + add
        return self.output(r * torch.stack(rows, 1))


class _ChannelMix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((2, WIDTH), 0.4))
        self.receptance, self.key = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 64, bias=False)
        self.value = nn.Linear(64, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        r, k = (x * m + F.pad(x, (0, 0, 1, -1)) * (1 - m) for m in self.mix)
        return self.receptance(r).sigmoid() * self.value(self.key(k).relu() ** 2)


class RWKV(nn.Module):
    """Time mixing and channel mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.att, self.ln2, self.ffn = nn.LayerNorm(WIDTH), _TimeMix(), nn.LayerNorm(WIDTH), _ChannelMix()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class _OverTokens(nn.Module):
    """A feed-forward over the positions, for each feature."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.mlp = FeedForward(length, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


def mlp_mixer(length: int) -> Block:
    """Feed-forwards over positions and over features in turn."""
    return Block(_OverTokens(length), FeedForward())


class GMLP(nn.Module):
    """One branch: up, a gate made of the other positions, down."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(32, WIDTH)
        self.gate_norm, self.spatial = nn.LayerNorm(32), nn.Linear(length, length)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        gate = self.spatial(self.gate_norm(gate).transpose(1, 2)).transpose(1, 2)
        return x + self.down(value * gate)


class _Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real


class FNet(Block):
    """Post-norm, with a Fourier transform over positions and features."""

    def __init__(self) -> None:
        super().__init__(_Fourier(), FeedForward())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.mixer(x))
        return self.norm2(x + self.mlp(x))
