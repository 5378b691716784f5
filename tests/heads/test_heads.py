"""Heads at work: on a model's output, in the places of its modules, by rows, with labels that the model does not know."""

import copy
import pickle
import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    T5Config,
    T5EncoderModel,
    T5Model,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

import adapterkit as ak
from adapterkit.composition.nodes import Average, BatchSplit, Fuse, Parallel, Rows, Split, Stack
from adapterkit.heads.plan import head_owner
from adapterkit.runtime.this_call import THIS_CALL

from ..hosts.tiny import PostNormBlock, Tiny, randomise

SMALL = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
ADAPTER = ak.BottleneckConfig(targets=["attention.output.dense"], bottleneck_size=3)
CLASSES = ak.ClassificationHead(("x", "y", "z"), pooling="mean", layers=2)


def bert() -> BertModel:
    return BertModel(BertConfig(**SMALL)).eval()


def batch(rows: int = 4) -> dict[str, Tensor]:
    mask = torch.ones(rows, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(0, 20, (rows, 6)), "attention_mask": mask}


def kit_of(model: nn.Module, heads: dict[str, Any], config: Any = ADAPTER) -> ak.AdapterKit:
    kit = ak.wrap(model)
    for name, head in heads.items():
        kit.add(name, config, heads=head)
        randomise(kit, name)
    return kit


def held(kit: ak.AdapterKit, name: str, index: int = 0, path: str = "") -> Any:
    """The module of an adapter's head at a host."""
    site = kit.model.get_submodule(path)._adapterkit
    return [module for entry, module in site.modules_of(name) if entry.spec is None][index]


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index : index + 1] for name, tensor in inputs.items()}


# --- one head on the output -------------------------------------------------------------------------------------------


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


# --- models -----------------------------------------------------------------------------------------------------------


def test_gpt2_pools_the_last_real_token_and_predicts_the_next() -> None:
    model = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=32)).eval()
    kit, inputs = ak.wrap(model), batch()
    kit.add("a", "pfeiffer", bottleneck_size=2, heads=ak.ClassificationHead(num_labels=3, pooling="last"))
    kit.add("b", "lora", rank=2, heads=ak.CausalLMHead())
    kit.activate("a")
    out = model(**inputs)
    hidden = out.output.last_hidden_state
    last = torch.stack([hidden[0, 3], hidden[1, 5], hidden[2, 5], hidden[3, 5]])
    torch.testing.assert_close(out.logits, held(kit, "a").layers(last))
    kit.activate("b")
    out = model(**inputs, labels=inputs["input_ids"])
    own = GPT2LMHeadModel(model.config).eval()
    own.transformer.load_state_dict({k: v for k, v in model.state_dict().items() if "_adapterkit" not in k})
    own.tie_weights()
    torch.testing.assert_close(
        out.loss, own(**inputs, labels=inputs["input_ids"]).loss, msg="a new adapter is the identity"
    )


