"""Models of images and latents: modulated blocks, long skips, convolutions, windows, cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import DEPTH, HEADS, WIDTH, Attention, Block, FeedForward

__all__ = ["ConvNeXt", "DiT", "Flamingo", "Perceiver", "UViT", "Windows"]


class _Modulated(nn.Module):
    """x + gate * f(norm(x) * (1 + scale) + shift), all three made of the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = Attention(), FeedForward()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Patches of a noisy image, a time and a label."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.time, self.label = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(1, WIDTH), nn.Embedding(5, WIDTH)
        self.position = nn.Parameter(torch.randn(16, WIDTH))
        self.blocks = nn.ModuleList(_Modulated() for _ in range(DEPTH))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position  # (batch, patches, hidden)
        condition = self.time(t[:, None]) + self.label(y)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(self.norm(x))


class _SkipBlock(Block):
    """A block that takes the output of an earlier one beside its input."""

    def __init__(self, *, has_skip: bool) -> None:
        super().__init__(Attention(), FeedForward())
        self.skip_linear = nn.Linear(2 * WIDTH, WIDTH) if has_skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))  # type: ignore[list-item]  # given where there is one
        return super().forward(x)


class UViT(nn.Module):
    """The first blocks' outputs are concatenated to the last blocks' inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.in_blocks = nn.ModuleList(_SkipBlock(has_skip=False) for _ in range(DEPTH))
        self.mid_block = _SkipBlock(has_skip=False)
        self.out_blocks = nn.ModuleList(_SkipBlock(has_skip=True) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        x, skips = self.patches(image).flatten(2).transpose(1, 2), []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.norm(x)


class _ChannelsFirstNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, correction=0) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class _ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), _ChannelsFirstNorm(channels)
        self.pwconv1, self.pwconv2 = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.pwconv2(nn.functional.gelu(self.pwconv1(self.norm(self.dwconv(x)))))


class ConvNeXt(nn.Module):
    """Stages of blocks with the channels on axis 1 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.stage1 = nn.Sequential(*(_ConvBlock(16) for _ in range(2)))
        self.down, self.stage2 = nn.Conv2d(16, 32, 2, 2), nn.Sequential(*(_ConvBlock(32) for _ in range(2)))
        self.head = nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stage2(self.down(self.stage1(self.stem(image)))).mean((-2, -1)))


class _WindowBlock(Block):
    """Attention in windows of an image that is rolled in every second block. Shape: (batch, height, width, hidden)."""

    def __init__(self, shift: int) -> None:
        super().__init__(Attention(), FeedForward())
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.windows(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def windows(self, x: Tensor) -> Tensor:
        """Shape: as the input."""
        batch, height, width, _ = x.shape
        x = x.roll((-self.shift, -self.shift), (1, 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)  # (batch, rows, columns, 2, 2, hidden)
        x = self.mixer(x.flatten(3, 4).flatten(0, 2))  # (windows, tokens, hidden)
        x = x.view(batch, height // 2, width // 2, 2, 2, -1).transpose(2, 3).reshape(batch, height, width, -1)
        return x.roll((self.shift, self.shift), (1, 2))


class Windows(nn.Module):
    """Two stages, between which patches are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.layers = nn.ModuleList(nn.ModuleList(_WindowBlock(shift) for shift in (0, 1)) for _ in range(2))
        self.merge, self.norm = nn.Linear(4 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).permute(0, 2, 3, 1)  # (batch, height, width, hidden)
        for number, layer in enumerate(self.layers):
            if number:
                x = self.merge(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1))
            for block in layer:
                x = block(x)
        return self.norm(x)


class _LatentBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4, self.context_norm = (nn.LayerNorm(WIDTH) for _ in range(5))
        self.cross, self.cross_mlp = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), FeedForward()
        self.attention, self.mlp = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), FeedForward()

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        context, x = self.context_norm(context), self.norm1(latents)
        x = latents + self.cross(x, context, context)[0]
        x = x + self.cross_mlp(self.norm2(x))
        y = self.norm3(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.mlp(self.norm4(x))


class Perceiver(nn.Module):
    """A few learned latents look at a long input, then at one another."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.inputs = nn.Parameter(torch.randn(5, WIDTH)), nn.Linear(12, WIDTH)
        self.blocks = nn.ModuleList(_LatentBlock() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        context, latents = self.inputs(x), self.latents.expand(len(x), -1, -1)
        for block in self.blocks:
            latents = block(latents, context)
        return self.head(latents.mean(1))


class _Gated(Block):
    """Cross-attention and a feed-forward, each behind the tanh of a learned number."""

    def __init__(self) -> None:
        super().__init__(Attention(), FeedForward())
        self.attn_gate, self.ff_gate = nn.Parameter(torch.tensor([0.4])), nn.Parameter(torch.tensor([0.6]))

    def forward(self, x: Tensor, media: Tensor) -> Tensor:  # type: ignore[override]  # takes what it looks at, too
        x = x + self.mixer(self.norm1(x), media) * self.attn_gate.tanh()
        return x + self.mlp(self.norm2(x)) * self.ff_gate.tanh()


class Flamingo(nn.Module):
    """A gated cross-attention to an image before each block of text."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(12, WIDTH), nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Gated(), Block(Attention(causal=True), FeedForward())]) for _ in range(DEPTH)
        )

    def forward(self, text: Tensor, media: Tensor) -> Tensor:
        x, media = self.text(text), self.image(media)
        for cross, block in self.layers:
            x = block(cross(x, media))
        return x
