"""Inputs for models that nobody gave inputs for."""

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.tracing.inputs import tiny_inputs

from ...hosts.blocks import VOCAB, Model, Pre, randomised


class Named(nn.Module):
    """Takes text and an image, and says so only when one is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.patches = nn.Embedding(VOCAB, 8), nn.Conv2d(3, 8, 8, 8)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        return torch.cat([self.text(input_ids), self.patches(pixel_values).flatten(2).transpose(1, 2)], 1)


def test_what_the_model_says_is_missing_is_made() -> None:
    inputs = tiny_inputs(Named())
    assert isinstance(inputs, dict)
    assert set(inputs) == {"input_ids", "pixel_values"}


class Silent(Named):
    """Fails without its image, and does not say why."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        assert pixel_values is not None
        return super().forward(input_ids, pixel_values)


def test_all_that_it_takes_is_tried_where_it_does_not_say() -> None:
    assert set(tiny_inputs(Silent())) == {"input_ids", "pixel_values"}


@pytest.mark.parametrize("shape", [(2, 400), (2, 1, 400), (2, 80, 128), (2, 128, 80)])
def test_sound_comes_in_any_layout(shape: tuple[int, ...]) -> None:
    class Sound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(shape[-1], 4)

        def forward(self, input_values: Tensor) -> Tensor:
            if input_values.shape != shape:
                raise ValueError(f"found {tuple(input_values.shape)}")
            return self.out(input_values)

    assert tiny_inputs(Sound())["input_values"].shape == shape  # type: ignore[index]  # by keyword


def test_a_model_that_runs_on_nothing_made_says_what_was_tried() -> None:
    class Stubborn(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            raise ValueError("not today")

    with pytest.raises(ak.CompatibilityError, match=r"Stubborn .*example_inputs=batch.*input_ids \(2, 6\): not today"):
        ak.wrap(Stubborn(Pre)).sites("pfeiffer")


def test_made_inputs_are_used_by_add() -> None:
    kit = ak.wrap(randomised(Model(Pre)))
    kit.add("a", "pfeiffer")
    assert len(kit.sites("pfeiffer")) == 2


def test_lazy_layers_are_no_structure_yet() -> None:
    with pytest.raises(ak.CompatibilityError, match=r"lazy layers \('0.weight'\).*run it once"):
        discover(nn.Sequential(nn.LazyLinear(4)))