def test_t5_masks_what_its_decoder_read() -> None:
    config = T5Config(d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=1, vocab_size=20, decoder_start_token_id=0)
    head = ak.ClassificationHead(num_labels=3, pooling="last")
    kit, inputs = ak.wrap(T5Model(config).eval()), batch()
    kit.add("a", "pfeiffer", bottleneck_size=2, heads=head)
    kit.activate("a")
    mask = torch.tensor([[1, 0, 0]] * 4)
    out = kit.model(**inputs, decoder_input_ids=torch.ones(4, 3).long(), decoder_attention_mask=mask)
    torch.testing.assert_close(out.logits, held(kit, "a").layers(out.output.last_hidden_state[:, 0]))
    out = kit.model(**inputs, decoder_input_ids=torch.ones(4, 3).long())
    torch.testing.assert_close(out.logits, held(kit, "a").layers(out.output.last_hidden_state[:, -1]))
    encoder = ak.wrap(T5EncoderModel(config).eval())
    encoder.add("a", "pfeiffer", bottleneck_size=2, heads=head)
    encoder.activate("a")
    out = encoder.model(**inputs)
    torch.testing.assert_close(out.logits[0], held(encoder, "a").layers(out.output.last_hidden_state[0, 3]))


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder_has_heads_whichever_axis_its_rows_lie_on(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    kit, x = ak.wrap(model), torch.randn(4, 6, 8)
    heads = {"a": ak.ClassificationHead(num_labels=3, pooling="mean"), "b": ak.ClassificationHead(num_labels=3)}
    for name, head in heads.items():
        kit.add(name, ak.BottleneckConfig(targets=["linear2"], bottleneck_size=2), heads=head)
        randomise(kit, name)
    given = x if batch_first else x.transpose(0, 1)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with kit.active("a"):
        out = model(given, src_key_padding_mask=padding)
    hidden = out.output if batch_first else out.output.transpose(0, 1)
    torch.testing.assert_close(out.logits, held(kit, "a")(hidden, ~padding))
    with kit.active(Rows(["a", "b", "b", "a"])):
        mixed = model(given).logits
    for index, name in enumerate("abba"):
        with kit.active(name):
            alone = model(given[index : index + 1] if batch_first else given[:, index : index + 1]).logits
        torch.testing.assert_close(mixed[index], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, of hooks on what it compiles
def test_a_sequential_has_its_head_behind_the_last_layer() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 8), inner=inner))
    kit, x = ak.wrap(model, torch.randn(2, 4)), torch.randn(3, 4)
    kit.add(
        "a", ak.BottleneckConfig(targets=["inner.1", "first"], bottleneck_size=2), heads=ak.ClassificationHead(num_labels=3)
    )
    randomise(kit, "a")
    kit.activate("a")
    labels = torch.tensor([0, 1, 2])
    out = model(x, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    assert out.logits.shape == (3, 3)
    assert len(model) == 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, labels=labels).loss, out.loss)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, labels=labels).loss, out.loss)
    assert not isinstance(inner(torch.randn(3, 8)), ak.HeadOutput), "a part that is called by itself has no head"
    assert THIS_CALL.handed == {}
    kit.unwrap()
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, of hooks on what it compiles
def test_a_sequential_model_has_a_head_with_the_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    kit, ids = ak.wrap(model), torch.randint(0, 9, (3, 4))
    kit.add("a", ak.BottleneckConfig(targets=["1"], bottleneck_size=2), heads=ak.CausalLMHead())
    kit.activate("a")
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits, out.output @ model[0].weight.T)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, labels=ids).loss, out.loss)


def test_half_precision_models_have_heads_in_full_precision() -> None:
    kit, inputs = ak.wrap(bert().bfloat16()), batch()
    kit.add("a", ADAPTER, heads=[CLASSES, ak.MaskedLMHead()])
    kit.activate("a")
    out = kit.model(**inputs, labels={"classification": torch.tensor([0, 1, 2, 1])})
    assert {logits.dtype for logits in out.heads.values()} == {torch.float32}
    assert out.output.last_hidden_state.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert kit.model(**inputs, labels={"masked_lm": inputs["input_ids"]}).loss.dtype is torch.float32


# --- rows -------------------------------------------------------------------------------------------------------------


def mixed_kit() -> ak.AdapterKit:
    heads = {
        "a": CLASSES,
        "b": ak.ClassificationHead(num_labels=3),
        "tags": [ak.TaggingHead(num_labels=2), ak.RegressionHead()],
        "none": (),
    }
    return kit_of(bert(), heads)


@pytest.mark.parametrize(
    "rows",
    [
        ["a", "b", "a", "b"], ["a", "a", "b", "b"], ["b", "a", "tags", None], [None, "none", "a", "a"],
        [Stack("none", "a"), Stack("a", "none"), Stack("a", "b"), "a"], ["none", "none", None, "none"],
    ],
)  # fmt: skip
def test_each_row_has_its_own_head_and_is_what_it_is_alone(rows: list[Any]) -> None:
    kit, inputs = mixed_kit(), batch()
    with kit.active(Rows(rows)):
        mixed = kit.model(**inputs)
    for index, which in enumerate(rows):
        with kit.base() if which is None else kit.active(which):
            alone = kit.model(**row(inputs, index))
        if not isinstance(alone, ak.HeadOutput):
            whole = mixed.output if isinstance(mixed, ak.HeadOutput) else mixed
            assert not isinstance(mixed, ak.HeadOutput) or mixed.logits[index] is None
            torch.testing.assert_close(whole.last_hidden_state[index], alone.last_hidden_state[0], atol=1e-5, rtol=1e-5)
            continue
        torch.testing.assert_close(mixed.logits[index], alone.logits[0], atol=1e-5, rtol=1e-5)
        for name, logits in alone.heads.items():
            torch.testing.assert_close(mixed.heads[name][index], logits[0], atol=1e-5, rtol=1e-5)


