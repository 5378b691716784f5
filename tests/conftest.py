"""Fixtures of all tests: the same random state before each, and the tiny hosts."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from .hosts.tiny import PostNormBlock, PreNormBlock, Tiny

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=40)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.fixture
def post_norm() -> Tiny:
    return Tiny(PostNormBlock)


@pytest.fixture
def pre_norm() -> Tiny:
    return Tiny(PreNormBlock)


@pytest.fixture
def ids() -> Tensor:
    """Token ids, (batch 3, seq 5)."""
    return torch.randint(0, 11, (3, 5))
