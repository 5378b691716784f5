"""Small transformers of every build, written by hand: what discovery has never seen the source of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, VOCAB = 8, 2, 11


class Attention(nn.Module):
    """Attention with a projection each for queries, keys, values and the output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (batch, heads, seq, head_dim)

        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Up, GELU, down."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Experts(nn.Module):
    """Two experts; each token goes to the likelier one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(x).softmax(-1).topk(1)
        out = sum((chosen == i) * weights * expert(x) for i, expert in enumerate(self.experts))
        return out, chosen


class Pre(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); its addends pass one shared dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), FeedForward()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class InPlace(Pre):
    """The residual additions are in place: `x += branch`."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.attention(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class Post(Pre):
    """norm(x + attention(x)), then norm(x + feed-forward(x))."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.attention(x) + x)
        return self.norm2(self.mlp(x) + x)


class ByHand(nn.Module):
    """A layer norm in plain arithmetic, as DeBERTa's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / self.spread(centred) + self.bias

    def spread(self, centred: Tensor) -> Tensor:
        return torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-7)


class ByDeviation(ByHand):
    """Divides by the standard deviation as torch has it."""

    def spread(self, centred: Tensor) -> Tensor:
        return centred.std(-1, keepdim=True) + 1e-7


class PostByHand(Post):
    """Post-norm, with norms that no class of torch is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = ByHand(), ByDeviation()


class Sandwich(Pre):
    """Each branch is normalised before it and at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.end1, self.end2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.end1(self.attention(self.norm1(x)))
        return x + self.end2(self.mlp(self.norm2(x)))


class Parallel(Pre):
    """x + (attention(z) + feed-forward(z)), as in GPT-J."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        return self.attention(z) + self.mlp(z) + x


class Scaled(Pre):
    """LayerScale as a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.attention(self.norm1(x))
        return x + self.gamma * self.mlp(self.norm2(x))


class Mixture(Pre):
    """The feed-forward is a mixture of experts, which returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp: Any = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))[0]


class Convolution(Pre):
    """A causal convolution over tokens, and gating."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: Any = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.GELU(), nn.Conv1d(WIDTH, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm2(x))


class Functional(Pre):
    """Its branches are computed by functions of bare parameters: there is nothing to hook."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        return x + torch.relu(z @ self.mlp.up.weight.T) @ self.mlp.down.weight.T


class Decoder(Pre):
    """A cross-attention between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3, self.cross = nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.cross(self.norm3(x), memory)
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Embedding, blocks, a final norm, a head."""

    def __init__(self, block: type[Pre], layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class EncoderDecoder(nn.Module):
    """Two stacks; the decoder looks at what the encoder returns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.encoder = nn.ModuleList(Pre() for _ in range(2))
        self.decoder = nn.ModuleList(Decoder() for _ in range(2))

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory, x = self.embedding(input_ids), self.embedding(decoder_input_ids)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            x = block(x, memory)
        return x


def randomised(model: nn.Module) -> nn.Module:
    """The model in eval mode with every parameter drawn anew, norms and scales too."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return model.eval()
