"""Removing an adapter takes it out of the weights; weights that somebody else changed meanwhile are left alone."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import adapterkit as ak

from ...hosts.tiny import PostNormBlock, Tiny
from .helpers import close, same, weights


@pytest.mark.parametrize("way", ["remove", "unwrap"])
def test_removing_unmerges_first(kit: ak.AdapterKit, ids: Tensor, way: str) -> None:
    before = weights(kit.model)
    with kit.base():
        plain = kit.model(ids)
    kit.merge("a")
    if way == "remove":
        kit.remove("b")
        assert not same(weights(kit.model), before)
        kit.remove("a")
    else:
        kit.unwrap()
    assert same(weights(kit.model), before)
    assert torch.equal(kit.model(ids), plain)


def test_an_adapter_that_another_thread_runs_is_neither_removed_nor_unmerged(kit: ak.AdapterKit) -> None:
    kit.merge("a")
    running, done = threading.Event(), threading.Event()

    def run() -> None:
        with kit.active("a"):
            running.set()
            done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    running.wait()
    now = weights(kit.model)
    with pytest.raises(ak.ActivationError, match="is running this model with 'a'"):
        kit.remove("a")
    done.set()
    thread.join()
    assert same(weights(kit.model), now)
    assert kit.summary().adapters[0].is_merged


def test_other_adapters_can_be_added_while_one_is_merged(kit: ak.AdapterKit, ids: Tensor) -> None:
    before, expected = weights(kit.model), kit.model(ids)
    kit.merge("a")
    kit.add("c", "lora")
    kit.add("d", "pfeiffer", reduction_factor=2)
    close(kit.model(ids), expected)
    kit.unmerge("a")
    kit.remove("c")
    assert same(weights(kit.model), before)


def changes(ids: Tensor) -> dict[str, Callable[[nn.Module], Any]]:
    other = Tiny(PostNormBlock)
    return {
        "checkpoint": lambda model: model.load_state_dict(other.state_dict()),
        "assigned": lambda model: model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
        "cast": lambda model: model.double(),
        "parametrised": lambda model: parametrizations.weight_norm(model.blocks[0].up),
    }


@pytest.mark.parametrize("how", ["checkpoint", "assigned", "cast", "parametrised"])
def test_weights_that_changed_after_merging_are_not_overwritten(kit: ak.AdapterKit, ids: Tensor, how: str) -> None:
    kit.merge("a")
    changes(ids)[how](kit.model)
    now = weights(kit.model)
    for refused in (lambda: kit.unmerge("a"), lambda: kit.remove("a"), kit.unwrap):
        with pytest.raises(ak.CompatibilityError, match=r"up.weight.* changed since.*restore=False"):
            refused()
    assert same(weights(kit.model), now)
    assert list(kit.adapters) == ["a", "b"]
    kit.unmerge("a", restore=False)
    assert same(weights(kit.model), now)
    kit.deactivate()


def test_an_adapter_acts_on_the_weights_that_were_loaded(kit: ak.AdapterKit, ids: Tensor) -> None:
    other = Tiny(PostNormBlock).eval()
    kit.merge("a")
    kit.model.load_state_dict(other.state_dict())
    kit.unmerge("a", restore=False)
    with kit.base():
        assert torch.equal(kit.model(ids), other(ids))
    assert not torch.allclose(kit.model(ids), other(ids))
    kit.merge("a")


def test_a_second_merge_does_not_build_on_weights_that_changed(kit: ak.AdapterKit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.merge("a")
    monkeypatch.setattr(kit._state().activation, "stays", lambda name: True)  # as a composition of both will
    with torch.no_grad():
        kit.model.blocks[0].up.weight.add_(1)
    with pytest.raises(ak.CompatibilityError, match=r"'blocks.0.up.weight' changed since"):
        kit.merge("b")


def test_moving_a_merged_model_to_another_place_is_no_change(kit: ak.AdapterKit) -> None:
    before = weights(kit.model)
    kit.merge("a")
    for parameter in kit.model.parameters():
        parameter.data = parameter.data.clone()
    kit.unmerge("a")
    assert same(weights(kit.model), before)


def test_a_host_that_was_replaced_is_refused(kit: ak.AdapterKit) -> None:
    kit.model.blocks[0].up = nn.Linear(8, 16)
    with pytest.raises(ak.CompatibilityError, match="was added at 6 modules, of which this Tiny has 5"):
        kit.merge("a")


def test_a_part_of_the_model_cannot_be_merged_alone(kit: ak.AdapterKit) -> None:
    with pytest.raises(ak.CompatibilityError, match="of which this PostNormBlock has 3: merge it in the whole model"):
        ak.wrap(kit.model.blocks[0]).merge("a")


def test_an_interrupted_write_is_undone(kit: ak.AdapterKit, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> None:
    from adapterkit.lifecycle.merging import merge as merging

    before, expected, write, written = weights(kit.model), kit.model(ids), merging._overwrite, []

    def interrupted(parameter: nn.Parameter, value: Tensor) -> None:
        written.append(parameter)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(parameter, value)

    monkeypatch.setattr(merging, "_overwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kit.merge("a")
    assert same(weights(kit.model), before)
    assert torch.equal(kit.model(ids), expected)
