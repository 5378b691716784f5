"""Heads that are modules: copies of the model's own, in their place, and modules of the user's."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import adapterkit as ak
from adapterkit.composition.nodes import Average, BatchSplit, Rows, Stack

from ..hosts.tiny import PostNormBlock, Tiny, randomise
from .helpers import ADAPTER, CLASSES, SMALL, Custom, batch, bert, held, kit_of

# --- in the place of a module -----------------------------------------------------------------------------------------


def classifier_kit() -> tuple[ak.AdapterKit, Tensor]:
    kit = ak.wrap(Tiny(PostNormBlock).eval())
    config = ak.BottleneckConfig(targets=["down"], bottleneck_size=3)
    for name, heads in (
        ("a", "classifier"),
        ("b", ["classifier"]),
        ("none", ()),
        ("wide", {"classifier": nn.Linear(8, 5)}),
    ):
        kit.add(name, config, heads=heads)
        with torch.no_grad():
            for parameter in kit.parameters(name, heads=True):
                parameter.copy_(torch.randn(parameter.shape) / 4)
    return kit, torch.randint(0, 11, (4, 5))


@pytest.mark.parametrize(
    "rows",
    [
        ["a", "b", "a", "b"], ["b", "b", "a", "a"], ["a", None, "none", "b"], [Stack("a", "b"), Stack("b", "none"), "a", None],
        ["wide"] * 4, [Stack("none", "wide"), "wide", "wide", Stack("a", "wide")],
    ],
)  # fmt: skip
def test_rows_have_their_own_copies_of_the_models_head(rows: list[Any]) -> None:
    kit, ids = classifier_kit()
    with kit.active(Rows(rows)):
        mixed = kit.model(ids)
    for index, which in enumerate(rows):
        with kit.base() if which is None else kit.active(which):
            torch.testing.assert_close(mixed[index], kit.model(ids[index : index + 1])[0], atol=1e-5, rtol=1e-5)


def test_gradients_in_place_are_those_of_the_separate_runs() -> None:
    kit, ids = classifier_kit()
    kit.freeze()
    for name in ("a", "b"):
        kit.unfreeze(name)
    kit.activate(BatchSplit("a", "b", sizes=[1, 3]))
    kit.model(ids).pow(2).sum().backward()
    mixed = {name: [p.grad.clone() for p in kit.parameters(name, heads=True)] for name in ("a", "b")}
    kit.model.zero_grad()
    for name, part in (("a", slice(0, 1)), ("b", slice(1, 4))):
        kit.activate(name)
        kit.model(ids[part]).pow(2).sum().backward()
        for one, parameter in zip(mixed[name], kit.parameters(name, heads=True), strict=True):
            torch.testing.assert_close(one, parameter.grad, atol=1e-5, rtol=1e-4)


def test_rows_in_place_compile_and_copy() -> None:
    kit, ids = classifier_kit()
    kit.activate(Rows(["a", None, "b", "a"]))
    expected = kit.model(ids)
    torch.testing.assert_close(torch.compile(kit.model, backend="eager", fullgraph=True)(ids), expected)
    for other in (copy.deepcopy(kit.model), pickle.loads(pickle.dumps(kit.model))):
        assert torch.equal(other(ids), expected)


def test_heads_of_other_widths_cannot_share_a_batch_and_say_what_to_do() -> None:
    kit, ids = classifier_kit()
    with (
        kit.active(Rows(["a", "wide", "a", None])),
        pytest.raises(
            ak.CompatibilityError, match=r"'classifier' returns tensors of other shapes .*\[\(2, 3\)\]; \[\(1, 5\)\]"
        ),
    ):
        kit.model(ids)
    with kit.active(BatchSplit("a", "b")), pytest.raises(ak.CompatibilityError, match="has 3, and is to be divided into 2"):
        kit.model(ids[:3])
    with pytest.raises(ak.CompatibilityError, match=r"cannot choose between the heads of \['a', 'b'\]"):
        kit.activate(Average("a", "b"))


def test_a_head_that_returns_several_tensors_is_put_together_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 3)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
            return {"logits": self.one(x) * scale, "pair": (x, scale), "why": "because"}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), Two()

        def forward(self, x: Tensor) -> Any:
            return self.head(self.body(x), scale=x[:, :1])

    model, x = Model(), torch.randn(3, 4)
    kit = ak.wrap(model, x)
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["body"], bottleneck_size=2), heads="head")
        randomise(kit, name)
        torch.nn.init.normal_(held(kit, name, path="head").one.weight)
    with kit.active(Rows(["b", "a", None])):
        mixed = model(x)
    for index, name in enumerate(["b", "a", None]):
        with kit.base() if name is None else kit.active(name):
            alone = model(x[index : index + 1])
        torch.testing.assert_close(mixed["logits"][index], alone["logits"][0])
        torch.testing.assert_close(mixed["pair"][1][index], alone["pair"][1][0])
    assert mixed["why"] == "because"


def test_a_model_of_transformers_tells_what_its_own_head_calls_its_outputs(tmp_path: Any) -> None:
    labels = {0: "neg", 1: "neutral", 2: "pos"}
    config = BertConfig(**SMALL, id2label=labels, label2id={name: index for index, name in labels.items()})
    kit, inputs = ak.wrap(BertForSequenceClassification(config).eval()), batch()
    kit.add("a", ADAPTER, heads=["classifier"])
    assert kit.labels("a") == {"classifier": labels}
    kit.add("b", ADAPTER, heads=ak.OwnHead("classifier", labels=("x", "y", "z"), name="mine"))
    assert kit.labels("b") == {"mine": {0: "x", 1: "y", 2: "z"}}
    kit.model.config.id2label = {str(index): label for index, label in labels.items()}  # as JSON has it
    kit.add("json", ADAPTER, heads=["classifier"])
    assert kit.labels("json") == {"classifier": labels}
    plain = ak.wrap(BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)))
    plain.add("a", ADAPTER, heads=["classifier"])
    assert plain.labels("a") == {}, "LABEL_0, LABEL_1 are no names"
    kit.train_adapter("a")
    out = kit.model(**inputs, labels=torch.tensor([0, 1, 2, 1]))
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits, torch.tensor([0, 1, 2, 1])), msg="the model's own loss"
    )
    kit.save("a", tmp_path)
    assert plain.load(tmp_path, "from a file", any_base=True) == "from a file"
    assert plain.labels("from a file") == {"classifier": labels}
    assert "(neg, neutral, pos)" in (tmp_path / "README.md").read_text()
    with pytest.raises(ak.ConfigError, match=r"labels names 2, and the head 'classifier' has \[3\] outputs"):
        kit.add("c", ADAPTER, heads=ak.OwnHead("classifier", labels=("x", "y")))


# --- modules of the user's --------------------------------------------------------------------------------------------


def test_a_module_of_the_users_is_a_head_on_the_output_with_a_loss_of_its_own(tmp_path: Any) -> None:
    module, inputs = Custom(), batch()
    model = bert()
    base = copy.deepcopy(model)
    kit = kit_of(model, {"a": ak.CustomHead(module, labels=("x", "y")), "b": CLASSES})
    assert held(kit, "a") is module
    kit.activate("a")
    out = kit.model(**inputs, labels=torch.ones(4))
    hidden = out.output.last_hidden_state
    torch.testing.assert_close(out.logits, module(hidden, inputs["attention_mask"]))
    torch.testing.assert_close(out.loss, module.loss(out.logits, torch.ones(4)))
    with kit.active(Rows(["a", "b", "a", None])):
        kit.model(**inputs)
    kit.save("a", tmp_path)
    other = ak.wrap(base)
    with pytest.raises(
        ak.StoreError, match=r"the heads \['custom'\] .* are modules of someone's own.*heads=\{'custom': MyModule"
    ):
        other.load(tmp_path)
    with pytest.raises(ak.StoreError, match=r"heads=\['other'\]: .* takes modules for \['custom'\]"):
        other.load(tmp_path, heads={"custom": Custom(), "other": Custom()})
    with pytest.raises(ak.StoreError, match=r"linear.weight' is \(2, 8\), its config says \(3, 8\)"):
        other.load(tmp_path, heads={"custom": Custom(3)})
    assert dict(other.adapters) == {}
    mine = Custom()
    other.activate(other.load(tmp_path, heads={"custom": mine}))
    assert held(other, "a") is mine
    assert torch.equal(base(**inputs, labels=torch.ones(4)).loss, out.loss)
    assert other.labels("a") == {"custom": {0: "x", 1: "y"}}
    without = ak.wrap(bert())
    without.load(tmp_path, heads=False, any_base=True)
    assert without.heads("a") == {}


def test_a_head_without_a_loss_says_so_when_there_are_labels() -> None:
    kit, inputs = kit_of(bert(), {"a": ak.CustomHead(nn.Linear(8, 2))}), batch()
    kit.activate("a")
    assert kit.model(**inputs).logits.shape == (4, 6, 2)
    with pytest.raises(ak.CompatibilityError, match=r"the head 'custom' \(Linear\) has no method loss"):
        kit.model(**inputs, labels=torch.ones(4))


def test_a_head_must_keep_the_rows() -> None:
    class Sum(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.sum()

    kit = kit_of(bert(), {"a": ak.CustomHead(Sum())})
    kit.activate("a")
    with pytest.raises(ak.CompatibilityError, match=r"the head 'custom' was given 4 rows and returned \(\)"):
        kit.model(**batch())


def test_a_module_of_the_users_runs_in_the_place_of_the_models(tmp_path: Any) -> None:
    model, ids = Tiny(PostNormBlock).eval(), torch.randint(0, 11, (4, 5))
    base, module = copy.deepcopy(model), nn.Linear(8, 5)
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["down"], bottleneck_size=3), heads={"classifier": module})
    own = model.classifier
    kit.train_adapter("a")
    assert model(ids).shape == (4, 5)
    assert model.classifier is own
    model(ids).sum().backward()
    assert module.weight.grad is not None
    assert own.weight.grad is None
    kit.save("a", tmp_path)
    other, mine = ak.wrap(base), nn.Linear(8, 5)
    with pytest.raises(ak.StoreError, match=r"the heads \['classifier'\]"):
        other.load(tmp_path)
    other.activate(other.load(tmp_path, heads={"classifier": mine}))
    assert torch.equal(base(ids), model(ids))
    with pytest.raises(ak.StoreError, match="takes a module that the model has not"):
        other.load(tmp_path, "again", heads={"classifier": mine})
