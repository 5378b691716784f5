"""One forward, looked at, in whatever modes of torch the caller is."""

import pytest
import torch

import adapterkit as ak
from adapterkit.structure import discover as discovery
from adapterkit.structure.discover import discover
from adapterkit.structure.trace import forward

from .hosts import VOCAB, Model, Post, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    discovery._REMEMBERED.clear()


@pytest.mark.parametrize("block", [Pre, Post])
@pytest.mark.parametrize("inputs", [None, IDS], ids=["made", "given"])
def test_autocast_hides_no_structure(block: type[Pre], inputs: torch.Tensor | None) -> None:
    model = randomised(Model(block))
    expected = [(s.kind, s.out, s.norm, s.last) for s in discover(model, inputs)[0].sublayers]
    discovery._REMEMBERED.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [(s.kind, s.out, s.norm, s.last) for s in discover(model, inputs)[0].sublayers]
    assert found == expected


def test_autocast_stays_as_it_is() -> None:
    model = randomised(Model(Pre))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward(model, IDS).dtype == torch.bfloat16
        assert torch.is_autocast_cache_enabled()
        kit = ak.wrap(model)
        kit.add("a", "houlsby")
        kit.train_adapter("a")
        assert kit.verify().problems == ()
        assert torch.is_autocast_cache_enabled()