def test_logits_of_one_shape_are_one_tensor_and_of_several_a_tuple_by_row() -> None:
    kit, inputs = mixed_kit(), batch()
    with kit.active(Rows(["a", "b", "b", "a"])):
        assert kit.model(**inputs).logits.shape == (4, 3)
    with kit.active(Rows(["a", "tags", None, "a"])):
        out = kit.model(**inputs)
    assert [None if logits is None else tuple(logits.shape) for logits in out.logits] == [(3,), (6, 2), None, (3,)]
    assert [logits is None for logits in out.heads["classification"]] == [False, True, True, False]
    assert [logits is None for logits in out.heads["regression"]] == [True, False, True, True]


@pytest.mark.parametrize(
    "composition", [Rows(["a", "b", "a", "b"]), BatchSplit("a", "b"), BatchSplit("b", "a", sizes=[1, 3])]
)
def test_gradients_and_losses_of_a_mixed_batch_are_those_of_the_separate_runs(composition: Any) -> None:
    kit, inputs, labels = mixed_kit(), batch(), torch.tensor([0, 1, 2, 1])
    kit.freeze()
    for name in ("a", "b"):
        kit.unfreeze(name)
    kit.activate(composition)
    out = kit.model(**inputs, labels=labels)
    out.loss.backward()
    mixed = {name: [p.grad.clone() for p in kit.parameters(name, heads=True)] for name in ("a", "b")}
    kit.model.zero_grad()
    from adapterkit.composition.rows import rows_of

    for name in ("a", "b"):
        where = [index for index, kind in enumerate(rows_of(composition, 4)) if kind == name]
        kit.activate(name)
        alone = kit.model(**{key: tensor[where] for key, tensor in inputs.items()}, labels=labels[where])
        torch.testing.assert_close(out.losses[name], alone.loss, atol=1e-5, rtol=1e-5)
        alone.loss.backward()
        for one, parameter in zip(mixed[name], kit.parameters(name, heads=True), strict=True):
            torch.testing.assert_close(one, parameter.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss, out.losses["a"] + out.losses["b"])


def test_labels_may_be_given_by_adapter() -> None:
    kit, inputs = mixed_kit(), batch()
    kit.activate(Rows(["a", "tags", "b", "a"]))
    tags, classes = torch.randint(0, 2, (1, 6)), torch.tensor([2, 0])
    out = kit.model(**inputs, labels={"a": classes, "tags": {"tagging": tags}})
    assert out.losses.keys() == {"a", "tags"}
    torch.testing.assert_close(out.losses["a"], F.cross_entropy(torch.stack([out.logits[0], out.logits[3]]), classes))
    torch.testing.assert_close(out.losses["tags"], F.cross_entropy(out.logits[1], tags[0]))
    whole = torch.tensor([2, -100, -100, 0])
    assert torch.equal(kit.model(**inputs, labels={"a": whole}).losses["a"], out.losses["a"]), "of all rows"
    with pytest.raises(
        ak.CompatibilityError, match=r"labels for the head 'classification' have 3 rows, .* 2 rows of a batch of 4"
    ):
        kit.model(**inputs, labels={"a": whole[:3]})


def test_parallel_has_a_head_and_a_loss_for_each_child() -> None:
    kit, inputs, labels = mixed_kit(), batch(), torch.tensor([0, 1, 2, 1])
    expected = {}
    for name in ("a", "b"):
        with kit.active(name):
            expected[name] = kit.model(**inputs, labels=labels)
    kit.activate(Parallel("a", "b"))
    out = kit.model(**inputs, labels=labels)
    torch.testing.assert_close(out.logits, torch.cat([expected["a"].logits, expected["b"].logits]), atol=1e-5, rtol=1e-5)
    for name in ("a", "b"):
        torch.testing.assert_close(out.losses[name], expected[name].loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, expected["a"].loss + expected["b"].loss, atol=1e-5, rtol=1e-5)
    by_name = kit.model(**inputs, labels={"b": labels})
    torch.testing.assert_close(by_name.loss, expected["b"].loss, atol=1e-5, rtol=1e-5)
    kit.activate(Stack("none", Parallel("a", "a")))
    same = kit.model(**inputs, labels=labels)
    with kit.active(Stack("none", "a")):
        torch.testing.assert_close(same.loss, kit.model(**inputs, labels=labels).loss, atol=1e-5, rtol=1e-5)


