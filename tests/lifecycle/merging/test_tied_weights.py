"""Weights that several modules share, or that the model reads around their module."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.lifecycle.attach import state_of
from adapterkit.lifecycle.merging.merge import merge

from ...hosts.merging import Bound, ReadAround, TwoWeights
from .helpers import LAYER, adapted, close, rows, same, weights


def test_weights_that_lie_side_by_side_in_one_memory_are_not_shared() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)), rows()
    flat = torch.randn(72)
    model[0].weight.data, model[1].weight.data = flat[:36].view(6, 6), flat[36:].view(6, 6)
    kit = adapted(model, inputs=x, config=LAYER)
    expected, other = model(x), flat[36:].clone()
    kit.merge("a")
    close(model(x), expected)
    assert torch.equal(flat[36:], other)


def test_a_tied_weight_is_merged_where_the_parameter_itself_is_adapted() -> None:
    model, x = Bound("Parameter"), rows()
    kit = adapted(model, inputs=x, config=ak.LoRAConfig(targets=["one.weight"]))
    assert [site.path for site in kit.sites(ak.LoRAConfig(targets=["one.weight"]))] == ["one", "two"]
    before, expected = weights(model), model(x)
    kit.merge("a")
    close(model(x), expected)
    assert model.one.weight is model.two.weight
    kit.unmerge("a")
    assert same(weights(model), before)


def test_a_parameter_under_two_names_of_one_module_is_merged_once() -> None:
    model, x = nn.Sequential(TwoWeights()), rows()
    kit = adapted(model, inputs=x, config=ak.LoRAConfig(targets=["0.w"], rank=2))
    before, expected = weights(model), model(x)
    kit.merge("a")
    close(model(x), expected)
    kit.unmerge("a")
    assert same(weights(model), before)
    assert torch.equal(model(x), expected)
    model[0].w2 = nn.Parameter(torch.randn(6, 6))
    with pytest.raises(ak.CompatibilityError, match="w, w2 were one Parameter when the adapter was added"):
        kit.merge("a")


def test_a_weight_that_is_read_around_its_module_is_merged_if_the_parameter_is_adapted_and_the_inputs_are_known() -> None:
    ids = torch.randint(0, 11, (3, 5))
    model, config = ReadAround(lambda w: w.T), ak.LoRAConfig(targets=["embedding.weight"])
    kit = adapted(model, config=config)
    with pytest.raises(ak.CompatibilityError, match=r"around it.*'embedding.weight', by this name.*example_inputs=batch"):
        merge(model, state_of(model), "a", ids)
    kit.remove("a")
    kit = adapted(model, inputs=ids, config=config)
    before, expected = weights(model), model(ids)
    kit.merge("a")
    close(model(ids), expected)
    kit.unmerge("a")
    assert same(weights(model), before)


def test_a_tied_weight_is_not_merged_where_one_of_its_modules_is_changed_further() -> None:
    """W + B A in one module and W + B A + B' A' in the other cannot both be written into one W."""
    model = Bound("Parameter")
    both = ak.Union(ak.LoRAConfig(targets=["one.weight"]), ak.LoRAConfig(targets=["two"]))
    kit = adapted(model, inputs=rows(), config=both)
    before = weights(model)
    with pytest.raises(ak.CompatibilityError, match=r"weight is shared with 'two.weight'"):
        kit.merge("a")
    assert same(weights(model), before)
    model.two.bias = model.one.bias
    both = ak.Union(ak.BitFitConfig(targets=["one.bias"]), ak.LoRAConfig(targets=["three"], bias=True))
    model.three, model.forward = nn.Linear(6, 6), lambda x: model.three(model.two(model.one(x)))
    model.three.bias = model.one.bias
    kit.remove("a")
    kit = adapted(model, inputs=rows(), config=both)
    with pytest.raises(
        ak.CompatibilityError, match="'one' reads the same bias, which the adapter changes differently there"
    ):
        kit.merge("a")


def test_a_parameter_that_was_tied_after_it_was_adapted_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    kit = adapted(model, inputs=rows(), config=ak.LoRAConfig(targets=["0.weight"]))
    model[1].weight = model[0].weight
    with pytest.raises(ak.CompatibilityError, match=r"shared with '1.weight'"):
        kit.merge("a")


def test_a_bias_that_is_shared_matters_only_where_it_is_changed() -> None:
    for bias in (False, True):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].bias = model[0].bias
        kit = adapted(model, inputs=rows(), config=ak.LoRAConfig(targets=["0"], bias=bias))
        if bias:
            with pytest.raises(ak.CompatibilityError, match=r"its bias is shared with '1.bias'"):
                kit.merge("a")
        else:
            kit.merge("a")


@pytest.mark.parametrize("read", [lambda w: w.T, lambda w: torch.cat([w, w]).T, lambda w: w.data.T, lambda w: w.float().T])
def test_a_weight_that_the_model_also_reads_around_its_module_is_refused(read: Callable[[Tensor], Tensor]) -> None:
    ids = torch.randint(0, 11, (3, 5))
    model = ReadAround(read)
    kit = adapted(model, inputs=ids, config=ak.LoRAConfig(targets=["embedding"]))
    before = weights(model)
    with pytest.raises(ak.CompatibilityError, match=r"'embedding': 'ReadAround' reads its weight as well, around it"):
        kit.merge("a")
    assert same(weights(model), before)
    kit.remove("a")
    kit = adapted(model, config=ak.LoRAConfig(targets=["layer"]))
    expected = model(ids)
    kit.merge("a")
    close(model(ids), expected)


def test_reading_the_kind_of_a_weight_is_not_reading_it() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            w = self.layer.weight
            self.layer.to(w.dtype)  # as routers do that compute in single precision
            x = x.to(w).to(w.dtype).to(device=w.device).type_as(w)
            return self.layer(x) + w.new_zeros(w.shape[0]) + torch.zeros_like(w)[:, 0]

    kit = adapted(Looking(), inputs=rows(), config=ak.LoRAConfig(targets=["layer"]))
    kit.merge("a")
