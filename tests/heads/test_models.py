"""Heads on models of several kinds: where their tokens end, and how their vocabulary is read."""

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    T5Config,
    T5EncoderModel,
    T5Model,
    Trainer,
    TrainingArguments,
)

import adapterkit as ak
from adapterkit.composition.nodes import Average, Rows, Stack
from adapterkit.runtime.this_call import THIS_CALL

from ..hosts.tiny import randomise
from .helpers import ADAPTER, CLASSES, SMALL, batch, bert, held, row


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
