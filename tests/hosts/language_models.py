"""Small models of transformers, and what it takes to compare their outputs."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=32)).eval()


def llama() -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        vocab_size=20,
    )
    return LlamaForCausalLM(config).eval()


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def give_biases(model: nn.Module) -> None:
    """Norms and biases that do something: transformers starts them at one and zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
