"""A kit with two adapters, and a method that scales a host's inputs or outputs."""

import pytest
from torch import Tensor

import adapterkit as ak

from ...hosts.merging import Scaling, ScalingConfig
from ...hosts.tiny import PostNormBlock, Tiny
from .helpers import adapted


@pytest.fixture
def kit(ids: Tensor) -> ak.AdapterKit:
    return adapted(Tiny(PostNormBlock), "a", "b", inputs=ids)


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit import methods
    from adapterkit.lifecycle import add, build

    for module in (methods, add, build):
        known = module.method_of
        monkeypatch.setattr(
            module, "method_of", lambda c, known=known: Scaling() if isinstance(c, ScalingConfig) else known(c)
        )
