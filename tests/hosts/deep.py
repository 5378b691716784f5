"""A model of four blocks, with an adapter that layers can be dropped of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak

from .tiny import PostNormBlock, randomise

LAYERS = 4
CONFIG = ak.BottleneckConfig(targets=["norm_2"], bottleneck_size=3, non_linearity="gelu")


class Deep(nn.Module):
    """Embedding, four blocks (checkpointed if asked for), a classifier."""

    reentrant: bool | None = None

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, hidden)
        self.blocks = nn.ModuleList([PostNormBlock(hidden) for _ in range(LAYERS)])
        self.classifier = nn.Linear(hidden, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.classifier(x.mean(1))


def deep_kit(**settings: Any) -> ak.AdapterKit:
    torch.manual_seed(0)
    kit = ak.wrap(Deep())
    kit.add("a", CONFIG)
    randomise(kit, "a")
    kit.train_adapter("a", **settings)
    return kit


def depth_of(composition: Any) -> int:
    return 0 if composition == "a" else len(composition.layers)
