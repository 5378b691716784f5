"""Keyword inputs for single types, where the rules of `make_inputs.py` make none that run or that mean something."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .make_inputs import BATCH, TOKENS, setting, tensor_for
from .shrink import IMAGE, PATCH

__all__ = ["INPUTS"]

Inputs = dict[str, Any]


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


def _named(model: nn.Module, *names: str) -> Inputs:
    """Inputs as the rules make them."""
    return {name: tensor_for(model, name) for name in names}


def _image(height: int, width: int) -> Callable[[nn.Module], Inputs]:
    """An image that is large enough for every halving, or as wide as a line of text."""
    return lambda _: {"pixel_values": _floats(BATCH, 3, height, width)}


def _audio(samples: int, *channels: int) -> Callable[[nn.Module], Inputs]:
    return lambda _: {"input_values": 0.1 * _floats(BATCH, *channels, samples)}


def _audio_and_features(samples: int, frames: int) -> Callable[[nn.Module], Inputs]:
    """Audio, and the features of the same for a model that understands speech."""
    return lambda model: {
        "input_values": 0.1 * _floats(BATCH, 1, samples),
        "input_features": _floats(BATCH, frames, setting(model.config, "feature_projection_input_dim", 160)),
    }


def _speech_and_text(model: nn.Module) -> Inputs:
    """Text with places for two tokens of audio, of 64 samples each."""
    text = tensor_for(model, "input_ids")
    text[:, 1:3] = model.config.audio_token_id
    return {
        "input_ids": text,
        "input_values": 0.1 * _floats(BATCH, 1, 2 * 64),
        "padding_mask": torch.ones(BATCH, 2 * 64, dtype=torch.long),
        "sample": False,  # no noise on the latents
    }


def _series(model: nn.Module) -> Inputs:
    """A series of one time step after another, with its channels."""
    return {"past_values": _floats(BATCH, model.config.context_length, model.config.num_input_channels).cumsum(1)}


def _univariate_series(model: nn.Module) -> Inputs:
    return {"past_values": _floats(BATCH, 4 * model.config.patch_length).cumsum(1)}


def _robot(model: nn.Module) -> Inputs:
    """What two cameras see, an instruction, and the noise that becomes actions."""
    tokens = 2 * (IMAGE // PATCH) ** 2
    text = tensor_for(model, "input_ids")
    image = torch.full((BATCH, tokens), model.config.vlm_config.image_token_id)
    return {
        "action_embeds": _floats(BATCH, 5, model.config.dit_config.hidden_size),
        "input_ids": torch.cat([image, text], 1),
        "pixel_values": _floats(BATCH, 2, 3, IMAGE, IMAGE),
        "pixel_attention_mask": torch.ones(BATCH, 2, dtype=torch.bool),
        "attention_mask": torch.ones(BATCH, tokens + TOKENS, dtype=torch.long),
    }


def _session(model: nn.Module, size: int) -> Any:
    """What a tracker knows of a video of two frames."""
    module = sys.modules[type(model).__module__]
    session_type = getattr(module, type(model).__name__.removesuffix("Model") + "InferenceSession")
    return session_type(_floats(2, 3, size, size), size, size, dtype=torch.float32)


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
        "pixel_values": _floats(BATCH, 16, channels * setting(model.config, "patch_size", 8) ** 2),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [2, 8]]),
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
    "d_fine": _image(64, 64),
    "decision_transformer": _decision_transformer,
    "deimv2": _image(64, 64),
    "depth_pro": _image(128, 128),
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
    "muse_spark_audio": _audio(10 * 4 * 3 * 2 * 2),
    "neucodec": _audio_and_features(1600, 5),
    "oneformer": lambda model: _image(64, 64)(model) | {"task_inputs": _floats(BATCH, model.config.task_seq_len)},
    "patchtsmixer": _series,
    "patchtst": _series,
    "perceiver": lambda model: {"inputs": _floats(BATCH, TOKENS, model.config.d_model)},
    "pi0": _robot,
    "pocket_tts_audio_tokenizer_decoder": lambda model: {"latents": _floats(BATCH, model.config.hidden_size, 3)},
    "poolformer": _image(96, 96),
    "pp_doclayout_v3": _image(64, 64),
    "pp_doclayout_v4": _image(64, 64),
    "pp_ocrv5_mobile_rec": _image(96, 192),
    "pp_ocrv5_server_rec": _image(48, 96),
    "pp_ocrv6_small_rec": _image(48, 96),
    "pp_ocrv6_tiny_rec": _image(48, 96),
    "qwen3_asr_encoder": lambda model: {
        "input_features": _floats(BATCH, model.config.num_mel_bins, 4 * model.config.n_window),
        "input_features_mask": torch.ones(BATCH, 4 * model.config.n_window, dtype=torch.long),
    },
    "rf_detr": _image(64, 64),
    "rt_detr": _image(64, 64),
    "rt_detr_v2": _image(64, 64),
    "sam2_video": _tracking,
    "sam3_tracker_video": _tracking,
    "sam3_video": _detecting,
    "seggpt": lambda _: {
        name: _floats(BATCH, 3, 32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "siglip2": lambda model: _named(model, "input_ids") | _naflex(model),
    "siglip2_vision_model": _naflex,
    # This one takes what a prenet made of speech or text.
    "speecht5": lambda model: {
        "input_values": _floats(BATCH, TOKENS, model.config.hidden_size),
        "decoder_input_values": _floats(BATCH, TOKENS, model.config.hidden_size).flip(1),
    },
    "swiftformer": _image(96, 96),
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
        "pixel_values": _floats(1, model.config.num_frames, 3, 128, 128),
    },
    "uvdoc": _image(64, 96),
    "vibevoice": _speech_and_text,
    "vibevoice_acoustic_tokenizer": lambda model: _audio(256, 1)(model) | {"sample": False},
    "vibevoice_acoustic_tokenizer_decoder": lambda model: {"hidden_states": _floats(BATCH, model.config.hidden_size, 4)},
    "vibevoice_acoustic_tokenizer_encoder": lambda _: {"hidden_states": 0.1 * _floats(BATCH, 1, 256)},
    "vibevoice_asr": _speech_and_text,
    "video_llama_3_vision": lambda model: {
        "pixel_values": _floats(16 + 8, 3 * model.config.patch_size**2),
        "grid_thw": torch.tensor([[1, 4, 4], [2, 2, 2]]),
        "merge_sizes": torch.tensor([1, 2]),
    },
    "vjepa2": lambda model: {
        "pixel_values_videos": _floats(
            BATCH, model.config.frames_per_clip, 3, model.config.crop_size, model.config.crop_size
        )
    },
    "voxtral_realtime": lambda model: (
        _named(model, "input_ids")
        | {"input_features": _floats(BATCH, setting(model.config, "num_mel_bins", 80), 8 * TOKENS)}
    ),
    "xcodec": _audio(1600, 1),
    "xcodec2": _audio_and_features(1600, 5),
}
