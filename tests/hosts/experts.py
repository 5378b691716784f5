"""Mixtures of experts: every way to choose experts, with every way to hold them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import WIDTH, FeedForward, Pre

EXPERTS = 3


def top2(scores: Tensor) -> Tensor:
    """Weigh the two best by the softmax of all."""
    weights, chosen = scores.softmax(-1).topk(2)
    return torch.zeros_like(scores).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))


def softmax_of_top2(scores: Tensor) -> Tensor:
    """Weigh the two best by the softmax of these two."""
    best, chosen = scores.topk(2)
    return torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))


def sigmoid_of_top1(scores: Tensor) -> Tensor:
    """Weigh the best by its sigmoid, as Llama 4."""
    best, chosen = scores.topk(1)
    return torch.full_like(scores, -torch.inf).scatter(-1, chosen, best).sigmoid()


def switch(scores: Tensor) -> Tensor:
    """Take the best alone, times its probability."""
    probabilities = scores.softmax(-1)
    return F.one_hot(probabilities.argmax(-1), EXPERTS) * probabilities.max(-1, keepdim=True).values


def all_by_softmax(scores: Tensor) -> Tensor:
    """Weigh all of them."""
    return scores.softmax(-1)


def expert_choice(scores: Tensor) -> Tensor:
    """Let each expert take the tokens that want it most."""
    weights, chosen = scores.softmax(-1).topk(len(scores) // 2, 0)
    return torch.zeros_like(scores).scatter(0, chosen, weights)


ROUTERS: list[Callable[[Tensor], Tensor]] = [top2, softmax_of_top2, sigmoid_of_top1, switch, all_by_softmax, expert_choice]


class Mixture(nn.Module):
    """Experts and what chooses between them. Shape: as x."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.weigh = nn.Linear(WIDTH, EXPERTS), weigh

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weigh(self.router(x.flatten(0, 1)))
        return self.mix(x.flatten(0, 1), weights).view_as(x)


class Listed(Mixture):
    """Experts in a list, which all run."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__(weigh)
        self.experts = nn.ModuleList(FeedForward() for _ in range(EXPERTS))

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class Sparse(Listed):
    """Experts in a list; one that no token chose does not run."""

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            (tokens,) = weights[:, i].nonzero(as_tuple=True)
            if len(tokens):
                out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, i, None])
        return out


class Stacked(Mixture):
    """Experts in two Parameters of three axes."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__(weigh)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH))

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        each = torch.bmm(F.gelu(torch.bmm(x.expand(EXPERTS, -1, -1), self.up)), self.down)
        return (each * weights.t()[:, :, None]).sum(0)


class Dispatched(Stacked):
    """Tokens are put into experts, and their outputs together, by matrix products with the weights, as in GShard."""

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        taken = torch.einsum("te,td->etd", (weights > 0).to(x.dtype), x)
        return torch.einsum("te,etd->td", weights, torch.bmm(F.silu(torch.bmm(taken, self.up)), self.down))


class TwoLayerRouter(Listed):
    """What chooses has a hidden layer."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__(weigh)
        self.router = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, EXPERTS))


class Shared(Listed):
    """One more expert that all tokens take, times a gate of its own."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__(weigh)
        self.shared, self.shared_gate = FeedForward(), nn.Linear(WIDTH, 1)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        return super().mix(x, weights) + self.shared_gate(x).sigmoid() * self.shared(x)


def block_of(mixture: Callable[[], nn.Module]) -> type[Pre]:
    """Return a class of pre-norm blocks whose feed-forward is this mixture."""

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mixture()  # type: ignore[assignment]  # takes and returns the same

    return Block
