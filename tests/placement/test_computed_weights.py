"""Weights that are computed from others, and DoRA, which measures the weight of its host."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import adapterkit as ak

from ..hosts.parameters import Plain, Scaled
from ..hosts.tiny import randomise


def test_a_weight_normed_layer_is_adapted_at_its_output() -> None:
    model, x = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(5, 4)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=[""], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x), F.linear(x, model.weight + 4.0 * b @ a, model.bias))
    with pytest.raises(ak.TargetError, match=r"'weight' is no Parameter: WeightNorm of '' computes it.* the module '' "):
        kit.add("b", "lora", targets=["weight"])


def test_dora_is_refused_where_the_output_is_not_the_product_with_the_weight() -> None:
    model = nn.Sequential(Scaled(7, 4), Plain(4, 4))
    kit = ak.wrap(model)
    with pytest.raises(ak.TargetError, match=r"'0' \(Scaled\) has a forward of its own .* use LoRA there"):
        kit.add("a", "dora", targets=["0"])
    kit.add("a", "dora", targets=["1"])
    kit.add("b", "lora", targets=["0"])


def test_dora_comes_first_among_the_members_of_a_union_at_one_host() -> None:
    kit = ak.wrap(nn.Linear(4, 4))
    lora, dora = ak.LoRAConfig(targets=[""]), ak.LoRAConfig(targets=[""], use_dora=True)
    with pytest.raises(ak.TargetError, match=r"members 0 and 1 of a union, and the latter \(DoRA\) must come first"):
        kit.add("a", ak.Union(lora, dora))
    kit.add("a", ak.Union(dora, lora))


def test_dora_and_a_changed_bias_at_one_layer_follow_the_formula_and_merge() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6).double()
    kit = ak.wrap(model)
    kit.add("a", ak.Union(ak.LoRAConfig(targets=["0"], use_dora=True, rank=2), ak.BitFitConfig(targets=["0"])))
    randomise(kit, "a")
    kit.activate("a")
    dora, delta = (module for _, module in model[0]._adapterkit.modules_of("a"))
    v = model[0].weight + 4.0 * dora.lora_B @ dora.lora_A
    weight = dora.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)
    expected = F.linear(x, weight, model[0].bias + delta.delta)
    torch.testing.assert_close(model(x), expected)
    kit.merge("a")
    torch.testing.assert_close(model(x), expected)


def test_dora_measures_the_base_and_not_what_is_merged_into_it() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6)
    base, kit = model(x), ak.wrap(model)
    kit.add("a", "lora", targets=["0"])
    randomise(kit, "a")
    kit.activate("a")
    kit.merge("a")
    kit.add("d", "dora", targets=["0"])
    kit.unmerge("a")
    kit.activate("d")
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dora_is_refused_where_a_weight_cannot_be_measured_and_nothing_moves(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(6, 6)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kit = ak.wrap(model)
    with pytest.raises(ak.TargetError, match=r"computed before each forward.*use LoRA there"):
        kit.add("a", "dora", targets=["0"])
    kit.add("a", "lora", targets=["0"])
    kit.sites("ia3", targets=["0"], feedforward_targets=[])
    kit.unwrap()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_dora_can_be_built_on_the_meta_device_and_says_why_not_on_quantised_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6))
    ak.wrap(model).add("a", "dora", targets=["0"])
    assert model[0]._adapterkit.first_module("a").magnitude.shape == (6,)
    packed = nn.Sequential(nn.Linear(6, 6, bias=False))
    packed[0].weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ak.TargetError, match=r"is torch\.int8, quantised: it has no length"):
        ak.wrap(packed).add("a", "dora", targets=["0"])


def test_a_parameter_of_multihead_attention_that_is_computed_is_refused() -> None:
    model = nn.utils.parametrizations.orthogonal(nn.MultiheadAttention(4, 2), "in_proj_weight")
    with pytest.raises(ak.TargetError, match="'in_proj_weight' is no Parameter: Orthogonal of '' computes it"):
        ak.wrap(model).sites("lora", targets=[""])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("computed", "sources", "way_out"),
    [
        (nn.utils.weight_norm, ["weight_g", "weight_v"], "remove_weight_norm"),
        (nn.utils.spectral_norm, ["weight_orig"], "remove_spectral_norm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), ["weight_orig"], "prune.remove"),
    ],
)
def test_what_a_hook_of_the_module_itself_computes_its_weight_from_is_refused(
    computed: Any, sources: list[str], way_out: str
) -> None:
    model, x = nn.Sequential(computed(nn.Linear(4, 3))).eval(), torch.randn(5, 4)
    model(x)
    kit = ak.wrap(model)
    for source in sources:
        with pytest.raises(ak.TargetError, match=rf"'0.{source}' would do nothing: .* Target the module '0' .*{way_out}"):
            kit.add("a", "lora", targets=[f"0.{source}"])
    with pytest.raises(ak.TargetError, match=rf"'0.weight' is no Parameter: .* Target the module '0' .*{way_out}"):
        kit.add("a", "lora", targets=["0.weight"])
    kit.add("a", "lora", targets=["0"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight + 4.0 * b @ a, model[0].bias))


def test_a_pruned_bias_is_refused() -> None:
    kit = ak.wrap(prune.l1_unstructured(nn.Linear(4, 3), "bias", 1))
    with pytest.raises(
        ak.TargetError, match=r"'bias_orig' would do nothing: .*\(L1Unstructured\).* Exclude it, or end that"
    ):
        kit.sites("bitfit")
