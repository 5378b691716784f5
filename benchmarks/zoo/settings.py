"""What the configs of single types need beyond the rules of `shrink.py`."""

from __future__ import annotations

from typing import Any

__all__ = ["CONFIGS", "EXPLAINED", "IRREGULAR", "SETTINGS", "UNRUNNABLE"]

Settings = dict[str, Any]

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

# A codec of VibeVoice that halves the audio in each of its six stages.
_VIBEVOICE_CODEC: Settings = {"num_filters": 4, "downsampling_ratios": (2,) * 6, "hidden_size": 24}

# Memories of objects are 64 wide, come what may, and object pointers a multiple of it.
_WIDE_TRACKER: Settings = dict.fromkeys(
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

_SAM = {
    "vision_config.image_size": 128,
    "vision_config.patch_size": 16,
    "vision_config.window_size": 3,
    "prompt_encoder_config.image_size": 128,
    "prompt_encoder_config.patch_size": 16,
    "prompt_encoder_config.image_embedding_size": 8,
}
_HIERA = {
    "image_size": [128, 128],
    "blocks_per_stage": [1, 2, 2, 2],
    "global_attention_blocks": [4],
    "embed_dim_per_stage": [32, 64, 96, 128],
    "num_attention_heads_per_stage": [1, 2, 2, 4],
}
_SAM2_VISION = {
    **{f"backbone_config.{name}": value for name, value in _HIERA.items()},
    "backbone_channel_list": [128, 96, 64, 32],
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
}

# Keyword arguments of a config's class, in place of shrinking: for sizes that it checks or that hang together.
CONFIGS: dict[str, Settings] = {
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
SETTINGS: dict[str, Settings] = {
    "align": {"vision_config.image_size": 64},
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
    "efficientnet": {"image_size": 64},
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
    "reformer": {"axial_pos_shape": (7, 1)},  # as many as there are tokens
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
    "sam": _SAM,
    "sam2": {
        **{f"vision_config.{name}": value for name, value in _SAM2_VISION.items()},
        "prompt_encoder_config.image_size": 128,
        "prompt_encoder_config.patch_size": 16,
    },
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": _SAM2_VISION,
    "sam_hq": _SAM,
    "sam2_video": {
        "image_size": 128,  # all that follows is in proportion
        **{f"vision_config.{name}": value for name, value in _SAM2_VISION.items()},
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

# Types that cannot run on this kind of machine, and why.
UNRUNNABLE: dict[str, str] = {
    "bark": "has no forward of its own: only generate(), which runs its three transformers in turn",
    "glm_image_vqmodel": "has no forward of its own: only encode(), which picks the nearest entries of a codebook",
}

# Types whose blocks of one build do not all have as many sub-layers, and why.
_TWO_WAY = "the first block's self-attention of the tokens replaces them, and is not added to them"
IRREGULAR: dict[str, str] = {
    **dict.fromkeys(("edgetam", "edgetam_video", "sam", "sam2", "sam2_video", "sam3_tracker"), _TWO_WAY),
    **dict.fromkeys(("sam3_tracker_video", "sam3_video", "sam_hq"), _TWO_WAY),
    "fun_asr_nano_encoder": "the first block changes the width, and its attention is not added to anything",
    "seggpt": "one block averages image and prompt, and adds the average",
}

# Why those fail that do.
EXPLAINED: dict[str, str] = {
    "clvp": "the conditioning encoder adds with the channels first what its attention returns with the tokens first",
    "fun_asr_nano_encoder": "the first block's attention is added to a convolution of its values, and to no stream",
    "gemma3n_text": "AltUp: four streams, which a learned mixture predicts and corrects",
    "higgs_audio_v2": "tokens of text and of sound take different feed-forwards, and are scattered back into the stream",
    "hy_v4": "hyper-connections: several streams, mixed by what is computed from them",
    "ibert": "its norms carry the scale of their quantisation, and cannot run again",
    "inkling2": "convolutions by functions inside its attention; attention over what earlier layers returned",
    "inkling2_text": "convolutions by functions inside its attention; attention over what earlier layers returned",
    "pegasus_x": "one feed-forward serves two streams, whose sums are two: houlsby fits, pfeiffer is refused",
    "pp_ocrv5_mobile_rec": "a CNN whose blocks add up convolutions side by side",
    "sam3_lite_text": "its token mixer adds what functions compute",
    "timesformer": "what its attention over space computes for the class token is averaged over frames before it is added",
    "vits": "blocks of normalising flows, which differ",
    "xlnet": "one dropout serves the attention's weights and its branch, so that no module yields the branch alone",
    "xmod": "one norm runs before the language adapter and after it: a hook there would change both",
}
