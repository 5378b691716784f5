"""Where new modules get their first values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int | None, *, meta: bool) -> Iterator[None]:
    """Make modules within the block on the CPU, from this seed, and leave torch's own random state as it was.

    Args:
        seed: None draws from torch's random state, which moves on then.
        meta: Make them without memory or values, for a file or a sum to fill.
    """
    # devices=[]: nothing is drawn on a GPU, so that no GPU's state need be kept.
    with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.device("meta" if meta else "cpu"):
        if seed is not None:
            torch.manual_seed(seed)
        yield
