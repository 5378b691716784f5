"""Hugging Face models: their outputs, checkpoints, gradient checkpointing and Trainer."""

import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import adapterkit as ak

from .hosts.tiny import randomise

SMALL = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
PFEIFFER = ak.BottleneckConfig(
    targets=["layer.*.output.LayerNorm"], at="renormalised", bottleneck_size=3, non_linearity="gelu"
)


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return {"input_ids": torch.randint(0, 20, (2, 4)), "attention_mask": mask, "labels": torch.tensor([0, 2])}


def test_pfeiffer_on_bert_is_found_by_name_alone(bert: BertForSequenceClassification, batch: dict[str, Tensor]) -> None:
    expected = bert(**batch)
    kit = ak.wrap(bert)
    kit.add("a", PFEIFFER, heads=["classifier"])
    kit.train_adapter("a")
    assert [site.path for site in kit.sites(PFEIFFER)] == [f"bert.encoder.layer.{i}.output.LayerNorm" for i in (0, 1)]
    output = bert(**batch)
    assert torch.equal(output.logits, expected.logits)
    assert type(output) is SequenceClassifierOutput
    bert.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in kit.parameters("a", heads=True))
    kit.verify(batch).require()


def test_hidden_states_that_a_model_collects_are_those_that_flow_on(batch: dict[str, Tensor]) -> None:
    """Transformers collects them by hooks, which it registers in the first forward: before the adapter's."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=20)).eval()
    ids = batch["input_ids"]
    model(ids, output_hidden_states=True)
    kit = ak.wrap(model)
    kit.add("a", "pfeiffer", bottleneck_size=3, non_linearity="gelu")
    randomise(kit, "a")
    entering: list[Tensor] = []
    model.transformer.h[1].register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    with kit.active("a"):
        collected = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(collected[1], entering[0])


def test_the_root_and_its_model_output_can_be_adapted(
    bert: BertForSequenceClassification, batch: dict[str, Tensor]
) -> None:
    kit = ak.wrap(bert, example_inputs=batch)
    kit.add("a", ak.BottleneckConfig(targets=[""], output="logits", bottleneck_size=2))
    before = bert(**batch)
    randomise(kit, "a")
    kit.activate("a")
    after = bert(**batch)
    assert type(after) is SequenceClassifierOutput
    assert torch.equal(after.loss, before.loss)
    assert not torch.equal(after.logits, before.logits)
    assert after["logits"] is after.logits


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # older ones have no other
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(
    bert: BertForSequenceClassification, batch: dict[str, Tensor], reentrant: bool
) -> None:
    bert.config.hidden_dropout_prob = bert.config.attention_probs_dropout_prob = 0.0
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    kit = ak.wrap(bert.train())
    kit.add("a", PFEIFFER)
    randomise(kit, "a")
    kit.train_adapter("a")
    bert(**batch).loss.backward()
    plain = [p.grad.clone() for p in kit.parameters("a") if p.grad is not None]
    bert.zero_grad()
    bert.gradient_checkpointing_enable({"use_reentrant": reentrant})
    bert(**batch).loss.backward()
    recomputed = [p.grad for p in kit.parameters("a")]
    assert len(plain) == 8
    for one, other in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_gradients_go_below_the_first_adapter_only_while_the_model_is_checkpointed(
    bert: BertForSequenceClassification, batch: dict[str, Tensor]
) -> None:
    kit = ak.wrap(bert.train())
    kit.add("a", PFEIFFER)
    kit.train_adapter("a")

    def embedding_requires_grad() -> bool:
        seen = []
        with bert.bert.embeddings.register_forward_hook(lambda _module, _args, output: seen.append(output.requires_grad)):
            bert(**batch)
        return seen[0]

    assert not embedding_requires_grad()
    bert.gradient_checkpointing_enable()
    bert.disable_input_require_grads()  # transformers' own remedy, which newer versions switch on, too
    assert embedding_requires_grad()
    bert.gradient_checkpointing_disable()
    assert not embedding_requires_grad()


def test_a_frozen_model_is_freed_when_it_is_let_go() -> None:
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2))
    ak.wrap(model).freeze()
    gone = weakref.ref(model.bert)
    del model
    assert gone() is None, "without waiting for a collection of cycles"


def test_generation_with_a_cache_equals_generation_without() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=32)).eval()
    ids = torch.randint(0, 20, (2, 4))
    kit = ak.wrap(model, {"input_ids": ids})
    kit.add("a", ak.BottleneckConfig(targets=["h.*"], bottleneck_size=3))
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    randomise(kit, "a")
    kit.activate("a")
    cached, uncached = (
        model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)


def test_save_pretrained_does_not_mix_adapters_into_the_base_in_silence(
    bert: BertForSequenceClassification, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = bert(**batch).logits
    kit = ak.wrap(bert)
    kit.add("a", PFEIFFER)
    randomise(kit, "a")
    kit.activate("a")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bert.save_pretrained(tmp_path / "mixed")
    texts = [str(warning.message) for warning in said]
    assert sum("save_pretrained is writing adapters into the base model's file" in text for text in texts) == 1, texts
    with warnings.catch_warnings(), kit.base_checkpoint():
        warnings.simplefilter("error")
        bert.save_pretrained(tmp_path / "base")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(again(**batch).logits, expected)
    folder = kit.save("a", tmp_path / "adapter")
    other = ak.wrap(again)
    other.activate(other.load(folder))
    assert torch.equal(again(**batch).logits, bert(**batch).logits)


def test_published_parameter_counts_come_out_exactly() -> None:
    """RoBERTa-base shapes: AdapterHub's own figures for Pfeiffer, Houlsby and the parallel adapter."""
    with torch.device("meta"):
        kit = ak.wrap(RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)))
    dense = {"targets": ["layer.*.output.dense"]}
    configs = {
        894_528: {"targets": ["layer.*.output.LayerNorm"], "at": "renormalised", "reduction_factor": 16},
        1_789_056: {"targets": ["layer.*.output.dense", "attention.output.dense"], "reduction_factor": 16},
        7_091_712: {**dense, "residual": "intermediate", "placement": "parallel", "reduction_factor": 2},
    }
    for count, settings in configs.items():
        kit.add("a", {"method": "bottleneck", **settings})
        assert kit.summary().adapters[0].parameters == count
        kit.remove("a")
    assert kit.summary().base_parameters == 124_645_632


