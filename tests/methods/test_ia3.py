"""Where IA3 sits: outputs, inputs, or either alone."""

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak


def host() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def scale_(kit: ak.AdapterKit) -> Tensor:
    """Draw the only vector of the adapter "a", and activate it."""
    (factors,) = kit.parameters("a")
    factors.data.uniform_(0.5, 2)
    kit.activate("a")
    return factors


def test_inputs_can_be_scaled_alone() -> None:
    model, x = host(), torch.randn(5, 4).double()
    kit = ak.wrap(model)
    kit.add("a", ak.IA3Config(targets=(), feedforward_targets=["2"]))
    factors = scale_(kit)
    torch.testing.assert_close(model(x), (torch.tanh(model[0](x)) * factors) @ model[2].weight.T + model[2].bias)


def test_outputs_can_be_scaled_alone() -> None:
    model, x = host(), torch.randn(5, 4).double()
    kit = ak.wrap(model)
    kit.add("a", ak.IA3Config(targets=["2"], feedforward_targets=()))
    before = model(x)
    factors = scale_(kit)
    torch.testing.assert_close(model(x), before * factors)


def test_nothing_to_scale_is_refused() -> None:
    with pytest.raises(ak.ConfigError, match=r"targets=\(\) and feedforward_targets=\(\) leave nothing to scale"):
        ak.IA3Config(targets=(), feedforward_targets=())
