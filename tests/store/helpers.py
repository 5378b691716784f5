"""Bases and a config that a new process can make again."""

import torch

import adapterkit as ak

from ..hosts.tiny import Blocks, PostNormBlock, Tiny

CONFIG = ak.BottleneckConfig(targets=["attention.out", "down"], bottleneck_size=3)


def fresh() -> Tiny:
    """The same base each time."""
    torch.manual_seed(7)
    return Tiny(PostNormBlock)


def fresh_encoder(hidden: int = 8, blocks: int = 2) -> Blocks:
    """The same encoder each time: it returns hidden states, for heads on its output."""
    torch.manual_seed(7)
    model = Blocks(PostNormBlock, hidden)
    del model.blocks[blocks:]
    return model.eval()
