"""Heads on a model's output: each kind of them, its labels and its losses."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

import adapterkit as ak
from adapterkit.composition.nodes import Stack
from adapterkit.runtime.this_call import THIS_CALL

from .helpers import ADAPTER, CLASSES, SMALL, batch, bert, held, kit_of


def test_a_head_reads_the_models_output_and_labels_need_not_be_known_to_it() -> None:
    kit, inputs, labels = kit_of(bert(), {"a": CLASSES}), batch(), torch.tensor([0, 1, 2, 1])
    kit.activate("a")
    out = kit.model(**inputs, labels=labels)
    assert isinstance(out, ak.HeadOutput)
    hidden = out.output.last_hidden_state
    torch.testing.assert_close(out.logits, held(kit, "a")(hidden, inputs["attention_mask"]))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    assert out.losses.keys() == {"a"}
    assert out.heads.keys() == {"classification"}
    assert kit.model(**inputs).loss is None
    assert kit.model(**inputs, labels=None).loss is None
    positional = kit.model(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(positional.logits, out.logits), "the mask by its position"
    with kit.base():
        base = kit.model(**inputs)
        assert not isinstance(base, ak.HeadOutput)
    kit.deactivate()
    assert torch.equal(kit.model(**inputs).last_hidden_state, base.last_hidden_state)


def test_a_model_that_takes_no_labels_may_be_called_with_them_while_a_head_is_active() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    kit, x, labels = ak.wrap(model), torch.randn(2, 3, 8), torch.tensor([0, 1])
    kit.add("a", ak.BottleneckConfig(targets=["linear2"], bottleneck_size=2), heads=ak.ClassificationHead(num_labels=2))
    with pytest.raises(TypeError, match="labels"):
        model(x, labels=labels)
    kit.activate("a")
    model(x, labels=labels).loss.backward()


def test_training_moves_the_adapter_and_its_head_alone() -> None:
    kit, inputs = kit_of(bert(), {"a": CLASSES, "b": CLASSES}), batch()
    kit.train_adapter("a")
    kit.model(**inputs, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    assert all(p.grad is not None for p in kit.parameters("a", heads=True))
    assert {id(p) for p in kit.model.parameters() if p.requires_grad} == {id(p) for p in kit.parameters("a", heads=True)}
    optimizer = torch.optim.SGD([p for p in kit.model.parameters() if p.requires_grad], lr=0.1)
    kit.verify(inputs, optimizer=optimizer).require()
    kit.freeze("a")
    assert not any(p.requires_grad for p in kit.model.parameters())


HEADS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "classification": (ak.ClassificationHead(num_labels=3), torch.tensor([0, 1, 2, 1]), (4, 3)),
    "multi label": (ak.MultiLabelHead(num_labels=3), torch.ones(4, 3), (4, 3)),
    "regression": (ak.RegressionHead(), torch.ones(4), (4, 1)),
    "tagging": (ak.TaggingHead(num_labels=3), torch.ones(4, 6).long(), (4, 6, 3)),
    "choices": (ak.MultipleChoiceHead(2), torch.tensor([0, 1]), (2, 2)),
    "span": (ak.QuestionAnsweringHead(), torch.tensor([[0, 1]] * 4), (4, 6, 2)),
    "masked": (ak.MaskedLMHead(), torch.ones(4, 6).long(), (4, 6, 20)),
    "causal": (ak.CausalLMHead(), torch.ones(4, 6).long(), (4, 6, 20)),
    "causal, its own": (ak.CausalLMHead(tied=False), torch.ones(4, 6).long(), (4, 6, 20)),
    "pooler": (ak.ClassificationHead(num_labels=3, output="pooler_output"), torch.tensor([0, 1, 2, 1]), (4, 3)),
}


@pytest.mark.parametrize("which", HEADS)
def test_each_kind_of_head_trains_saves_and_loads(which: str, tmp_path: Any) -> None:
    head, labels, shape = HEADS[which]
    model, inputs = bert(), batch()
    base = copy.deepcopy(model)
    kit = kit_of(model, {"a": head})
    kit.train_adapter("a")
    out = kit.model(**inputs, labels=labels)
    assert out.logits.shape == shape
    torch.testing.assert_close(out.loss, held(kit, "a").loss(out.logits, labels))
    out.loss.backward()
    if which != "pooler":
        assert all(p.grad is not None for p in kit.parameters("a", heads=True))
    kit.save("a", tmp_path)
    other = ak.wrap(base)
    other.activate(other.load(tmp_path))
    again = base(**inputs, labels=labels)
    assert torch.equal(again.logits, out.logits)
    assert torch.equal(again.loss, out.loss)
    assert other.heads("a") == kit.heads("a")
    kit.unwrap()
    assert not any("_adapterkit" in name for name, _ in model.named_modules())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, of hooks on what it compiles
@pytest.mark.parametrize(
    "which", [w if w in ("classification", "tagging") else pytest.param(w, marks=pytest.mark.slow) for w in HEADS]
)
def test_each_kind_of_head_compiles_without_a_graph_break(which: str) -> None:
    head, labels, _ = HEADS[which]
    kit, inputs = kit_of(bert(), {"a": head}), batch()
    kit.activate("a")
    expected = kit.model(**inputs, labels=labels)
    compiled = torch.compile(kit.model, backend="eager", fullgraph=True)
    found = compiled(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_batches_of_other_sizes_are_not_compiled_anew() -> None:
    kit = kit_of(bert(), {"a": CLASSES})
    kit.activate("a")
    compiled = torch.compile(kit.model, backend="eager", fullgraph=True, dynamic=True)
    compiled(**batch(4), labels=torch.tensor([0, 1, 2, 1]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        inputs, labels = batch(5), torch.tensor([0, 1, 2, 1, 0])
        found = compiled(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, kit.model(**inputs, labels=labels).loss)


def test_a_model_without_an_active_head_on_its_output_has_no_step_there() -> None:
    kit, inputs = kit_of(bert(), {"a": CLASSES, "b": ()}), batch()
    kit.activate("b")
    assert not isinstance(kit.model(**inputs), ak.HeadOutput)
    site = kit.model._adapterkit
    assert site.call.wanted is None
    kit.remove("a")
    assert "_adapterkit" not in kit.model._modules
    assert not kit.model._forward_hooks
    assert not kit.model._forward_pre_hooks


def test_several_heads_of_one_adapter_are_told_apart_by_their_names() -> None:
    heads = [ak.TaggingHead(("O", "B"), name="entities"), CLASSES, ak.RegressionHead(name="score")]
    kit, inputs = kit_of(bert(), {"a": heads}), batch()
    assert kit.labels("a") == {"entities": {0: "O", 1: "B"}, "classification": {0: "x", 1: "y", 2: "z"}}
    assert list(kit.heads("a")) == ["entities", "classification", "score"]
    kit.activate("a")
    labels = {"classification": torch.tensor([0, 1, 2, 1]), "score": torch.ones(4)}
    out = kit.model(**inputs, labels=labels)
    assert {name: logits.shape[1:] for name, logits in out.heads.items()} == {
        "entities": (6, 2), "classification": (3,), "score": (1,),
    }  # fmt: skip
    assert out.logits is out.heads["entities"]
    expected = F.cross_entropy(out.heads["classification"], labels["classification"])
    torch.testing.assert_close(out.loss, expected + F.mse_loss(out.heads["score"][:, 0], torch.ones(4)))
    assert torch.equal(kit.model(**inputs, labels={"a": labels}).loss, out.loss)
    for wrong, message in (
        ({"classes": torch.ones(4)}, r"labels are for \['classes'\], which runs no head here: adapters \['a'\]"),
        (torch.ones(4), "adapter 'a' has several heads, and one tensor of labels is not for all"),
        ({"score": torch.ones(3)}, "labels for the head 'score' have 3 rows, and its logits are of 4 rows"),
    ):
        with pytest.raises(ak.CompatibilityError, match=message):
            kit.model(**inputs, labels=wrong)


def test_question_answering_takes_positions_as_transformers_does() -> None:
    kit, inputs = kit_of(bert(), {"a": ak.QuestionAnsweringHead()}), batch()
    kit.activate("a")
    start, end = torch.tensor([0, 1, 2, 3]), torch.tensor([[1], [2], [3], [4]])
    out = kit.model(**inputs, start_positions=start, end_positions=end)
    assert torch.equal(out.loss, kit.model(**inputs, labels=torch.stack([start, end[:, 0]], 1)).loss)
    listed = kit.model(**inputs, start_positions=start.tolist(), end_positions=end[:, 0].tolist())
    assert torch.equal(listed.loss, out.loss)
    with pytest.raises(ak.CompatibilityError, match="start_positions and end_positions; found start_positions alone"):
        kit.model(**inputs, start_positions=start)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool])
def test_labels_are_whole_numbers_of_any_type(dtype: torch.dtype) -> None:
    kit, inputs = kit_of(bert(), {"a": ak.ClassificationHead(num_labels=2)}), batch()
    kit.activate("a")
    labels = torch.tensor([0, 1, 1, 0])
    assert torch.equal(kit.model(**inputs, labels=labels.to(dtype)).loss, kit.model(**inputs, labels=labels).loss)


def test_a_label_of_several_that_is_not_known_does_not_count() -> None:
    kit, inputs = kit_of(bert(), {"a": ak.MultiLabelHead(num_labels=2)}), batch()
    kit.activate("a")
    out = kit.model(**inputs, labels=torch.tensor([[0, 1], [1, -100], [-100, -100], [1, 1]]))
    known, targets = [0, 1, 2, 6, 7], torch.tensor([0.0, 1, 1, 1, 1])
    expected = F.binary_cross_entropy_with_logits(out.logits.flatten()[known], targets)
    torch.testing.assert_close(out.loss, expected)
    assert kit.model(**inputs, labels=torch.full((4, 2), -100)).loss == 0


def test_choices_may_have_an_axis_of_their_own() -> None:
    kit, inputs = kit_of(bert(), {"a": ak.MultipleChoiceHead(2, pooling="last")}), batch()
    kit.activate("a")
    flat = kit.model(**inputs, labels=torch.tensor([1, 0]))
    cubes = {name: tensor.view(2, 2, 6) for name, tensor in inputs.items()}
    assert torch.equal(kit.model(**cubes, labels=torch.tensor([1, 0])).logits, flat.logits)
    assert torch.equal(kit.model(cubes["input_ids"], cubes["attention_mask"]).logits, flat.logits)
    images = ak.wrap(ViTModel(ViTConfig(**{**SMALL, "image_size": 8, "patch_size": 4})).eval())
    images.add("a", "lora", targets=["attention.o_proj"], rank=2, heads=ak.MultipleChoiceHead(3))
    images.activate("a")
    pixels = torch.randn(6, 3, 8, 8)
    assert torch.equal(images.model(pixels.view(2, 3, 3, 8, 8)).logits, images.model(pixels).logits)


def test_half_precision_models_have_heads_in_full_precision() -> None:
    kit, inputs = ak.wrap(bert().bfloat16()), batch()
    kit.add("a", ADAPTER, heads=[CLASSES, ak.MaskedLMHead()])
    kit.activate("a")
    out = kit.model(**inputs, labels={"classification": torch.tensor([0, 1, 2, 1])})
    assert {logits.dtype for logits in out.heads.values()} == {torch.float32}
    assert out.output.last_hidden_state.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert kit.model(**inputs, labels={"masked_lm": inputs["input_ids"]}).loss.dtype is torch.float32


def test_threads_have_their_own_labels() -> None:
    kit = kit_of(bert(), {"a": CLASSES})
    kit.activate("a")
    calls = [(batch(), torch.randint(0, 3, (4,))) for _ in range(4)]
    expected = [kit.model(**inputs, labels=labels).loss for inputs, labels in calls]
    wrong: list[int] = []

    def work(index: int) -> None:
        inputs, labels = calls[index]
        for _ in range(20):
            if not torch.equal(kit.model(**inputs, labels=labels).loss, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_left_behind_by_a_call_that_raises() -> None:
    kit, inputs = kit_of(bert(), {"a": CLASSES, "b": CLASSES}), batch()
    kit.activate(Stack("a", "b"))
    with pytest.raises(IndexError):
        kit.model(input_ids=torch.full((4, 6), 99), labels=torch.tensor([0, 1, 2, 1]))
    assert THIS_CALL.handed == {}
    with pytest.raises(ak.CompatibilityError):
        kit.model(**inputs, labels=torch.tensor([0, 1]))
    assert THIS_CALL.handed == {}
    assert kit.model(**inputs).loss is None
    assert THIS_CALL.handed == {}
