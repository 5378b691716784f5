"""One small model with random weights of each build of UNet and transformer in diffusers, and autoencoders beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from .weights import randomise

__all__ = ["EXPLAINED", "IRREGULAR", "LIBRARIES", "build", "check_builds", "names"]

LIBRARIES = ("diffusers",)
BATCH, TOKENS = 2, 5
Settings = dict[str, Any]
_STEPS = torch.tensor([3, 700])


class _Model(NamedTuple):
    """A model's settings, and its inputs: a tuple is the shape of random numbers, anything else is handed in as it is."""

    settings: Settings
    inputs: Settings
    kind: str = ""  # the class, where it is not the name


def _image(channels: int = 4, side: int = 8) -> tuple[int, ...]:
    return (BATCH, channels, side, side)


def _video(channels: int = 4, frames: int = 3, side: int = 8) -> tuple[int, ...]:
    return (BATCH, channels, frames, side, side)


def _text(width: int) -> tuple[int, ...]:
    return (BATCH, TOKENS, width)


def _mask() -> Tensor:
    return torch.ones(BATCH, TOKENS, dtype=torch.bool)


def _packed(channels: int, text: int) -> Settings:
    """An image as patches side by side, and text, with the positions of both."""
    return {
        "hidden_states": (BATCH, 16, channels),
        "encoder_hidden_states": _text(text),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(TOKENS, 3),
        "timestep": torch.tensor([0.1, 0.7]),
    }