def test_choices_are_divided_by_whole_examples() -> None:
    kit = kit_of(bert(), {"a": ak.MultipleChoiceHead(2), "b": ak.MultipleChoiceHead(2, layers=2), "c": CLASSES})
    inputs = batch(8)
    kit.activate(BatchSplit("b", "a"))
    out = kit.model(**inputs, labels=torch.tensor([0, 1, 1, 0]))
    for name, part, which in (("b", slice(0, 4), slice(0, 2)), ("a", slice(4, 8), slice(2, 4))):
        with kit.active(name):
            alone = kit.model(
                **{key: tensor[part] for key, tensor in inputs.items()}, labels=torch.tensor([0, 1, 1, 0])[which]
            )
        torch.testing.assert_close(out.logits[which], alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.losses[name], alone.loss, atol=1e-5, rtol=1e-5)
    kit.activate(BatchSplit("a", "c"))
    out = kit.model(**inputs, labels={"c": torch.tensor([0, 1, 2, 1])})
    assert [tuple(logits.shape) for logits in out.logits] == [(2,)] * 2 + [(3,)] * 4
    with pytest.raises(ak.ConfigError, match="a MultipleChoiceHead takes several rows for one example"):
        kit.add("d", ADAPTER, heads=[ak.MultipleChoiceHead(2), CLASSES])


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, of hooks on what it compiles
@pytest.mark.parametrize("composition", [Rows(["a", "b", "tags", None]), Rows(["a", "b", "b", "a"]), BatchSplit("b", "a")])
def test_rows_with_heads_compile_without_a_graph_break(composition: Any) -> None:
    kit, inputs = mixed_kit(), batch()
    kit.activate(composition)
    labels = {"b": torch.tensor([1]) if composition.children[-1] is None else torch.tensor([1, 0])}
    expected = kit.model(**inputs, labels=labels)
    found = torch.compile(kit.model, backend="eager", fullgraph=True)(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)


def test_of_a_stack_the_last_owner_has_the_head_and_side_by_side_there_is_one() -> None:
    owners = {"a", "b", "a,b"}
    for composition, owner in [
        ("a", "a"), ("c", None), (None, None), (Stack("a", "b"), "b"), (Stack("a", "c"), "a"), (Stack("b", Stack("a", "c")), "a"),
        (Average("a", "c"), "a"), (Average("a", "a"), "a"), (Split("c", Stack("a", "c")), "a"), (Fuse("a", "b"), "a,b"),
        (Fuse("a", "c"), "a"), (Stack(Average("c", "c"), "b"), "b"), (Stack(Fuse("a", "b"), "c"), "a,b"),
    ]:  # fmt: skip
        assert head_owner(composition, owners) == owner
    for composition in (
        Average("a", "b"),
        Split("a", Stack("c", "b")),
        Fuse("a", "b", name="other"),
        Stack("c", Average("b", "a")),
    ):
        with pytest.raises(
            ak.CompatibilityError, match=r"cannot choose between the heads of .*, which act on the same rows"
        ):
            head_owner(composition, owners)


def test_what_cannot_choose_a_head_is_refused_when_it_is_activated() -> None:
    kit, inputs = mixed_kit(), batch()
    kit.activate("none")
    expected = kit.model(**inputs).last_hidden_state
    for composition in (Average("a", "b"), Rows(["none", Split("a", "b"), None, None])):
        with pytest.raises(ak.CompatibilityError, match="cannot choose between the heads"):
            kit.activate(composition)
        assert torch.equal(kit.model(**inputs).last_hidden_state, expected)
    with kit.active(Average("a", "none")):
        assert kit.model(**inputs).logits.shape == (4, 3)


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
    kit = ak.wrap(model)
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


