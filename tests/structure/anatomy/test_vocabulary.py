"""What maps the last hidden states to logits over the vocabulary: `@output_embedding`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.anatomy.roles import role_paths, role_places

from ...hosts.blocks import VOCAB, WIDTH, Model, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def outputs(model: nn.Module, inputs: Any = None) -> list[str]:
    return role_paths("@output_embedding", discover(model, inputs)[0])


def t5(**settings: Any) -> nn.Module:
    return T.T5ForConditionalGeneration(
        T.T5Config(d_model=8, num_layers=2, num_heads=2, d_kv=4, d_ff=16, vocab_size=20, **settings)
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: T.BertForMaskedLM(T.BertConfig(**SMALL)), "cls.predictions.decoder"),
        (lambda: T.BertForPreTraining(T.BertConfig(**SMALL)), "cls.predictions.decoder"),
        (lambda: T.RobertaForMaskedLM(T.RobertaConfig(**SMALL, **ENDS)), "lm_head.decoder"),
        (
            lambda: T.DistilBertForMaskedLM(T.DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=20)),
            "vocab_projector",
        ),
        (
            lambda: T.GPT2LMHeadModel(
                T.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=2)
            ),
            "lm_head",
        ),
        (lambda: T.LlamaForCausalLM(T.LlamaConfig(**SMALL, tie_word_embeddings=False)), "lm_head"),
        (lambda: T.LlamaForCausalLM(T.LlamaConfig(**SMALL, tie_word_embeddings=True)), "lm_head"),
        (t5, "lm_head"),
        (lambda: t5(tie_word_embeddings=False), "lm_head"),
        (lambda: T.ElectraForMaskedLM(T.ElectraConfig(**SMALL, embedding_size=4)), "generator_lm_head"),
    ],
)
def test_language_models_of_transformers_have_an_output_embedding(make: Callable[[], nn.Module], expected: str) -> None:
    assert outputs(make()) == [expected]


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.BertModel(T.BertConfig(**SMALL)),
        lambda: T.BertForSequenceClassification(T.BertConfig(**SMALL)),
        lambda: T.BertForTokenClassification(T.BertConfig(**SMALL, num_labels=2)),  # as many as there are token types
        lambda: T.ViTModel(T.ViTConfig(**SMALL, image_size=16, patch_size=8)),
        lambda: Model(Pre),
    ],
)
def test_other_models_have_no_output_embedding(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert outputs(model) == []
    with pytest.raises(ak.TargetError, match=r"'@output_embedding': tracing \w+ finds no such place"):
        ak.wrap(model).sites(ak.BottleneckConfig(targets=["@output_embedding"]))


def test_token_types_that_are_given_are_no_vocabulary() -> None:
    model = T.BertForTokenClassification(T.BertConfig(**SMALL, num_labels=2))
    assert outputs(model, {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)}) == []


class LanguageModel(Model):
    """Hidden states, through a dense layer as wide as the vocabulary, to logits."""

    def __init__(self, features: int = VOCAB) -> None:
        super().__init__(Pre)
        self.dense, self.head = nn.Linear(WIDTH, VOCAB), nn.Linear(VOCAB, features)
        self.value = nn.Linear(WIDTH, 1)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.dense(x))), self.value(x)


def test_what_is_projected_further_is_not_the_output() -> None:
    assert outputs(randomised(LanguageModel()), IDS) == ["head"]
    assert outputs(randomised(LanguageModel(VOCAB - 1)), IDS) == []


class TwoHeads(Model):
    """Two heads of one size; the second may share the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__(Pre)
        self.head, self.other = nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, VOCAB)
        if tied:
            self.other.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x), self.other(x)


def test_an_output_embedding_that_shares_the_embeddings_weight_is_preferred() -> None:
    assert outputs(randomised(TwoHeads(tied=True)), IDS) == ["other"]
    assert outputs(randomised(TwoHeads(tied=False)), IDS) == ["head", "other"]


def test_a_product_that_no_module_returns_cannot_be_named() -> None:
    class Functional(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = block(x)
            return F.linear(self.norm(x), self.embedding.weight)

    assert outputs(randomised(Functional(Pre)), IDS) == []


def test_an_adapter_can_sit_at_the_output_embedding() -> None:
    model = randomised(TwoHeads(tied=True))
    (place,) = role_places("@output_embedding", discover(model, IDS)[0])
    assert (place.path, place.output, place.shape, place.axis) == ("other", (), (2, 5, VOCAB), -1)
    kit = ak.wrap(model, IDS)
    kit.add("a", ak.BottleneckConfig(targets=["@output_embedding"], bottleneck_size=2))
    assert [(site.path, site.width) for site in kit.sites(kit.adapters["a"])] == [("other", VOCAB)]
    assert str(kit.tree()).count("@output_embedding") == 1