def test_adapters_run_on_a_base_that_accelerate_offloads(batch: dict[str, Tensor]) -> None:
    def model() -> BertForSequenceClassification:
        torch.manual_seed(3)
        return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()

    plain, offloaded = ak.wrap(model()), ak.wrap(cpu_offload(model(), execution_device=torch.device("cpu")))
    for kit in (plain, offloaded):
        kit.add("a", PFEIFFER, seed=1, init="bert")
        kit.activate("a")
    assert torch.equal(plain.model(**batch).logits, offloaded.model(**batch).logits)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]  # not generic at run time
    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[index % 2] for key, value in self.batch.items()}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_trainer_trains_saves_and_resumes_the_adapter(batch: dict[str, Tensor], tmp_path: Path) -> None:
    def kit_on_fresh_base() -> ak.AdapterKit:
        torch.manual_seed(3)
        kit = ak.wrap(BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)))
        kit.add("a", PFEIFFER, heads=["classifier"])
        kit.train_adapter("a")
        return kit

    def trainer(kit: ak.AdapterKit, steps: int) -> Trainer:
        settings = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        return Trainer(kit.model, settings, train_dataset=Rows(batch))

    whole = kit_on_fresh_base()
    trainer(whole, 4).train()
    assert (tmp_path / "checkpoint-2").is_dir()
    resumed = kit_on_fresh_base()
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.parameters("a", heads=True), resumed.parameters("a", heads=True), strict=True):
        torch.testing.assert_close(one, other)
    assert whole.verify().base_is_unmoved
    assert resumed.verify().base_is_unmoved
