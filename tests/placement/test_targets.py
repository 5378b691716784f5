"""Which tensor of a target is adapted, and on which axis."""

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

from ..hosts.any_module import IMAGE, TOKENS, Wrapped
from ..hosts.tiny import randomise


def test_a_feature_axis_that_cannot_be_told_is_asked_for() -> None:
    model = Wrapped(nn.Identity())
    kit = ak.wrap(model, IMAGE)
    with pytest.raises(ak.TargetError, match=r"which axis of 'host'.*\(2, 6, 7, 7\).*channel_axis=1"):
        kit.add("a", ak.BottleneckConfig(targets=["host"]))
    kit.add("a", ak.BottleneckConfig(targets=["host"], channel_axis=1))
    assert kit.sites(kit.adapters["a"])[0].width == 6


def test_output_names_another_tensor_of_several() -> None:
    model = Wrapped(nn.LSTM(6, 5))
    kit = ak.wrap(model, TOKENS)
    kit.add("a", ak.BottleneckConfig(targets=["host"], output=(1, 0), bottleneck_size=2))
    out, (h, c) = model(TOKENS)
    randomise(kit, "a")
    kit.activate("a")
    new_out, (new_h, new_c) = model(TOKENS)
    assert torch.equal(out, new_out)
    assert torch.equal(c, new_c)
    assert not torch.equal(h, new_h)


def test_input_names_another_argument_however_it_is_passed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(6, 6)

        def forward(self, bias: Tensor, hidden: Tensor) -> Tensor:
            return self.w(hidden) + bias

    host = Two()
    bias, hidden = torch.zeros(6), TOKENS
    kit = ak.wrap(host, (bias, hidden))
    kit.add("a", ak.BottleneckConfig(targets=[""], at="input", input="hidden", bottleneck_size=2))
    randomise(kit, "a")
    kit.activate("a")
    by_position, by_keyword = host(bias, hidden), host(hidden=hidden, bias=bias)
    assert torch.equal(by_position, by_keyword)
    kit.deactivate()
    assert not torch.equal(by_position, host(bias, hidden))
    assert kit.sites(kit.adapters["a"])[0].input == (1, "hidden")


def test_a_module_under_two_names_is_one_site() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(nn.ModuleDict({"a": layer})["a"], nn.ReLU(), layer)
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["0", "2"], bottleneck_size=2))
    assert kit.summary().adapters[0].sites == 1
    kit.verify(TOKENS)
    kit.activate("a")
    assert kit.verify(TOKENS).fired == {"0": 2}
