"""Hosts whose Parameters are tied, read around their module, several in one tensor, or not read at all."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Experts(nn.Module):
    """A mixture of experts that keeps its weights in one tensor, (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4, 6))
        self.register_parameter("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("...i,eoi->...eo", x, self.up).relu()
        return torch.einsum("...eo,eio->...i", hidden, self.down)


class ReadsAround(nn.Module):
    """Reads a child's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.proj.weight, self.proj.bias))


class Tied(nn.Module):
    """An embedding whose weight is that of the output layer, and a bias that two modules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.second = nn.Linear(7, 7)
        self.second.bias = self.head.bias

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.head(self.embed(ids)))


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's and BART's do."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4.0


class Plain(nn.Linear):
    """A linear layer that spells out what it does, as Falcon's does."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Skips(nn.Module):
    """Has a part that runs for some inputs only, as the vision tower of a language model does."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.vision = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
        return self.text(x if pixels is None else x + self.vision(pixels))


class Keywords(nn.Linear):
    """A layer with a second argument, which some call first."""

    def forward(self, input: Tensor, scale: Tensor | None = None) -> Tensor:  # noqa: A002  # torch's name
        return super().forward(input)


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Keywords(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(scale=torch.ones(6) * 9, input=x)


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class SharedLayers(nn.Module):
    """Two blocks that hold one weight and bias, and may be checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):

            def block(x: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(x.sin()).tanh()

            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class AroundToo(nn.Module):
    """Calls an embedding, and reads its weight around it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.emb(ids).tanh() @ self.emb.weight.T
