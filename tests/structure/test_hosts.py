"""What a module tells of itself: the widths of torch's own layers, and the axis of features."""

import pytest
from torch import nn

import adapterkit as ak
from adapterkit.structure.hosts import channel_axis

from ..hosts.any_module import HOSTS


@pytest.mark.parametrize("host", ["linear", "conv1d", "conv2d", "gru", "layer norm"])
def test_standard_layers_need_no_example_inputs_and_agree_with_them(host: str) -> None:
    make, x = HOSTS[host]
    model = make()
    for config in ({"targets": [""]}, {"targets": [""], "at": "input"}):
        [told], [seen] = (ak.wrap(make(), inputs).sites(ak.BottleneckConfig(**config)) for inputs in (None, (x,)))
        assert (told.width, told.input_width, told.axis) == (seen.width, seen.input_width, seen.axis)
        assert told.width == (model(x) if config == {"targets": [""]} and host != "gru" else x).shape[told.axis]


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), (2, 6, 5, 5), 1),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm(6)), (2, 5, 5, 6), -1),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm(6)), (2, 6, 5, 6), None),
        (nn.Sequential(nn.Conv1d(6, 6, 3), nn.Linear(6, 4)), (2, 5, 4), -1),
        (nn.ReLU(), (2, 6, 5, 5), None),
        (nn.ReLU(), (2, 5, 6), -1),
        (nn.Dropout2d(), (2, 6, 5, 5), 1),
    ],
)
def test_the_feature_axis_is_told_by_what_a_module_holds_or_left_open(
    module: nn.Module, shape: tuple[int, ...], axis: int | None
) -> None:
    assert channel_axis(module, shape) == axis
