"""Where IA3 sits: outputs, inputs, or either alone."""

from pathlib import Path

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


def test_a_predicate_names_inputs_and_the_adapter_can_be_saved(tmp_path: Path) -> None:
    """What a predicate found is saved as paths, in whichever list of targets it stands."""
    model, x = host(), torch.randn(5, 4).double()
    kit = ak.wrap(model)
    kit.add("a", ak.IA3Config(targets=["0"], feedforward_targets=[lambda _module, path: path == "2"]))
    kit.activate("a")
    for factors in kit.parameters("a"):
        factors.data.uniform_(0.5, 2)
    expected = model(x)
    kit.save("a", tmp_path / "a")
    other = host()
    other.load_state_dict(kit.unwrap().state_dict())
    again = ak.wrap(other)
    again.activate(again.load(tmp_path / "a"))
    assert torch.equal(other(x), expected)


def test_outside_of_transformers_targets_are_enough(tmp_path: Path) -> None:
    model, x = host(), torch.randn(5, 4).double()
    kit = ak.wrap(model)
    kit.add("a", ak.IA3Config(targets=["2"]))
    before = model(x)
    factors = scale_(kit)
    torch.testing.assert_close(model(x), before * factors)
    expected = model(x)
    kit.save("a", tmp_path)
    kit.load(tmp_path, "b")
    kit.activate("b")
    assert torch.equal(model(x), expected)
    with pytest.raises(
        ak.TargetError, match=r"'@feedforward.first': tracing Sequential finds .* name modules, e.g. \['0', '2'\]"
    ):
        kit.sites(ak.IA3Config(targets=["2"], feedforward_targets=["@feedforward.first"]))


def test_beside_targets_the_feedforward_is_scaled_where_there_is_one() -> None:
    kit = ak.wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8))
    sites = kit.sites(ak.IA3Config(targets=["linear1"]))
    assert [(site.path, site.at) for site in sites] == [("linear1", "output"), ("linear2", "input")]
