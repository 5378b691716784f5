"""A base and a config that a new process can make again."""

import torch

import adapterkit as ak

from ..hosts.tiny import PostNormBlock, Tiny

CONFIG = ak.BottleneckConfig(targets=["attention.out", "down"], bottleneck_size=3)


def fresh() -> Tiny:
    """The same base each time."""
    torch.manual_seed(7)
    return Tiny(PostNormBlock)
