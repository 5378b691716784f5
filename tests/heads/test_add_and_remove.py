"""Heads that come and go, what can be none, and where they are seen."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.composition.nodes import Average

from ..hosts.tiny import randomise
from .helpers import ADAPTER, CLASSES, Custom, batch, bert, kit_of


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ([CLASSES, CLASSES], ak.ConfigError, r"different names, and \['classification'\] is that of several"),
        (["encoder", ak.CustomHead(nn.Linear(8, 8), target="pooler.dense"), ak.OwnHead("pooler")], ak.TargetError, "lie inside the head 'pooler'"),
        ([ak.CustomHead(nn.Linear(8, 8), target="pooler.dense"), "pooler.dense"], ak.ConfigError, "different names"),
        ([ak.CustomHead(nn.Linear(8, 8), target="pooler.dense", name="x"), "pooler.dense"], ak.ConfigError, r"\['pooler.dense'\] would have several"),
        ([nn.Linear(8, 2)], ak.ConfigError, "found Linear"),
        ({"": nn.Linear(8, 2)}, ak.ConfigError, r"on the model's output is ak.CustomHead\(module\)"),
        ({"pooler.dense": "classifier"}, ak.ConfigError, "found 'pooler.dense': str"),
        ({"dense": nn.Linear(8, 8)}, ak.TargetError, "'dense' matches"),
        ({"nothing": nn.Linear(8, 8)}, ak.TargetError, "'nothing' matches no module"),
        (3, ak.ConfigError, "found int"),
        (ak.CustomHead(), ak.ConfigError, "CustomHead needs its module"),
        (ak.ClassificationHead(num_labels=2, output="nothing"), ak.TargetError, r"a head reads \['nothing'\] of the model's output"),
        (ak.MaskedLMHead(vocab_size=7), ak.ConfigError, "vocab_size=7, and the embedding 'embeddings.word_embeddings'.* has 20"),
        (ak.MaskedLMHead(tied="nothing"), ak.TargetError, "'nothing' matches no module"),
        (ak.MaskedLMHead(tied="pooler"), ak.TargetError, "reads the weight of an embedding"),
        (ak.MaskedLMHead(output="pooler_output"), ak.CompatibilityError, ""),
    ],
)  # fmt: skip
def test_what_can_be_no_head_is_refused_and_nothing_changes(heads: Any, error: Any, message: str) -> None:
    model, inputs = bert(), batch()
    kit = ak.wrap(model)
    if not message:  # only the call can tell
        kit.add("a", ADAPTER, heads=heads)
        kit.activate("a")
        with pytest.raises(error, match=r"was given \(4, 8\)"):
            model(**inputs)
        return
    before = sorted(name for name, _ in model.named_modules())
    with pytest.raises(error, match=message):
        kit.add("a", ADAPTER, heads=heads)
    assert sorted(name for name, _ in model.named_modules()) == before
    assert not model._forward_hooks


def test_a_module_has_one_owner() -> None:
    module, model = Custom(), bert()
    kit = kit_of(model, {"a": ak.CustomHead(module)})
    for head in (module, model.pooler.dense):
        with pytest.raises(ak.ConfigError, match="is in the model already, or shares a Parameter with it"):
            kit.add("b", ADAPTER, heads=ak.CustomHead(head))


def test_an_adapter_gets_another_head_later_and_loses_it() -> None:
    kit, inputs = kit_of(bert(), {"a": CLASSES, "b": ()}), batch()
    kit.train_adapter("a")
    kit.add_head("a", [ak.TaggingHead(num_labels=2), "pooler"])
    assert list(kit.heads("a")) == ["classification", "tagging", "pooler"]
    assert all(p.requires_grad for p in kit.parameters("a", heads=True))
    assert kit.model(**inputs).heads.keys() == {"classification", "tagging"}
    assert kit.verify(inputs).problems == ()
    kit.add_head("b", CLASSES)
    assert not any(p.requires_grad for p in kit.parameters("b", heads=True)), "as the adapter"
    with pytest.raises(ak.ConfigError, match=r"\['tagging'\] is that of several"):
        kit.add_head("a", ak.TaggingHead(num_labels=4))
    with pytest.raises(
        ak.AdapterNameError, match=r"adapter 'a' has no head 'nothing'; it has \['classification', 'tagging', 'pooler'\]"
    ):
        kit.remove_head("a", "nothing")
    kit.remove_head("a", "classification")
    kit.add_head("a", ak.RegressionHead())
    assert list(kit.heads("a")) == ["tagging", "regression", "pooler"]
    assert kit.model(**inputs).heads.keys() == {"tagging", "regression"}
    for name in ("tagging", "regression", "pooler"):
        kit.remove_head("a", name)
    assert not isinstance(kit.model(**inputs), ak.HeadOutput)
    kit.verify(inputs).require()
    kit.remove("b")
    assert "_adapterkit" not in kit.model._modules


def test_a_head_that_what_is_active_cannot_choose_is_refused_and_nothing_changes() -> None:
    kit, inputs = kit_of(bert(), {"a": CLASSES, "b": ()}), batch()
    kit.activate(Average("a", "b"))
    expected = kit.model(**inputs).logits
    with pytest.raises(ak.CompatibilityError, match="cannot choose between the heads"):
        kit.add_head("b", [ak.TaggingHead(num_labels=2), "pooler"])
    assert kit.heads("b") == {}
    assert "_adapterkit" not in kit.model.pooler._modules
    assert not kit.model.pooler._forward_hooks
    assert torch.equal(kit.model(**inputs).logits, expected)
    kit.verify(inputs).require()


def test_a_head_is_refused_too_if_it_could_not_be_chosen_once_a_block_ends() -> None:
    kit, inputs = kit_of(bert(), {"a": CLASSES, "b": ()}), batch()
    kit.activate(Average("a", "b"))
    expected = kit.model(**inputs).logits
    with kit.base(), pytest.raises(ak.CompatibilityError, match="cannot choose between the heads"):
        kit.add_head("b", ak.TaggingHead(num_labels=2))
    assert kit.heads("b") == {}
    assert torch.equal(kit.model(**inputs).logits, expected)


def test_a_merged_adapter_keeps_its_heads_and_gets_no_others() -> None:
    kit, inputs = ak.wrap(bert()), batch()
    kit.add("a", "lora", targets=["query"], rank=2, heads=CLASSES)
    randomise(kit, "a")
    kit.activate("a")
    expected = kit.model(**inputs).logits
    kit.merge("a")
    torch.testing.assert_close(kit.model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    for change in (lambda: kit.add_head("a", ak.RegressionHead()), lambda: kit.remove_head("a", "classification")):
        with pytest.raises(ak.ActivationError, match="'a' is merged into the weights"):
            change()
    kit.unmerge("a")
    assert torch.equal(kit.model(**inputs).logits, expected)


def test_heads_are_seen_in_the_summary_the_tree_and_the_parameters() -> None:
    kit = kit_of(bert(), {"a": [ak.ClassificationHead(num_labels=3), "pooler"]})
    (found,) = kit.summary().adapters
    assert found.head_parameters == 3 * 9 + 8 * 9
    assert len(list(kit.parameters("a"))) == len(list(kit.parameters("a", heads=False))) + 4
    assert "a (head)" in str(kit.tree())
    assert kit.state_dict("a").keys() == {name for name, _ in kit.named_parameters("a", heads=False)}


def test_a_base_checkpoint_loads_strictly_around_heads_on_the_output() -> None:
    model = bert()
    state = copy.deepcopy(model.state_dict())
    kit = kit_of(model, {"a": [CLASSES, ak.MaskedLMHead()]})
    model.load_state_dict(state, strict=True)
    with kit.base_checkpoint():
        assert model.state_dict().keys() == state.keys()
    assert not any("word_embeddings" in name for name, _ in kit.named_parameters("a", heads=True)), "read, not owned"