class Custom(nn.Module):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(8, outputs)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.linear(hidden[:, 0]) if mask is None else self.linear(hidden.mean(1)) * mask.sum()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.sum(-1) - labels).abs().mean()


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


def test_the_width_of_a_plain_model_is_seen_or_told_or_asked_for() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 6)

        def forward(self, first: Any, second: Any) -> Any:
            return {"states": self.one(first) + second}

    kit = ak.wrap(Plain())
    config = ak.BottleneckConfig(targets=["one"], bottleneck_size=2)
    kit.example_inputs = None
    x = torch.randn(3, 2, 4), torch.randn(3, 2, 6)
    kit = ak.wrap(kit.model, x)
    kit.add("a", config, heads=ak.TaggingHead(num_labels=2))
    kit.activate("a")
    assert kit.model(*x).logits.shape == (3, 2, 2)
    with pytest.raises(ak.CompatibilityError, match=r"the head 'tagging' reads 6 features.*found dict"):
        kit.model(x[0][0, 0], x[1][0, 0])


# --- later, and away --------------------------------------------------------------------------------------------------


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


def test_generation_does_not_take_the_scores_of_classes_for_those_of_tokens() -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=19)
    model, prompts = GPT2LMHeadModel(config).eval(), torch.randint(0, 19, (2, 4))
    kit = ak.wrap(model, prompts)
    kit.add("a", "pfeiffer", bottleneck_size=2, heads=ak.ClassificationHead(num_labels=2, output="logits"))
    kit.activate("a")
    assert model(prompts).logits.shape == (2, 2)
    with pytest.raises(ak.CompatibilityError, match=r"next token, and the active heads \['classification'\]"):
        model.generate(prompts, max_new_tokens=2)
    with kit.base():
        assert len(model.generate(prompts, max_new_tokens=2)) == 2


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
    assert len(list(kit.parameters("a", heads=True))) == len(list(kit.parameters("a"))) + 4
    assert "a (head)" in str(kit.tree())
    assert kit.state_dict("a").keys() == {name for name, _ in kit.named_parameters("a")}


def test_copies_and_pickles_run_their_own_heads() -> None:
    kit, inputs, labels = mixed_kit(), batch(), torch.tensor([0, 1, 2, 1])
    kit.activate(Rows(["a", "b", "a", "b"]))
    expected = kit.model(**inputs, labels=labels)
    for other in (copy.deepcopy(kit.model), pickle.loads(pickle.dumps(kit.model))):
        found = other(**inputs, labels=labels)
        assert torch.equal(found.loss, expected.loss)
        ak.wrap(other).deactivate()
        assert not isinstance(other(**inputs), ak.HeadOutput)
    assert torch.equal(kit.model(**inputs, labels=labels).loss, expected.loss)


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


def test_a_base_checkpoint_loads_strictly_around_heads_on_the_output() -> None:
    model = bert()
    state = copy.deepcopy(model.state_dict())
    kit = kit_of(model, {"a": [CLASSES, ak.MaskedLMHead()]})
    model.load_state_dict(state, strict=True)
    with kit.base_checkpoint():
        assert model.state_dict().keys() == state.keys()
    assert not any("word_embeddings" in name for name, _ in kit.named_parameters("a", heads=True)), "read, not owned"


