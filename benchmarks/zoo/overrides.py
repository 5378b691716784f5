"""What single types need beyond the rules of `shrink.py` and `make_inputs.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.make_inputs import BATCH, TOKENS, setting, tensor_for

Inputs = dict[str, Any]

# Multimodal rotary sections: half a head of 8, or a quarter of one of 16.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_HALF_MROPE = {**_MROPE, "partial_rotary_factor": 0.5}

# Every checkpoint has a token for images; every second layer of the Q-Former looks at them.
_QUESTION = {"image_token_index": 90, "num_query_tokens": 8, "qformer_config.num_hidden_layers": 4}

# A convolutional backbone of four stages, the last three of which a detector looks at.
_BACKBONE = {
    "model_type": "hgnet_v2",
    "out_indices": [2, 3, 4],
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 24, 32, 40],
    "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": [24, 32, 40, 48],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "hidden_sizes": [24, 32, 40, 48],
}
_DETR = {
    "backbone_config": _BACKBONE,
    "encoder_in_channels": [32, 40, 48],
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_n_points": 2,
    "num_queries": 10,
    "lqe_hidden_dim": 16,
}
_DINO = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

_DOTS3_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "shared_experts_intermediate_size": 24,
    "num_hidden_layers": 4,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 12,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "sliding_window": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 20,
    "swa_kv_lora_rank": 12,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 12,
    "swa_v_head_dim": 8,
}

_EDGETAM_WIDTHS = (
    "vision_config.fpn_hidden_size",
    "prompt_encoder_config.hidden_size",
    "mask_decoder_config.hidden_size",
    "memory_attention_hidden_size",
    "memory_encoder_hidden_size",
    "mask_downsampler_embed_dim",
    "memory_fuser_embed_dim",
)

# Keyword arguments of a config's class, in place of shrinking: for sizes that it checks or that hang together.
CONFIGS: dict[str, Inputs] = {
    "d_fine": _DETR,
    "deimv2": _DETR,
    "depth_pro": {
        "patch_size": 32,
        "image_model_config": _DINO,
        "patch_model_config": _DINO,
        "fov_model_config": _DINO,
        "intermediate_hook_ids": [3, 1],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [24, 24, 16],
        "fusion_hidden_size": 16,
    },
    "dots3_note": {
        "text_config": {"model_type": "dots3_note_text", **_DOTS3_TEXT},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "patch_size": 8,
            "pyramid_num_routed": [-1, -1, 4, 6],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "feature_size": 16,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": 32,
        },
        "image_token_id": 90,
        "video_token_id": 91,
        "audio_token_id": 92,
    },
    "dots3_note_text": _DOTS3_TEXT,
    "efficientloftr": {
        "stage_num_blocks": [1, 2, 2, 2],
        "out_features": [8, 8, 16, 32],
        "hidden_size": 32,
        "num_attention_layers": 2,
        "num_attention_heads": 8,  # the rotary table fits these alone
    },
    "gemma3n_text": {
        "vocab_size": 99,
        "vocab_size_per_layer_input": 99,
        "hidden_size": 32,
        "hidden_size_per_layer_input": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "laurel_rank": 8,
        "sliding_window": 4,
        "max_position_embeddings": 128,
    },
    "lw_detr": {
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "image_size": 64,
            "pretrain_image_size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_windows": 4,
            "window_block_indices": [0, 2],
            "out_indices": [2, 4],
        },
        "projector_scale_factors": [1.0, 2.0],
        "c2f_num_blocks": 2,
        "d_model": 24,
        "decoder_ffn_dim": 48,
        "decoder_layers": 2,
        "decoder_n_points": 2,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 4,
        "num_queries": 10,
        "group_detr": 3,
    },
}

# Settings of a shrunk config, of sub-configs by a dotted name.
SETTINGS: dict[str, Inputs] = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},  # no attention otherwise
    "blip-2": _QUESTION,
    "blt": {
        "encoder_hash_byte_group_vocab": 501,
        "encoder_config.num_hidden_layers": 2,
        "encoder_config.hidden_size_global": 32,
        "decoder_config.hidden_size_global": 32,
        "use_cache": False,  # the cache asks for a number of layers
    },
    "clap": {"audio_config.patch_embeds_hidden_size": 16, "audio_config.hidden_size": 128},  # the last of four stages
    "codegen": {"rotary_dim": 4},  # half a head
    "csm": {"codec_config.upsample_groups": 32, "codec_config.num_filters": 4},  # one group for each of hidden_size
    "cvt": {
        "embed_dim": [16, 24, 32],
        "num_heads": [1, 2, 4],
        "depth": [2, 2, 3],  # the last stage takes a drop path rate by its own number
    },
    "deepseek_v2": {"num_experts_per_tok": 2},  # None by default
    "edgetam_video": {
        "image_size": 128,
        "vision_config.backbone_config.image_size": [128, 128],
        "vision_config.backbone_config.embed_dim_per_stage": [32, 48, 64, 80],
        "vision_config.backbone_channel_list": [80, 64, 48, 32],
        "vision_config.backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "prompt_encoder_config.image_size": 128,
        "prompt_encoder_config.patch_size": 16,
        "memory_attention_rope_feat_sizes": [8, 8],
        "memory_attention_rope_k_sizes": [4, 4],  # latents in a square
        "perceiver_resampler_num_latents": 16,
        "perceiver_resampler_num_latents_2d": 16,
        "perceiver_resampler_hidden_size": 64,  # the memory attention expects these 64, and a multiple of them for the rest
        "perceiver_resampler_attention_head_dim": 64,
        **dict.fromkeys(_EDGETAM_WIDTHS, 128),
    },
    "fun_asr_nano_encoder": {"num_mel_bins": 8, "num_hidden_layers": 4},  # two of them for timestamps
    "glm46v": {"text_config.rope_parameters": _MROPE},
    "glm4v": {"text_config.rope_parameters": _MROPE},
    "glm4v_moe": {
        "text_config.rope_parameters": _HALF_MROPE,
        "text_config.num_attention_heads": 2,
        "text_config.num_key_value_heads": 1,
    },
    "glm4v_moe_text": {"rope_parameters": _HALF_MROPE, "num_attention_heads": 2, "num_key_value_heads": 1},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm_image": {"text_config.rope_parameters": _MROPE},
    "glm_image_text": {"rope_parameters": _MROPE},
    "glmga": {"text_config.rope_parameters": _MROPE},
    "granitemoehybrid": {  # no attention otherwise
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "hrm_text": {"num_hidden_layers": 16},  # two layers, run by two cycles of three and one: a place in the cache for each
    "idefics": {"alpha_initializer": "ones"},  # the gates of the cross attention open: no gradient passes a shut one
    "inkling_mm_model": {
        "text_config.num_hidden_layers": 4,
        "text_config.layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "text_config.mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "vision_config.num_hidden_layers": 5,  # as many as there are scales: fewer are planned by scipy
        "audio_config.n_mel_bins": 8,
    },
    "instructblip": _QUESTION,
    "instructblipvideo": {**_QUESTION, "video_token_index": 90},
    # a quarter of the layers with attention, every second one with experts, and both without
    "jamba": {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2},
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},  # a square
    "kosmos-2": {"latent_query_num": 4},  # places in the text
    "lightglue": {"keypoint_detector_config.keypoint_decoder_dim": 65},  # 8 x 8 pixels, and none of them
    "mimi_decoder": {"upsample_groups": 32, "num_filters": 4},  # one group for each of hidden_size
    "minicpm_ocr_vision": {"num_hidden_layers": 4, "insert_layer_id": 1},  # layers before and after the merger
    "minicpmv4_7_vision": {"num_hidden_layers": 4, "insert_layer_id": 1},
}


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _bins(*shape: int) -> Tensor:
    return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(0))


def _text(model: nn.Module, length: int = TOKENS) -> Inputs:
    """Token ids, nothing masked."""
    vocab = setting(model.config, "vocab_size", 99)
    ids = torch.randint(5, vocab - 20, (BATCH, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones(BATCH, length, dtype=torch.long)}


def _text_about(model: nn.Module, token: int, count: int) -> Inputs:
    """Token ids that begin with the places for an image."""
    inputs = _text(model, count + TOKENS)
    inputs["input_ids"][:, :count] = token
    return inputs


def _frames(width: str, times: int = 1, mask: str | None = None) -> Callable[[nn.Module], Inputs]:
    """Audio features, one row for each of 64 frames, and a mask of those that count."""

    def inputs(model: nn.Module) -> Inputs:
        masks = {mask: torch.ones(BATCH, 64, dtype=torch.long)} if mask else {}
        return {"input_features": _floats(BATCH, 64, times * setting(model.config, width, 80)), **masks}

    return inputs


def _waveform(model: nn.Module) -> Inputs:
    """Raw audio, a quarter of a second, and the first words of the decoder."""
    return {"input_values": _floats(BATCH, 4000), "decoder_input_ids": tensor_for(model, "decoder_input_ids")}


def _codes(more: int) -> Callable[[nn.Module], Inputs]:
    """A codebook's entry for each codebook and time, and as many more for text as given."""
    return lambda model: {"input_ids": _bins(BATCH, TOKENS, model.config.num_codebooks + more)}