_CHANNELS = {"in_channels": 4, "out_channels": 4}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_UNET = {**_CHANNELS, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
_VAE = {**_CHANNELS, "block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4}
_DOWN_UP = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_SIZES = {"original_size": torch.tensor([[64.0, 64]] * 2), "target_size": torch.tensor([[64.0, 64]] * 2)}
_CROPPED = {**_SIZES, "crop_coords": torch.zeros(2, 2)}


def _blocks(kind: str) -> Settings:
    """The types of a UNet's blocks: one with attention, one without, down and up."""
    return {
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }


_STEP = {"timestep": _STEPS}
_MODELS: Mapping[str, _Model] = {
    # --- UNets --------------------------------------------------------------------------------------------------------
    "UNet2DModel": _Model(
        {
            **_UNET,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        {"sample": _image(), **_STEP},
    ),
    "UNet2DConditionModel": _Model(
        {**_UNET, **_blocks("2D"), "cross_attention_dim": 12, "attention_head_dim": 2},
        {"sample": _image(), **_STEP, "encoder_hidden_states": _text(12)},
    ),
    "UNet2DConditionModel-deep": _Model(  # as in Stable Diffusion XL: several transformer blocks behind one projection
        {
            **_UNET,
            **_blocks("2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
            "transformer_layers_per_block": (3, 1),
            "use_linear_projection": True,
        },
        {"sample": _image(), **_STEP, "encoder_hidden_states": _text(12)},
        "UNet2DConditionModel",
    ),
    "UNet3DConditionModel": _Model(
        {**_UNET, **_blocks("3D"), "cross_attention_dim": 12, "attention_head_dim": 2},
        {"sample": _video(), **_STEP, "encoder_hidden_states": _text(12)},
    ),
    "UNetMotionModel": _Model(
        {**_UNET, **_blocks("Motion"), "cross_attention_dim": 12, "num_attention_heads": 2},
        {"sample": _video(), **_STEP, "encoder_hidden_states": (BATCH * 3, TOKENS, 12)},
    ),
    "UNetSpatioTemporalConditionModel": _Model(
        {
            **_CHANNELS,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 12,
            "num_attention_heads": 4,
            "layers_per_block": 1,
            "sample_size": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        {
            "sample": (BATCH, 3, 4, 8, 8),
            **_STEP,
            "encoder_hidden_states": (BATCH, 1, 12),
            "added_time_ids": torch.tensor([[6.0, 127, 0.02]] * 2),
        },
    ),
    "UVit2DModel": _Model(
        {
            "hidden_size": 32,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 16,
            "encoder_hidden_size": 12,
            "vocab_size": 20,
            "codebook_size": 16,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 1,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "block_num_heads": 4,
            "intermediate_size": 48,
            "sample_size": 8,
        },
        {
            "input_ids": torch.arange(BATCH * 64).view(BATCH, 8, 8) % 16,
            "encoder_hidden_states": _text(12),
            "pooled_text_emb": (BATCH, 16),
            "micro_conds": torch.tensor([[1.0, 2, 3, 4]] * 2),
        },
    ),
    # --- autoencoders -------------------------------------------------------------------------------------------------
    "AutoencoderKL": _Model({**_VAE, **_DOWN_UP}, {"sample": _image()}),
    "AsymmetricAutoencoderKL": _Model(
        {
            **_CHANNELS,
            **_DOWN_UP,
            "down_block_out_channels": (16, 32),
            "up_block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "latent_channels": 4,
        },
        {"sample": _image()},
    ),
    "VQModel": _Model({**_VAE, **_DOWN_UP, "num_vq_embeddings": 12}, {"sample": _image()}),
    "AutoencoderTiny": _Model(
        {
            **_CHANNELS,
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 2),
            "num_decoder_blocks": (2, 1),
        },
        {"sample": _image()},
    ),
    "AutoencoderDC": _Model(
        {
            "in_channels": 3,
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (16, 32),
            "decoder_block_out_channels": (16, 32),
            "encoder_layers_per_block": (1, 2),
            "decoder_layers_per_block": (1, 2),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
        },
        {"sample": _image(3)},
    ),
    # --- transformers of images ---------------------------------------------------------------------------------------
    "Transformer2DModel": _Model(
        {**_HEADS, "in_channels": 16, "num_layers": 2, "norm_num_groups": 8, "cross_attention_dim": 12},
        {"hidden_states": _image(16), "encoder_hidden_states": _text(12)},
    ),
    "TransformerTemporalModel": _Model(
        {**_HEADS, "in_channels": 16, "num_layers": 2, "norm_num_groups": 8},
        {"hidden_states": (BATCH * 3, 16, 8, 8), "num_frames": 3},
    ),
    "DiTTransformer2DModel": _Model(
        {**_HEADS, **_CHANNELS, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 8},
        {"hidden_states": _image(), **_STEP, "class_labels": torch.tensor([1, 3])},
    ),
    "PixArtTransformer2DModel": _Model(
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "sample_size": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "use_additional_conditions": False,
        },
        {
            "hidden_states": _image(),
            **_STEP,
            "encoder_hidden_states": _text(12),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": _Model(
        {
            **_HEADS,
            **_CHANNELS,
            "sample_size": 8,
            "num_layers": 3,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 8,
        },
        {"hidden_states": _image(), **_STEP, "encoder_hidden_states": _text(12), "pooled_projections": (BATCH, 12)},
    ),
    "FluxTransformer2DModel": _Model(
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 4, 8),
        },
        {**_packed(4, 12), "pooled_projections": (BATCH, 12)},
    ),
    "ChromaTransformer2DModel": _Model(
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        _packed(4, 12),
    ),
    "AuraFlowTransformer2DModel": _Model(
        {
            **_HEADS,
            **_CHANNELS,
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "pos_embed_max_size": 64,
        },
        {"hidden_states": _image(), **_STEP, "encoder_hidden_states": _text(12)},
    ),
    "HunyuanDiT2DModel": _Model(
        {
            **_HEADS,
            "in_channels": 4,
            "sample_size": 8,
            "patch_size": 2,
            "num_layers": 4,
            "hidden_size": 16,
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 6,
            "text_len": TOKENS,
            "text_len_t5": TOKENS,
        },
        {
            "hidden_states": _image(),
            "timestep": _STEPS.float(),
            "encoder_hidden_states": _text(12),
            "text_embedding_mask": torch.ones(BATCH, TOKENS),
            "encoder_hidden_states_t5": _text(16),
            "text_embedding_mask_t5": torch.ones(BATCH, TOKENS),
            "image_meta_size": torch.tensor([[64.0, 64, 16, 16, 0, 0]] * 2),
            "style": torch.zeros(BATCH, dtype=torch.long),
            "image_rotary_emb": [torch.ones(16, 8), torch.zeros(16, 8)],
        },
    ),
    "LuminaNextDiT2DModel": _Model(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 12,
            "learn_sigma": False,
        },
        {
            "hidden_states": _image(),
            "timestep": torch.tensor([0.1, 0.7]),
            "encoder_hidden_states": _text(12),
            "encoder_mask": torch.ones(BATCH, TOKENS),
            "image_rotary_emb": torch.ones(64, 64, 4, dtype=torch.complex64),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": _Model(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 12,
        },
        {
            "hidden_states": _image(),
            "timestep": torch.tensor([0.1, 0.7]),
            "encoder_hidden_states": _text(12),
            "encoder_attention_mask": _mask(),
        },
    ),
    "SanaTransformer2DModel": _Model(
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "sample_size": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "patch_size": 1,
        },
        {"hidden_states": _image(), **_STEP, "encoder_hidden_states": _text(12)},
    ),
    "CogView3PlusTransformer2DModel": _Model(
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "sample_size": 8,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
        },
        {"hidden_states": _image(), **_STEP, "encoder_hidden_states": _text(12), **_CROPPED},
    ),
    "CogView4Transformer2DModel": _Model(
        {**_HEADS, **_CHANNELS, "num_layers": 2, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 2},
        {"hidden_states": _image(), **_STEP, "encoder_hidden_states": _text(12), **_CROPPED},
    ),
    "QwenImageTransformer2DModel": _Model(
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (8, 4, 4),
        },
        {
            "hidden_states": (BATCH, 16, 16),
            "encoder_hidden_states": _text(12),
            "encoder_hidden_states_mask": _mask().long(),
            "timestep": torch.tensor([0.1, 0.7]),
            "img_shapes": [(1, 4, 4)] * BATCH,
        },
    ),
    "PriorTransformer": _Model(
        {**_HEADS, "num_layers": 2, "embedding_dim": 12, "num_embeddings": TOKENS, "additional_embeddings": 4},
        {"hidden_states": (BATCH, 12), **_STEP, "proj_embedding": (BATCH, 12), "encoder_hidden_states": _text(12)},
    ),
    # --- transformers of videos and sound -----------------------------------------------------------------------------
    "AllegroTransformer3DModel": _Model(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            **_CHANNELS,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 3,
            "caption_channels": 12,
        },
        {
            "hidden_states": _video(),
            **_STEP,
            "encoder_hidden_states": _text(12),
            "image_rotary_emb": None,
        },
    ),
    "LatteTransformer3DModel": _Model(
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 2,
            "sample_size": 8,
            "video_length": 3,
            "patch_size": 2,
            "caption_channels": 12,
            "cross_attention_dim": 16,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 1000,
            "norm_elementwise_affine": False,
            "attention_bias": True,
        },
        {"hidden_states": _video(), **_STEP, "encoder_hidden_states": _text(12)},
    ),
    "CogVideoXTransformer3DModel": _Model(
        {
            **_HEADS,
            **_CHANNELS,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": TOKENS,
        },
        {"hidden_states": (BATCH, 3, 4, 8, 8), **_STEP, "encoder_hidden_states": _text(12)},
    ),
    "MochiTransformer3DModel": _Model(
        {
            **_HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "pooled_projection_dim": 8,
            "text_embed_dim": 24,
            "time_embed_dim": 4,
            "max_sequence_length": TOKENS,
        },
        {"hidden_states": _video(), **_STEP, "encoder_hidden_states": _text(24), "encoder_attention_mask": _mask()},
    ),
    "LTXVideoTransformer3DModel": _Model(
        {**_HEADS, **_CHANNELS, "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12},
        {
            "hidden_states": (BATCH, 3 * 4 * 4, 4),
            **_STEP,
            "encoder_hidden_states": _text(12),
            "encoder_attention_mask": _mask(),
            "num_frames": 3,
            "height": 4,
            "width": 4,
        },
    ),
    "WanTransformer3DModel": _Model(
        {
            **_CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        {"hidden_states": _video(), **_STEP, "encoder_hidden_states": _text(12)},
    ),
    "HunyuanVideoTransformer3DModel": _Model(
        {
            **_CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "guidance_embeds": False,
            "text_embed_dim": 12,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        {
            "hidden_states": _video(),
            **_STEP,
            "encoder_hidden_states": _text(12),
            "encoder_attention_mask": _mask(),
            "pooled_projections": (BATCH, 8),
        },
    ),
    "StableAudioDiTModel": _Model(
        {
            "sample_size": 16,
            **_CHANNELS,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "cross_attention_input_dim": 12,
            "time_proj_dim": 8,
            "global_states_input_dim": 12,
        },
        {
            "hidden_states": (BATCH, 4, 16),
            **_STEP,
            "encoder_hidden_states": _text(12),
            "global_hidden_states": (BATCH, 1, 12),
        },
    ),
}
# Models whose blocks of one build differ, with the reason: none.
IRREGULAR: dict[str, str] = {}
# Why those fail that do: none is known yet.
EXPLAINED: dict[str, str] = {}


def names() -> list[str]:
    """All of them."""
    return list(_MODELS)


def check_builds(name: str) -> None:
    """Build the small model without memory for weights: the default one of several classes has billions of them."""
    with torch.device("meta"):
        _make(name)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model in eval mode, and keyword inputs that it runs on."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    inputs = {
        key: torch.randn(value, generator=draw) if isinstance(value, tuple) else value
        for key, value in _MODELS[name].inputs.items()
    }
    return randomise(_make(name).eval()), inputs


def _make(name: str) -> nn.Module:
    model: nn.Module = getattr(diffusers, _MODELS[name].kind or name)(**_MODELS[name].settings)
    return model
