"""What single types need beyond the rules of `shrink.py` and `make_inputs.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.make_inputs import BATCH, TOKENS, setting, tensor_for
from benchmarks.zoo.shrink import IMAGE, PATCH

Inputs = dict[str, Any]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _named(model: nn.Module, *names: str) -> Inputs:
    """Inputs as the rules make them."""
    return {name: tensor_for(model, name) for name in names}


def _image(height: int, width: int) -> Callable[[nn.Module], Inputs]:
    """An image that is large enough for every halving, or as wide as a line of text."""
    return lambda _: {"pixel_values": _random(BATCH, 3, height, width)}


def _waveform(samples: int, *channels: int) -> Callable[[nn.Module], Inputs]:
    return lambda _: {"input_values": 0.1 * _random(BATCH, *channels, samples)}


def _waveform_and_features(samples: int, frames: int) -> Callable[[nn.Module], Inputs]:
    """Audio, and the features of the same for a model that understands speech."""
    return lambda model: {
        "input_values": 0.1 * _random(BATCH, 1, samples),
        "input_features": _random(BATCH, frames, setting(model.config, "feature_projection_input_dim", 160)),
    }


def _speech_and_text(model: nn.Module) -> Inputs:
    """Text with places for two tokens of audio, of 64 samples each."""
    text = tensor_for(model, "input_ids")
    text[:, 1:3] = model.config.audio_token_id
    return {
        "input_ids": text,
        "input_values": 0.1 * _random(BATCH, 1, 2 * 64),
        "padding_mask": torch.ones(BATCH, 2 * 64, dtype=torch.long),
        "sample": False,  # no noise on the latents
    }


def _series(model: nn.Module) -> Inputs:
    """A series of one time step after another, with its channels."""
    return {"past_values": _random(BATCH, model.config.context_length, model.config.num_input_channels).cumsum(1)}


def _univariate_series(model: nn.Module) -> Inputs:
    return {"past_values": _random(BATCH, 4 * model.config.patch_length).cumsum(1)}


def _robot(model: nn.Module) -> Inputs:
    """What two cameras see, an instruction, and the noise that becomes actions."""
    tokens = 2 * (IMAGE // PATCH) ** 2
    text = tensor_for(model, "input_ids")
    image = torch.full((BATCH, tokens), model.config.vlm_config.image_token_id)
    return {
        "action_embeds": _random(BATCH, 5, model.config.dit_config.hidden_size),
        "input_ids": torch.cat([image, text], 1),
        "pixel_values": _random(BATCH, 2, 3, IMAGE, IMAGE),
        "pixel_attention_mask": torch.ones(BATCH, 2, dtype=torch.bool),
        "attention_mask": torch.ones(BATCH, tokens + TOKENS, dtype=torch.long),
    }


def _session(model: nn.Module, size: int) -> Any:
    """What a tracker knows of a video of two frames."""
    module = sys.modules[type(model).__module__]
    session_type = getattr(module, type(model).__name__.removesuffix("Model") + "InferenceSession")
    return session_type(_random(2, 3, size, size), size, size, dtype=torch.float32)


def _detecting(model: nn.Module) -> Inputs:
    """The second frame of a video, in a session that found in the first one what a text names."""
    session = _session(model, model.config.tracker_config.prompt_encoder_config.image_size)
    prompt = session.add_prompt("cat")
    session.prompt_input_ids[prompt] = tensor_for(model, "input_ids")[:1]
    session.prompt_attention_masks[prompt] = torch.ones(1, TOKENS, dtype=torch.long)
    model(inference_session=session, frame_idx=0)
    return {"inference_session": session, "frame_idx": 1}


def _tracking(model: nn.Module) -> Inputs:
    """The second frame of a video, in a session that saw a point on an object in the first one."""
    size = model.config.prompt_encoder_config.image_size
    session = _session(model, size)
    point = {"point_coords": torch.full((1, 1, 1, 2), size / 2), "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
    session.add_point_inputs(session.obj_id_to_idx(1), 0, point)
    session.obj_with_new_inputs = [1]
    model(inference_session=session, frame_idx=0)
    return {"inference_session": session, "frame_idx": 1}


def _naflex(model: nn.Module) -> Inputs:
    """Images as patches of their pixels, one after another, and how many in each direction."""
    channels = setting(model.config, "num_channels", 3)
    return {
        "pixel_values": _random(BATCH, 16, channels * setting(model.config, "patch_size", 8) ** 2),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [2, 8]]),
    }


# A codec of VibeVoice that halves the audio in each of its six stages.
_VIBEVOICE_CODEC: dict[str, Any] = {"num_filters": 4, "downsampling_ratios": (2,) * 6, "hidden_size": 24}

# Memories of objects are 64 wide, come what may, and object pointers a multiple of it.
_WIDE_TRACKER: dict[str, Any] = dict.fromkeys(
    (
        "mask_decoder_config.hidden_size",
        "mask_downsampler_embed_dim",
        "memory_attention_hidden_size",
        "memory_encoder_hidden_size",
        "memory_fuser_embed_dim",
        "prompt_encoder_config.hidden_size",
        "vision_config.fpn_hidden_size",
    ),
    128,
)

_MAMBA_AND_HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]

# Settings of a config, of sub-configs by a dotted name.
SETTINGS: dict[str, dict[str, Any]] = {
    "muse_spark_audio": {
        "num_hidden_layers": 4,  # one for each of the sizes
        "patch_sizes": (4, 3, 2, 2),
        "hidden_sizes": (16, 24, 32, 40),
        "out_hidden_size": 48,
    },
    "nemo_speechlm": {"text_config.n_groups": 2, "word_timestamp_config.blank_token_id": 98},  # the last of 99
    "neucodec": {"quantization_dim": 64},  # what acoustic and semantic model yield, side by side
    "oneformer": {
        "backbone_config.num_heads": (2, 2, 4, 4),
        "backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "perceiver": {"d_latents": 48, "num_latents": 12, "num_self_attends_per_block": 2, "num_blocks": 2},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 32, "num_filters": 8},  # a group for each channel
    "pp_doclayout_v3": {"decoder_in_channels": (32, 32, 32), "num_queries": 10, "x4_feat_dim": 128},
    "pp_doclayout_v4": {"decoder_in_channels": (32, 32, 32), "num_queries": 10},
    "pp_ocrv6_small_det": {
        "backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4"],
        # Each stage halves its image: the default is for lines of text.
        "backbone_config.block_configs": [
            [[3, 24, 24, 1, True]],
            [[3, 24, 32, 2, False], [3, 32, 32, 1, False]],
            [[3, 32, 48, 2, False], [3, 48, 48, 1, True]],
            [[3, 48, 64, 2, False], [3, 64, 64, 1, True]],
        ],
        "backbone_config.stem_channels": (3, 16, 24),
        "backbone_config.stage_out_channels": [24, 32, 48, 64],
        "backbone_config.depths": [1, 2, 2, 2],
        "layer_list_out_channels": (24, 32, 48, 64),
    },
    "rf_detr": {
        "num_queries": 10,
        # Blocks on windows and blocks on the whole image, which go on to the decoder.
        "backbone_config.num_hidden_layers": 4,
        "backbone_config.stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
        "backbone_config.out_features": ["stage2", "stage4"],
        "backbone_config.window_block_indexes": [0, 2],
        "backbone_config.num_windows": 2,
    },
    "rt_detr": {"decoder_in_channels": (32, 32, 32), "num_queries": 10},
    "rt_detr_v2": {"decoder_in_channels": (32, 32, 32), "num_queries": 10},
    "sam2_video": {
        "image_size": 128,  # all that follows is in proportion
        "vision_config.backbone_config.image_size": [128, 128],
        "vision_config.backbone_config.blocks_per_stage": [1, 2, 2, 2],
        "vision_config.backbone_config.global_attention_blocks": [4],
        "vision_config.backbone_config.embed_dim_per_stage": [32, 64, 96, 128],
        "vision_config.backbone_config.num_attention_heads_per_stage": [1, 2, 2, 4],
        "vision_config.backbone_channel_list": [128, 96, 64, 32],
        "vision_config.backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "memory_attention_rope_feat_sizes": [8, 8],
        **_WIDE_TRACKER,
        "prompt_encoder_config.image_size": 128,
        "prompt_encoder_config.patch_size": 16,
    },
    "sam3_tracker_video": _WIDE_TRACKER,
    "sam3_video": {
        **{f"tracker_config.{name}": value for name, value in _WIDE_TRACKER.items()},
        **{
            f"detector_config.{part}_config.hidden_size": 128
            for part in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
        },
        "detector_config.vision_config.fpn_hidden_size": 128,
        "detector_config.detr_decoder_config.num_queries": 10,
        "low_res_mask_size": 16,
        "score_threshold_detection": 0.0,  # weights are random: what it finds is as good as anything
        "new_det_thresh": 0.0,
    },
    "seggpt": {
        "image_size": (64, 32),
        "num_hidden_layers": 4,  # some before image and prompt are merged, some after
        "merge_index": 1,
        "intermediate_hidden_state_indices": (2, 3),
    },
    "step3p7": {
        "text_config.sliding_window": 4,  # it has none by default, and fails without
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "tvp": {"max_img_size": 128, "visual_prompt_size": 8, "num_frames": 2},
    # The default takes one stage of the backbone, the head all six.
    "uvdoc": {"backbone_config.out_features": [f"stage{i}" for i in range(1, 7)]},
    "vibevoice": {
        f"{codec}.{name}": value
        for codec in ("audio_config", "semantic_model_config")
        for name, value in _VIBEVOICE_CODEC.items()
    }
    | {"diffusion_head_config.latent_size": 24},
    "vibevoice_acoustic_tokenizer": _VIBEVOICE_CODEC,
    "vibevoice_acoustic_tokenizer_decoder": _VIBEVOICE_CODEC,
    "vibevoice_acoustic_tokenizer_encoder": _VIBEVOICE_CODEC,
    "vibevoice_asr": {
        f"{codec}_tokenizer_encoder_config.{name}": value
        for codec in ("acoustic", "semantic")
        for name, value in _VIBEVOICE_CODEC.items()
    }
    | {"acoustic_tokenizer_chunk_size": 1024},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4},
    "xcodec": {
        "semantic_model_config.num_feat_extract_layers": 7,  # all of them: together they stride as the other encoder does
        "codebook_dim": 64,
    },
    "xcodec2": {"quantization_dim": 64},
    "xmod": {"default_language": "en_XX"},
    # Two hybrid layers, which share their transformer.
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": _MAMBA_AND_HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": _MAMBA_AND_HYBRID,
        "hybrid_layer_ids": [2, 4],
        "mamba_headdim": 16,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "num_query_groups": 4,
    },
}

# Keyword inputs for a built model.
INPUTS: dict[str, Callable[[nn.Module], Inputs]] = {
    "muse_spark_audio": _waveform(10 * 4 * 3 * 2 * 2),
    "neucodec": _waveform_and_features(1600, 5),
    "oneformer": lambda model: _image(64, 64)(model) | {"task_inputs": _random(BATCH, model.config.task_seq_len)},
    "patchtsmixer": _series,
    "patchtst": _series,
    "perceiver": lambda model: {"inputs": _random(BATCH, TOKENS, model.config.d_model)},
    "pi0": _robot,
    "pocket_tts_audio_tokenizer_decoder": lambda model: {"latents": _random(BATCH, model.config.hidden_size, 3)},
    "pp_doclayout_v3": _image(64, 64),
    "pp_doclayout_v4": _image(64, 64),
    "pp_ocrv5_mobile_rec": _image(96, 192),
    "pp_ocrv5_server_rec": _image(48, 96),
    "pp_ocrv6_small_rec": _image(48, 96),
    "pp_ocrv6_tiny_rec": _image(48, 96),
    "qwen3_asr_encoder": lambda model: {
        "input_features": _random(BATCH, model.config.num_mel_bins, 4 * model.config.n_window),
        "input_features_mask": torch.ones(BATCH, 4 * model.config.n_window, dtype=torch.long),
    },
    "rf_detr": _image(64, 64),
    "rt_detr": _image(64, 64),
    "rt_detr_v2": _image(64, 64),
    "sam2_video": _tracking,
    "sam3_tracker_video": _tracking,
    "sam3_video": _detecting,
    "seggpt": lambda _: {
        name: _random(BATCH, 3, 32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "siglip2": lambda model: _named(model, "input_ids") | _naflex(model),
    "siglip2_vision_model": _naflex,
    # This one takes what a prenet made of speech or text.
    "speecht5": lambda model: {
        "input_values": _random(BATCH, TOKENS, model.config.hidden_size),
        "decoder_input_values": _random(BATCH, TOKENS, model.config.hidden_size).flip(1),
    },
    "timesfm": lambda model: (
        _univariate_series(model)
        | {
            "past_values_padding": torch.zeros(BATCH, 4 * model.config.patch_length, dtype=torch.long),
            "freq": torch.zeros(BATCH, 1, dtype=torch.long),
        }
    ),
    "timesfm2_5": _univariate_series,
    "udop": lambda model: (
        _named(model, "input_ids", "decoder_input_ids", "pixel_values")
        | {"bbox": torch.tensor([0.1, 0.2, 0.4, 0.3]).expand(BATCH, TOKENS, 4).contiguous()}
    ),
    # It takes one sample at a time: the positions of columns are viewed as many as there are samples.
    "tvp": lambda model: {
        "input_ids": tensor_for(model, "input_ids")[:1],
        "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "pixel_values": _random(1, model.config.num_frames, 3, 128, 128),
    },
    "uvdoc": _image(64, 96),
    "vibevoice": _speech_and_text,
    "vibevoice_acoustic_tokenizer": lambda model: _waveform(256, 1)(model) | {"sample": False},
    "vibevoice_acoustic_tokenizer_decoder": lambda model: {"hidden_states": _random(BATCH, model.config.hidden_size, 4)},
    "vibevoice_acoustic_tokenizer_encoder": lambda _: {"hidden_states": 0.1 * _random(BATCH, 1, 256)},
    "vibevoice_asr": _speech_and_text,
    "video_llama_3_vision": lambda model: {
        "pixel_values": _random(16 + 8, 3 * model.config.patch_size**2),
        "grid_thw": torch.tensor([[1, 4, 4], [2, 2, 2]]),
        "merge_sizes": torch.tensor([1, 2]),
    },
    "vjepa2": lambda model: {
        "pixel_values_videos": _random(
            BATCH, model.config.frames_per_clip, 3, model.config.crop_size, model.config.crop_size
        )
    },
    "voxtral_realtime": lambda model: (
        _named(model, "input_ids")
        | {"input_features": _random(BATCH, setting(model.config, "num_mel_bins", 80), 8 * TOKENS)}
    ),
    "xcodec": _waveform(1600, 1),
    "xcodec2": _waveform_and_features(1600, 5),
}

# Types that cannot run on this kind of machine, and why.
UNRUNNABLE: dict[str, str] = {}
