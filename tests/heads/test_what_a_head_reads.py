"""Which tensor of the model's output a head reads, and what is said where that is not what one would want."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 11,
}


def bottleneck() -> ak.BottleneckConfig:
    return ak.BottleneckConfig(targets=["output.dense"], bottleneck_size=2)


def with_head(**settings: Any) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3, **settings)).eval()


def test_a_new_head_on_the_logits_of_the_models_own_is_warned_of() -> None:
    kit = ak.wrap(with_head())
    message = r"BertForSequenceClassification has a head of its own, \['classifier'\].* width 3, .* wrap model.bert"
    with pytest.warns(UserWarning, match=message) as seen:
        kit.add("a", bottleneck(), heads=ak.ClassificationHead(num_labels=2))
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"give heads=\['classifier'\]") as seen:
        kit.add_head("a", ak.TaggingHead(num_labels=2))
    assert seen[0].filename == __file__


def test_a_head_on_hidden_states_or_on_logits_that_are_named_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = ak.ClassificationHead(num_labels=2, output=("hidden_states", -1))
        ak.wrap(with_head(output_hidden_states=True)).add("a", bottleneck(), heads=head)
        ak.wrap(with_head()).add("a", bottleneck(), heads=["classifier"])
        ak.wrap(with_head()).add("a", bottleneck(), heads=ak.ClassificationHead(num_labels=2, output="logits"))
        base = transformers.BertModel(transformers.BertConfig(**SMALL))
        ak.wrap(base).add("a", bottleneck(), heads=ak.ClassificationHead(num_labels=2))


def test_hidden_states_that_the_model_does_not_return_are_named_with_what_it_does() -> None:
    kit = ak.wrap(transformers.BertModel(transformers.BertConfig(**SMALL)).eval())
    head = ak.ClassificationHead(num_labels=2, output=("hidden_states", -1))
    with pytest.raises(
        ak.TargetError,
        match=r"fields \['last_hidden_state', 'pooler_output'\]\. Set output_hidden_states=True in the model's config",
    ):
        kit.add("a", bottleneck(), heads=head)
    kit.model.config.output_hidden_states = True
    kit.add("a", bottleneck(), heads=head)
    kit.activate("a")
    assert kit.model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 2)
    kit.model.config.output_hidden_states = False
    with pytest.raises(ak.CompatibilityError, match=r"with the fields \['last_hidden_state', 'pooler_output'\]"):
        kit.model(torch.tensor([[1, 2, 3]]))


def test_a_dropped_invertible_adapter_is_undone_as_it_acts_on_the_embedding_all_the_same() -> None:
    kit = ak.wrap(transformers.BertModel(transformers.BertConfig(**SMALL)).eval())
    kit.add("language", "madx", heads=ak.MaskedLMHead())
    for parameter in kit.parameters("language"):
        nn.init.normal_(parameter, std=0.3)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), kit.active("language"):
        whole = kit.model(ids).logits
    with torch.no_grad(), kit.active(ak.Drop("language", layers=[])):
        torch.testing.assert_close(kit.model(ids).logits, whole, atol=0, rtol=0)
    with torch.no_grad(), kit.active(ak.Drop("language", layers=[0])):
        assert not torch.equal(kit.model(ids).logits, whole)