# --- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["alone", "stacked", "not undone"])
def test_a_head_with_the_vocabulary_undoes_invertible_adapters(how: str) -> None:
    """As in a model with a language model's head of its own, which has a place for the inverse."""
    own = BertForMaskedLM(BertConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in own.cls.parameters():
            parameter.normal_()
    bare = bert()
    bare.load_state_dict(
        {k.removeprefix("bert."): v for k, v in own.state_dict().items() if k.startswith("bert.")}, strict=False
    )
    inputs = batch()
    settings = {"output_targets": ()} if how == "not undone" else {}
    config = ak.Union(ak.InvertibleConfig(**settings), ak.BottleneckConfig(targets=["output.dense"], bottleneck_size=2))
    kits = [ak.wrap(model) for model in (own, bare)]
    for kit in kits:
        kit.add("de", config)
        kit.add("task", ADAPTER, heads=ak.MaskedLMHead() if kit.model is bare else ())
        for name in ("de", "task"):
            torch.manual_seed(len(name))
            randomise(kit, name)
        if kit.model is bare and how == "alone":
            kit.add_head("de", ak.MaskedLMHead())
        kit.activate("de" if how == "alone" else Stack("de", "task"))
    name = "de" if how == "alone" else "task"
    head, theirs = held(kits[1], name), own.cls.predictions
    head.inner[0].load_state_dict(theirs.transform.dense.state_dict())
    head.norms[0].load_state_dict(theirs.transform.LayerNorm.state_dict())
    head.norms[0].eps = theirs.transform.LayerNorm.eps
    head.bias.data.copy_(theirs.bias)
    labels = inputs["input_ids"]
    expected = own(**inputs, labels=labels)
    found = bare(**inputs, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)
    if how == "stacked":
        kits[1].add("fr", config)
        with pytest.raises(
            ak.CompatibilityError, match=r"invertible adapters of the embedding, \['de', 'fr'\], side by side"
        ):
            kits[1].activate(Stack(Average("de", "fr"), "task"))
        kits[1].activate(Rows([Stack("de", "task"), Stack("fr", "task"), "task", None]))
        mixed = bare(**inputs)
        for index, which in enumerate((Stack("de", "task"), Stack("fr", "task"), "task")):
            with kits[1].active(which):
                torch.testing.assert_close(mixed.logits[index], bare(**row(inputs, index)).logits[0], atol=1e-4, rtol=1e-4)


def test_a_plain_model_says_which_embedding_is_meant() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions, self.mix = nn.Embedding(9, 8), nn.Embedding(5, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.mix(self.tokens(ids) + self.positions.weight)

    model, ids = Plain(), torch.randint(0, 9, (3, 5))
    kit, config = ak.wrap(model, ids), ak.BottleneckConfig(targets=["mix"], bottleneck_size=2)
    with pytest.raises(ak.TargetError, match=r"has \['tokens', 'positions'\] that may be meant: name it with tied="):
        kit.add("a", config, heads=ak.CausalLMHead())
    kit.add("a", config, heads=ak.CausalLMHead(tied="tokens"))
    kit.activate("a")
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits, out.output @ model.tokens.weight.T)


class Examples(torch.utils.data.Dataset):  # type: ignore[type-arg]  # not generic at run time
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(0, 20, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones(6).long(), "labels": index % 3}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_trainer_trains_and_evaluates_a_head_on_the_output(tmp_path: Any) -> None:
    kit = ak.wrap(bert())
    kit.add("a", ADAPTER, heads=CLASSES)
    kit.train_adapter("a")
    before = [p.detach().clone() for p in kit.parameters("a", heads=True)]
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, per_device_eval_batch_size=3, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="no", remove_unused_columns=False,
        label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(kit.model, settings, train_dataset=Examples(), eval_dataset=Examples())
    trainer.train()
    assert not any(torch.equal(p, old) for p, old in zip(kit.parameters("a", heads=True), before, strict=True))
    kit.model.eval()
    batch = {k: torch.stack([torch.as_tensor(Examples()[i][k]) for i in range(8)]) for k in ("input_ids", "attention_mask")}
    out = kit.model(**batch, labels=torch.tensor([i % 3 for i in range(8)]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(out.loss.item(), abs=1e-4)
    found = trainer.predict(Examples()).predictions
    torch.testing.assert_close(torch.as_tensor(found[0]), out.logits.detach(), atol=1e-5, rtol=1e-5)


def test_stacked_invertible_adapters_are_undone_from_the_last_to_the_first() -> None:
    model, ids = nn.Sequential(nn.Embedding(9, 8)), torch.randint(0, 9, (3, 4))
    kit = ak.wrap(model, ids)
    for name in ("de", "style"):
        kit.add(name, ak.InvertibleConfig(targets=["0"], block="glow"))
        randomise(kit, name)
    kit.add_head("style", ak.CausalLMHead())
    kit.activate(Stack("de", "style"))
    out = model(ids)
    assert not torch.allclose(out.output, model[0].weight[ids], atol=0.1)
    torch.testing.assert_close(out.logits, model[0].weight[ids] @ model[0].weight.T, atol=1e-4, rtol=1e-4)
