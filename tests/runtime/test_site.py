"""The adapted model's `state_dict`: base checkpoints load strictly, adapters are in it, halves are refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.runtime.site import AdapterSite

from ..hosts.tiny import PostNormBlock, Tiny, randomise

CONFIG = ak.BottleneckConfig(targets=["attention.out", "down"], bottleneck_size=3)


@pytest.fixture
def kit(post_norm: Tiny) -> ak.AdapterKit:
    kit = ak.wrap(post_norm)
    for name in ("a", "a.b"):
        kit.add(name, CONFIG, heads=["classifier"])
        randomise(kit, name)
    return kit


def test_a_base_checkpoint_loads_strictly_into_an_adapted_model(kit: ak.AdapterKit, ids: Tensor) -> None:
    other = Tiny(PostNormBlock)
    kit.activate("a")
    adapters = {name: value.clone() for name, value in kit.state_dict("a").items()}
    assert str(kit.model.load_state_dict(other.state_dict(), strict=True)) == "<All keys matched successfully>"
    with kit.base():
        assert torch.equal(kit.model(ids), other(ids))
    assert all(torch.equal(kit.state_dict("a")[name], value) for name, value in adapters.items())


def test_a_base_checkpoint_of_a_part_loads_strictly_too(kit: ak.AdapterKit) -> None:
    kit.model.blocks[1].load_state_dict(PostNormBlock(8).state_dict(), strict=True)


def test_a_model_inside_another_loads_strictly_too(kit: ak.AdapterKit) -> None:
    nn.ModuleDict({"outer": kit.model}).load_state_dict(nn.ModuleDict({"outer": Tiny(PostNormBlock)}).state_dict())


def test_the_whole_state_holds_adapters_and_loads_back(kit: ak.AdapterKit, ids: Tensor) -> None:
    state = copy.deepcopy(kit.model.state_dict())
    kit.activate("a.b")
    expected = kit.model(ids)
    for name in ("a", "a.b"):
        randomise(kit, name)
    assert not torch.equal(kit.model(ids), expected)
    kit.model.load_state_dict(state, strict=True)
    assert torch.equal(kit.model(ids), expected)


def test_a_file_with_one_adapter_of_two_loads(kit: ak.AdapterKit) -> None:
    state = {key: value for key, value in kit.model.state_dict().items() if "_adapterkit.a." not in key}
    assert len(state) < len(kit.model.state_dict())
    kit.model.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    "lost",
    [
        "blocks.0.attention.out._adapterkit.a.",
        "blocks.0.down._adapterkit.a.",
        "blocks.1.down._adapterkit.a.",
        "out._adapterkit.a.up_bias",
    ],
)
def test_a_file_with_part_of_an_adapter_is_an_error_that_names_the_rest(kit: ak.AdapterKit, lost: str) -> None:
    state = kit.model.state_dict()
    gone = [key for key in state if lost in key]
    with pytest.raises(RuntimeError, match="Missing key") as error:
        kit.model.load_state_dict({key: value for key, value in state.items() if key not in gone}, strict=True)
    assert gone
    assert all(repr(key)[1:-1] in str(error.value) for key in gone)
    loaded: Any = kit.model.load_state_dict({k: v for k, v in state.items() if k not in gone}, strict=False)
    assert sorted(loaded.missing_keys) == sorted(gone)


def test_an_adapter_that_the_model_lacks_is_unexpected(kit: ak.AdapterKit) -> None:
    state = kit.model.state_dict()
    kit.remove("a")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_adapterkit.a.down_weight"):
        kit.model.load_state_dict(state)


def test_a_missing_base_key_is_still_missing(kit: ak.AdapterKit) -> None:
    state = Tiny(PostNormBlock).state_dict()
    del state["blocks.0.down.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "blocks.0.down.bias". $'):
        kit.model.load_state_dict(state)


def test_a_base_checkpoint_can_be_taken_from_an_adapted_model(kit: ak.AdapterKit) -> None:
    with kit.base_checkpoint():
        state = kit.model.state_dict()
        assert list(state) == list(Tiny(PostNormBlock).state_dict())
        assert "blocks.0.down._adapterkit.a.up_bias" not in kit.model.blocks[0].state_dict(prefix="blocks.0.")
    assert len(kit.model.state_dict()) > len(state)


def test_functional_call_reaches_the_adapters(kit: ak.AdapterKit, ids: Tensor) -> None:
    kit.activate("a")
    changed = {name: torch.randn_like(p) for name, p in kit.named_parameters("a", heads=False)}
    output = torch.func.functional_call(kit.model, changed, (ids,))
    assert not torch.equal(output, kit.model(ids))
    kit.model.load_state_dict({**kit.model.state_dict(), **changed})
    torch.testing.assert_close(kit.model(ids), output)


def test_an_adapter_site_is_never_run(kit: ak.AdapterKit) -> None:
    site = kit.model.classifier._adapterkit
    assert isinstance(site, AdapterSite)
    with pytest.raises(ak.AdapterKitError, match="'classifier' runs all of its children"):
        site(torch.zeros(1))
