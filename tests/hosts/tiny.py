"""The smallest transformers: two blocks of width 8, with each norm after its addition or before its sub-layer."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Single-head self-attention that returns (output, weights)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.out = nn.Linear(hidden, hidden)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = self.query(hidden_states) @ self.key(hidden_states).transpose(-1, -2)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return self.out(weights @ self.value(hidden_states)), weights


class PostNormBlock(nn.Module):
    """The block of BERT: each norm after its addition."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention, self.norm_1 = Attention(hidden), nn.LayerNorm(hidden)
        self.up, self.down, self.norm_2 = nn.Linear(hidden, 16), nn.Linear(16, hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(self.attention(hidden_states=x)[0] + x)
        return self.norm_2(self.down(torch.relu(self.up(x))) + x)


class PreNormBlock(nn.Module):
    """The block of GPT-2: each norm before its sub-layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm_1, self.attention, self.norm_2 = nn.LayerNorm(hidden), Attention(hidden), nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 16), nn.ReLU(), nn.Linear(16, hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))[0]
        return x + self.mlp(self.norm_2(x))


class Tiny(nn.Module):
    """Embedding, two blocks, a classifier."""

    def __init__(self, block: type[nn.Module], hidden: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, hidden)
        self.blocks = nn.ModuleList([block(hidden) for _ in range(2)])
        self.classifier = nn.Linear(hidden, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(1))


class Checkpointed(Tiny):
    """A model that checkpoints its blocks, if asked to."""

    reentrant: bool | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.classifier(x.mean(1))


class Blocks(Tiny):
    """`Tiny` without what comes after its blocks."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


class CheckpointedBlocks(Blocks):
    """`Blocks` that keeps nothing of its blocks for the backward."""

    reentrant = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def randomise(kit: object, name: str) -> None:
    """Give every parameter of an adapter a random value, so that it does something."""
    with torch.no_grad():
        for parameter in kit.parameters(name, heads=False):  # type: ignore[attr-defined]  # any kit
            parameter.copy_(torch.randn(parameter.shape) / 4)
