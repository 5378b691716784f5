"""Tiny models of every family that the `adapters` library knows, with all weights random, and inputs for them."""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any

import adapters.models
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    PretrainedConfig,
    PreTrainedModel,
)

__all__ = ["build", "families", "make_inputs", "randomise_", "tiny_config"]

VOCABULARY, TOKENS, ENCODER_LAYERS, DECODER_LAYERS = 101, 7, 3, 2
# What configs call their sizes; every config takes those that its signature names. Encoders and decoders differ in depth.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd"), 32),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), ENCODER_LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), DECODER_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("embedding_size", "projection_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 40),
    "image_size": 16,
    "max_source_positions": 8,
    "num_key_value_heads": 2,
    "num_mel_bins": 10,
    "patch_size": 8,
    "rotary_dim": 4,
    "vocab_size": VOCABULARY,
}
_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
# What a family leaves out by default: its checkpoints use it; X-MOD by default runs one norm twice in each block, which no
# hook can tell apart.
_ALSO: dict[str, dict[str, Any]] = {
    "albert": {"num_hidden_groups": 2},
    "beit": {"use_relative_position_bias": True},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
    "deberta_v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
    "xmod": {"adapter_layer_norm": True},
}


def families() -> list[str]:
    """The native families of the `adapters` library, by the names of its packages."""
    return [module.name for module in pkgutil.iter_modules(adapters.models.__path__) if module.name != "auto"]


def build(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model in eval mode, every parameter random."""
    if family == "encoder_decoder":
        encoder = BertModel(tiny_config(BertConfig))
        decoder = tiny_config(BertConfig, num_hidden_layers=DECODER_LAYERS, is_decoder=True, add_cross_attention=True)
        model: PreTrainedModel = EncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(decoder))
    else:
        kind = next(key for key in (family, family.replace("_", "-")) if key in CONFIG_MAPPING)
        model = AutoModel.from_config(tiny_config(CONFIG_MAPPING[kind], **_ALSO.get(family, {})))
    randomise_(model, seed)
    if hasattr(model, "set_default_language"):  # X-MOD has an adapter for each language, and wants to be told which
        model.set_default_language(model.config.languages[0])
    return model.eval()


def make_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword inputs for whatever the model's forward takes; tokens come with a padding mask."""
    takes = inspect.signature(model.forward).parameters
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([TOKENS, TOKENS - 2, TOKENS - 4])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()  # (batch, seq)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (len(lengths), length), generator=draw)

    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        inputs |= {"input_ids": tokens(TOKENS), "attention_mask": mask}
    if "pixel_values" in takes:
        inputs["pixel_values"] = torch.randn(len(lengths), 3, _SIZES["image_size"], _SIZES["image_size"], generator=draw)
    if "input_features" in takes:
        frames = 2 * _SIZES["max_source_positions"]
        inputs["input_features"] = torch.randn(len(lengths), _SIZES["num_mel_bins"], frames, generator=draw)
    if "decoder_input_ids" in takes:
        inputs |= {"decoder_input_ids": tokens(TOKENS), "decoder_attention_mask": mask.flip(0)}
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs


def tiny_config(kind: type[PretrainedConfig], **also: Any) -> PretrainedConfig:
    """A config of this kind with tiny sizes, its parts too."""
    takes = inspect.signature(kind.__init__).parameters
    settings = {name: value for name, value in (_SIZES | _TOKENS).items() if name in takes}
    parts = {name: tiny_config(part).to_dict() for name, part in kind.sub_configs.items() if name in takes}
    return kind(**settings | parts | also)


def randomise_(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, of a size that keeps activations near 1; norms and biases, too."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=draw)
            if "bias" in name and parameter.dim() < 2:
                noise = 0.3 * noise
            elif parameter.dim() < 2:  # the weight of a norm, a layer scale, a temperature
                noise = 1 + 0.3 * noise.clamp(-2, 2)
            elif not isinstance(module, nn.Embedding):
                noise = noise / (parameter.numel() / parameter.shape[0]) ** 0.5
            parameter.data.copy_(noise)