def _image(size: int) -> Callable[[nn.Module], Inputs]:
    """Images of a size that no config says."""
    return lambda _: {"pixel_values": _floats(BATCH, 3, size, size)}


def _image_pair(size: int) -> Callable[[nn.Module], Inputs]:
    """Pairs of images, to match points between them."""
    return lambda _: {"pixel_values": _floats(BATCH, 2, 3, size, size).sigmoid()}


def _packed_row(model: nn.Module) -> Inputs:
    """Two images of 4 x 4 patches, all patches in one row of pixels."""
    side = model.config.patch_size
    return {"pixel_values": _floats(1, 3, side, 32 * side), "target_sizes": torch.tensor([[4, 4], [4, 4]])}


def _patch_images(model: nn.Module) -> Inputs:
    """Two images of 4 x 4 patches, each patch an image."""
    side = model.config.patch_size
    return {"pixel_values": _floats(32, 3, side, side), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def _token_images(model: nn.Module) -> Inputs:
    """Two images of 2 x 3 tokens, each an image of its merged patches, channels last."""
    side = model.config.patch_size * model.config.spatial_merge_size
    return {"pixel_values": _floats(12, side, side, 3), "image_grid_thw": torch.tensor([[1, 2, 3], [1, 2, 3]])}


def _positioned_patches(model: nn.Module) -> Inputs:
    """Flat patches of images of 6 x 6, and the place of each."""
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).reshape(1, 36, 2)
    return {
        "pixel_values": _floats(BATCH, 36, 3 * model.config.patch_size**2).sigmoid(),
        "pixel_position_ids": places.repeat(BATCH, 1, 1),
    }


