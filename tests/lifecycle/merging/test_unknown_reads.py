"""Merging into weights of a model that could not be run, so that nobody knows what reads them."""

import copy

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.lifecycle.attach import state_of
from adapterkit.lifecycle.merging.merge import merge
from adapterkit.lifecycle.merging.merged_weights import merged_weights

from ...hosts.tiny import randomise


class Picky(nn.Module):
    """Takes what no inputs made for it have; reads a weight around its layer if told so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.reads_around = nn.Linear(4, 4), False

    def forward(self, x: Tensor, scale: dict[str, float]) -> Tensor:
        if not isinstance(scale, dict):
            raise TypeError("scale is no dict")
        x = self.layer(x) * scale["k"]
        return x @ self.layer.weight if self.reads_around else x


INPUTS = (torch.randn(3, 4), {"k": 2.0})


def active(model: nn.Module, inputs: object = None) -> ak.AdapterKit:
    kit = ak.wrap(model.eval(), inputs)  # type: ignore[arg-type]
    kit.add("a", "lora", targets=["layer"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    return kit


def test_merging_into_a_model_that_cannot_be_run_warns_of_what_was_not_checked() -> None:
    kit = active(Picky())
    expected = kit.model(*INPUTS)
    with pytest.warns(
        UserWarning, match=r"merging adapter 'a' could not check.*If Picky reads.*example_inputs=batch"
    ) as seen:
        kit.merge("a")
    assert seen[0].filename == __file__
    torch.testing.assert_close(kit.model(*INPUTS), expected)


def test_inputs_that_do_not_run_are_warned_of_with_what_the_model_raised() -> None:
    model = active(Picky()).model
    with pytest.warns(UserWarning, match="does not run on example_inputs: KeyError: 'k'"):
        merge(model, state_of(model), "a", (torch.randn(3, 4), {"wrong": 2.0}))


def test_inputs_that_run_end_the_warning() -> None:
    active(Picky(), INPUTS).merge("a")
    reading = Picky()
    reading.reads_around = True
    with pytest.raises(ak.CompatibilityError, match="'Picky' reads its weight as well, around it"):
        active(reading, INPUTS).merge("a")


def test_where_the_warning_is_an_error_nothing_is_merged() -> None:
    kit = active(Picky())
    before = copy.deepcopy(kit.model.layer.weight)
    with pytest.raises(UserWarning, match="could not check"):  # as the settings of these tests have it
        kit.merge("a")
    assert torch.equal(kit.model.layer.weight, before)
    assert not kit.summary().adapters[0].is_merged


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def test_a_double_precision_adapter_changes_a_tied_weight_to_the_same_bits_at_each_host() -> None:
    kit = ak.wrap(Tied().eval(), torch.randn(3, 6))
    kit.add("a", "lora", targets=["one.weight"], rank=2, dtype="float64")
    randomise(kit, "a")
    first, second = merged_weights(kit.model, ["a"])
    assert (first.path, second.path) == ("one", "two")
    delta = kit.model.one._adapterkit.first_module("a").weight_delta().detach()
    expected = (kit.model.one.weight.detach().double() + delta).float()
    assert torch.equal(first.value, expected)
    assert torch.equal(second.value, expected)
