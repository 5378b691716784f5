"""Tiny random models in folders with the names of real ones, so that `from_pretrained` of the docs works offline."""

from pathlib import Path

import pytest
import torch

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a and boring cast dull fine film great in it lisbon met mary movie of the time was waste what"


def stand_ins(folder: Path) -> None:
    """Write a BERT with its word pieces, and a LLaMA, into `folder`, under the ids that they have on the Hub."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = WORDS.split()
    bert = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,  # far enough from zero that sentences differ
    )
    # As the published checkpoint: with its pooler and its masked-LM head, without a classifier.
    transformers.BertForPreTraining(bert).save_pretrained(folder / "google-bert/bert-base-uncased")
    (folder / "google-bert/bert-base-uncased/vocab.txt").write_text("\n".join(words))
    llama = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M")
