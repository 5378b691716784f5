"""What is said of targets that match nothing."""

import pytest
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import adapterkit as ak
from adapterkit.placement.hints import nothing_matches
from adapterkit.structure.paths import modules_by_path

from ..hosts.tiny import PreNormBlock, Tiny


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return BertModel(
        BertConfig(num_hidden_layers=4, hidden_size=16, num_attention_heads=2, intermediate_size=20, vocab_size=20)
    )


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=32))


@pytest.mark.parametrize("config", ["lora", "houlsby"])
def test_a_name_of_another_family_is_answered_with_the_models_own_names(bert: nn.Module, config: str) -> None:
    with pytest.raises(ak.TargetError) as caught:
        ak.wrap(bert).sites(config, targets=["q_proj"])
    assert "'q_proj' matches no module of BertModel" in str(caught.value)
    assert str(caught.value).endswith(
        "Its attention projections are 'query' (role '@attention.q'), 'key' (role '@attention.k'), 'value' (role "
        "'@attention.v'), 'attention.output.dense' (role '@attention.last'). kit.tree() shows what there is."
    )


def test_names_are_as_short_as_they_can_be_without_naming_anything_else(bert: nn.Module) -> None:
    with pytest.raises(
        ak.TargetError, match=r"Its feed-forward projections are 'intermediate.dense' .*'layer.*.output.dense'"
    ):
        ak.wrap(bert).sites("lora", targets=["fc1"])
    assert len(ak.wrap(bert).sites("lora", targets=["layer.*.output.dense"])) == 4


def test_a_fused_projection_has_all_of_its_roles(gpt2: nn.Module) -> None:
    with pytest.raises(
        ak.TargetError, match=r"are 'c_attn' \(roles '@attention.q', '@attention.k', '@attention.v'\), 'attn"
    ):
        ak.wrap(gpt2).sites("lora", targets=["encoder.*.query"])


def test_a_model_that_cannot_be_traced_is_answered_with_the_nearest_names() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_projection = nn.Linear(2, 2)

        def forward(self, one: object, two: object) -> object:
            raise RuntimeError("never")

    with pytest.raises(ak.TargetError, match=r"which has 2 modules and 2 Parameters. Nearest: 'q_projection'.*kit.tree"):
        ak.wrap(Strange()).sites("lora", targets=["q_proj"])


def test_all_linear_is_a_role_and_another_spelling_of_it_says_so() -> None:
    with pytest.raises(ak.TargetError, match=r"'all_linear' matches no module of .*the role '@linear'"):
        ak.wrap(Tiny(PreNormBlock)).sites("lora", targets=["all_linear"])


def test_no_advice_leads_in_a_circle() -> None:
    model = Tiny(PreNormBlock)
    for target in ("nothing", "q_lin", "all_linear", lambda module, path: False):
        message = nothing_matches(target, model, modules_by_path(model))
        assert "kit.sites" not in message


def test_a_pattern_of_a_head_that_matches_a_module_and_one_inside_it_says_that_two_match() -> None:
    model = nn.Module()
    model.register_module("0", nn.Linear(2, 2))
    model.register_module("1", nn.LSTM(2, 2))
    model.get_submodule("1").register_module("1", nn.Linear(2, 2))
    kit = ak.wrap(model)
    with pytest.raises(
        ak.TargetError, match=r"heads=\['1'\] matches 2 modules, \['1', '1.1'\], .* '1.1' lies inside '1'; "
    ):
        kit.add("a", "lora", targets=["0"], heads=["1"])
    kit.add("a", "lora", targets=["0"], heads=["re:1"])
    assert list(kit.heads("a")) == ["1"]