def _question(model: nn.Module) -> Inputs:
    """Images, and text with a place for each of the query tokens that stand for one."""
    config = model.config
    return {
        "pixel_values": tensor_for(model, "pixel_values"),
        **_text_about(model, config.image_token_index, config.num_query_tokens),
    }


def _asked_question(model: nn.Module) -> Inputs:
    """The same, with the text for the Q-Former too."""
    return {**_question(model), "qformer_input_ids": tensor_for(model, "qformer_input_ids")}


def _video_question(model: nn.Module) -> Inputs:
    """Videos of two frames, and text with a place for each of their query tokens."""
    config = model.config
    return {
        "pixel_values": _floats(BATCH, 2, 3, config.vision_config.image_size, config.vision_config.image_size),
        "qformer_input_ids": tensor_for(model, "qformer_input_ids"),
        **_text_about(model, config.video_token_index, 2 * config.num_query_tokens),
    }


def _whisper_features(model: nn.Module) -> Inputs:
    """Mel features of full length, and their mask."""
    features = tensor_for(model, "input_features")
    return {"input_features": features, "input_features_mask": torch.ones(BATCH, features.shape[-1], dtype=torch.long)}


def _clap(model: nn.Module) -> Inputs:
    features = _floats(BATCH, 1, 64, model.config.audio_config.num_mel_bins)
    return {**_text(model), "input_features": features, "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)}


def _decision_transformer(model: nn.Module) -> Inputs:
    config = model.config
    return {
        "states": _floats(BATCH, TOKENS, config.state_dim),
        "actions": _floats(BATCH, TOKENS, config.act_dim),
        "rewards": _floats(BATCH, TOKENS, 1),
        "returns_to_go": _floats(BATCH, TOKENS, 1),
        "timesteps": torch.arange(TOKENS).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
    }


def _dots3_note(model: nn.Module) -> Inputs:
    """Text with four places for an image and four for a second of sound."""
    config = model.config
    inputs = _text_about(model, config.image_token_id, 4)
    inputs["input_ids"][:, 4:8] = config.audio_token_id
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -3:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    samples = 4 * config.audio_config.samples_per_token
    return {
        **inputs,
        "pixel_values": _floats(16 * BATCH, 3 * config.vision_config.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
        "input_features": _floats(BATCH, config.audio_config.feature_size, samples // config.audio_config.hop_length),
        "chunk_sample_lengths": torch.tensor([samples] * BATCH),
    }


def _edgetam_video(model: nn.Module) -> Inputs:
    """A video whose first frame, with a click on one object, is in memory; the second frame is to come."""
    from transformers import EdgeTamVideoInferenceSession

    size = model.config.image_size
    video = _floats(2, 3, size, size)
    session = EdgeTamVideoInferenceSession(video=video, video_height=size, video_width=size, dtype=torch.float32)
    session.obj_with_new_inputs = [1]
    click = {"point_coords": torch.tensor([[[[9.0, 9.0]]]]), "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
    session.add_point_inputs(session.obj_id_to_idx(1), 0, click)
    with torch.no_grad():
        model(inference_session=session, frame_idx=0)
    return {"inference_session": session, "frame_idx": 1}


def _gemma3n_audio(model: nn.Module) -> Inputs:
    """Mel features, and a mask of what is padding: nothing."""
    mels = _floats(BATCH, 64, model.config.input_feat_size)
    return {"audio_mel": mels, "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool)}


def _glm_visual(model: nn.Module) -> Inputs:
    """Text with four places for an image, and the image's patches."""
    config, vision = model.config, model.config.vision_config
    inputs = _text_about(model, config.image_token_id, 4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).long()
    return {
        **inputs,
        "pixel_values": _floats(16 * BATCH, 3 * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    }


def _idefics(model: nn.Module) -> Inputs:
    """Text, each with an image to look at."""
    image = tensor_for(model, "pixel_values")[:, None]
    return {**_text(model), "pixel_values": image, "image_attention_mask": torch.ones(BATCH, TOKENS, 1, dtype=torch.long)}


def _inkling(model: nn.Module) -> Inputs:
    """Text with places for two patches of an image and three frames of sound."""
    config, vision = model.config, model.config.vision_config
    inputs = _text_about(model, config.image_token_id, 5)
    inputs["input_ids"][:, 2:5] = config.audio_token_id
    patches = (2 * BATCH, vision.temporal_patch_size, vision.patch_size, vision.patch_size, 3)
    return {**inputs, "pixel_values": _floats(*patches), "audio_input_ids": _bins(BATCH, 3, config.audio_config.n_mel_bins)}


def _kosmos2(model: nn.Module) -> Inputs:
    """Text with places for an image's latent queries, after its first token."""
    places = torch.zeros(BATCH, 12, dtype=torch.long)
    places[:, 1 : 1 + model.config.latent_query_num] = 1
    image = tensor_for(model, "pixel_values")
    return {"pixel_values": image, **_text(model, 12), "image_embeds_position_mask": places}


def _lxmert(model: nn.Module) -> Inputs:
    """Text, and features of five regions of an image with their boxes."""
    boxes = _floats(BATCH, 5, model.config.visual_pos_dim).sigmoid()
    return {**_text(model), "visual_feats": _floats(BATCH, 5, model.config.visual_feat_dim), "visual_pos": boxes}


def _muse_glimmer_assistant(model: nn.Module) -> Inputs:
    """Places to fill, and hidden states of several layers of the model that is assisted."""
    config = model.config
    return {
        "noise_embeds": _floats(BATCH, config.block_size, config.hidden_size),
        "context_hidden_states": _floats(BATCH, TOKENS, len(config.target_layer_ids) * config.hidden_size),
        "attention_mask": torch.ones(BATCH, TOKENS + config.block_size, dtype=torch.long),
    }


# Keyword inputs for a built model.
INPUTS: dict[str, Callable[[nn.Module], Inputs]] = {
    "audio-spectrogram-transformer": lambda model: {
        "input_values": _floats(BATCH, model.config.max_length, model.config.num_mel_bins)
    },
    "audioflamingo3_encoder": _whisper_features,
    "blip-2": _question,
    "clap": _clap,
    "csm": _codes(0),
    "d_fine": _image(64),
    "decision_transformer": _decision_transformer,
    "deimv2": _image(64),
    "depth_pro": _image(128),
    "dots3_note": _dots3_note,
    "edgetam_video": _edgetam_video,
    "efficientloftr": _image_pair(64),
    "fun_asr_nano_encoder": _frames("input_size", mask="input_features_mask"),
    "gemma3n_audio": _gemma3n_audio,
    "gemma4_vision": _positioned_patches,
    "glm46v": _glm_visual,
    "glm4v": _glm_visual,
    "glm4v_moe": _glm_visual,
    "glmga": _glm_visual,
    "granite_speech5_ctc": _frames("num_mel_bins", 4),
    "granite_speech5_encoder": _frames("num_mel_bins", 4),
    "idefics": _idefics,
    "inkling2_vision": _token_images,
    "inkling_mm_model": _inkling,
    "instructblip": _asked_question,
    "instructblipvideo": _video_question,
    "kimi_k25_vision": _patch_images,
    "kosmos-2": _kosmos2,
    "kyutai_speech_to_text": _codes(1),
    "lightglue": _image_pair(64),
    "lxmert": _lxmert,
    "mimi_decoder": lambda model: {"latents": _floats(BATCH, model.config.hidden_size, TOKENS)},
    "minicpm_ocr_vision": _packed_row,
    "minicpmv4_7_vision": _packed_row,
    "moonshine": _waveform,
    "muse_glimmer_assistant": _muse_glimmer_assistant,
}

# Types that cannot run on this kind of machine, and why.
UNRUNNABLE: dict[str, str] = {
    "bark": "has no forward of its own: only generate(), which runs its three transformers in turn",
    "glm_image_vqmodel": "has no forward of its own: only encode(), which picks the nearest entries of a codebook",
}
