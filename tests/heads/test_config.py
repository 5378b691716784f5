"""Settings of heads."""

import json
from typing import Any, get_args

import pytest
from torch import nn

import adapterkit as ak
from adapterkit.heads.config import HEADS, HeadConfig, head_from

EXAMPLES: list[HeadConfig] = [
    ak.OwnHead("classifier", labels=("a", "b"), name="mine"),
    ak.CustomHead(target="classifier"),
    ak.CustomHead(output=("hidden_states", -2), labels=["a"]),
    ak.ClassificationHead(labels=("neg", "pos"), layers=2, pooling="mean", dropout=0.1),
    ak.ClassificationHead(num_labels=3, output="pooler_output"),
    ak.MultiLabelHead(("a", "b"), name="topics"),
    ak.TaggingHead(["O", "B-PER"], seed=1),
    ak.RegressionHead(2, labels=("x", "y")),
    ak.RegressionHead(),
    ak.MultipleChoiceHead(4),
    ak.QuestionAnsweringHead(),
    ak.MaskedLMHead(tied="tokens"),
    ak.CausalLMHead(tied=False, vocab_size=9),
]


@pytest.mark.parametrize("head", EXAMPLES, ids=repr)
def test_heads_are_values_with_a_json_form(head: Any) -> None:
    text = json.dumps(head.model_dump(mode="json"))
    assert head_from(json.loads(text)) == head
    assert hash(head_from(json.loads(text))) == hash(head)
    with pytest.raises(Exception, match="frozen"):
        head.name = "other"


def test_every_kind_is_in_the_table_and_in_the_examples() -> None:
    def below(cls: type[HeadConfig]) -> set[type[HeadConfig]]:
        return {cls} | {found for inner in cls.__subclasses__() for found in below(inner)}

    concrete = {cls for cls in below(HeadConfig) if get_args(cls.model_fields["kind"].annotation)}
    assert concrete == set(HEADS) == {type(head) for head in EXAMPLES}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ak.ClassificationHead, r"how many labels\? Give labels=\('neg', 'pos'\), or num_labels=2"),
        (lambda: ak.ClassificationHead(("a", "b"), num_labels=3), "num_labels=3, and labels names 2"),
        (lambda: ak.ClassificationHead(("a", "a")), r"each label once; found \['a'\]"),
        (lambda: ak.ClassificationHead("ab"), "may be a list of names"),
        (lambda: ak.TaggingHead(num_labels=0), "greater than or equal to 1"),
        (lambda: ak.RegressionHead(2, labels=("x",)), "num_targets=2, and labels names 1"),
        (ak.MultipleChoiceHead, "num_choices: Field required"),
        (lambda: ak.ClassificationHead(num_labels=2, pool="mean"), "no setting pool"),
        (lambda: ak.ClassificationHead(num_labels=2, pooling="max"), "pooling"),
        (lambda: ak.CustomHead(nn.Linear), "takes an nn.Module; found type"),
        (lambda: ak.CustomHead(nn.Linear(2, 2), target="a", output="b"), "it has no output="),
        (lambda: head_from({"kind": "nothing"}), "a head has a kind of .*; found 'nothing'"),
        (lambda: head_from({"kind": ["own"]}), "a head has a kind of"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        make()


def test_names_of_labels_become_a_map_by_index() -> None:
    assert ak.TaggingHead(("O", "B")).label_map == {0: "O", 1: "B"}
    assert ak.TaggingHead(num_labels=2).label_map is None
    assert ak.QuestionAnsweringHead().label_map is None
