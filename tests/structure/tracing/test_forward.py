"""One forward, looked at, in whatever modes of torch the caller is."""

from pathlib import Path

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.structure.anatomy import discover as discovery
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.tracing.forward import forward

from ...hosts.blocks import VOCAB, WIDTH, Model, Post, Pre, randomised

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


@pytest.mark.parametrize("made_inside", [False, True])
def test_an_adapter_added_in_inference_mode_can_be_trained_after_it(tmp_path: Path, made_inside: bool) -> None:
    model = randomised(Model(Pre))
    kit = ak.wrap(model)
    with torch.inference_mode():
        if made_inside:
            model.embedding = nn.Embedding(VOCAB, WIDTH)  # of no use in a backward, which does not need it
        kit.add("a", "houlsby", heads=["blocks.1.norm2"])
        kit.load(kit.save("a", tmp_path), "b")
        kit.train_adapter("a")
    for name in "ab":
        assert not any(p.is_inference() for p in kit.parameters(name, heads=True))
        kit.train_adapter(name)
        model(IDS).sum().backward()
        assert all(p.grad is not None for p in kit.parameters(name))


def test_gradients_are_found_in_inference_mode() -> None:
    kit = ak.wrap(randomised(Model(Pre)))
    with torch.inference_mode():
        kit.add("a", "houlsby")
        kit.train_adapter("a")
        assert kit.verify().problems == ()
        assert kit.verify(IDS.clone()).problems == ()
        assert torch.is_inference_mode_enabled()
