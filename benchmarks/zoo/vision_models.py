"""One small model with random weights of every family in timm, and torchvision's transformers beside a few of its CNNs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from torchvision.models import get_model, maxvit, swin_transformer, vision_transformer
from torchvision.models.video import mvit
from torchvision.models.video import swin_transformer as video_swin
from torchvision.models.video.mvit import MSBlockConfig

from .weights import randomise

__all__ = ["EXPLAINED", "IRREGULAR", "LIBRARIES", "build", "check_builds", "names"]

LIBRARIES = ("timm", "torchvision")
BATCH, SIDE = 2, 64
Settings = dict[str, Any]

_PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
_STAGES = {"depths": (1, 2, 2, 1)}
_LAYERS = {"layers": (1, 2, 2, 1)}
_SIZED = {"img_size": SIDE}
_SIZED_STAGES = {**_SIZED, **_STAGES}
# By timm model: what makes it small. `img_size` is an argument of the model, `side` only the image's.
_TIMM: dict[str, Settings] = {
    "beit_base_patch16_224": _PLAIN,
    "eca_botnext26ts_256": _SIZED,
    "test_byobnet": {},
    "cait_xxs24_224": _PLAIN,
    "coat_tiny": _SIZED,
    "coat_lite_tiny": _SIZED,
    "convit_tiny": _PLAIN,
    "convmixer_768_32": {},
    "test_convnext": _STAGES,
    "cpubone_nano": {},
    "crossvit_tiny_240": {"side": 240},
    "csatv2": {},
    "cs3darknet_focus_s": {},
    "cspnext_tiny": _STAGES,
    "davit_tiny": {**_STAGES, "embed_dims": (32, 48, 64, 96), "num_heads": (2, 3, 4, 6)},
    "deepseek_vit_412m": _PLAIN,
    "deit_tiny_patch16_224": _PLAIN,
    "deit_tiny_distilled_patch16_224": _PLAIN,
    "densenet121": {},
    "dla46x_c": {},
    "dpn48b": {},
    "edgenext_xx_small": _STAGES,
    "efficientformer_l1": {"img_size": 224, **_STAGES},
    "efficientformerv2_s0": _SIZED_STAGES,
    "mnasnet_small": {},
    "efficientvim_m1": {},
    "efficientvit_b0": _STAGES,
    "efficientvit_m0": _SIZED,
    "vit_tiny_patch16_dinov3_qkvb": _PLAIN,
    "eva02_tiny_patch14_224": _PLAIN,
    "fasternet_t0": _STAGES,
    "fastvit_t8": _LAYERS,
    "fastvit_sa12": _LAYERS,
    "focalnet_tiny_srf": {},
    "gcvit_xxtiny": _SIZED,
    "gemma4_vit_167m": _PLAIN,
    "ghostnet_050": {},
    "hardcorenas_b": {},
    "hgnetv2_b0": {},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 32, "stages": (1, 2, 2, 1)},
    "sam2_hiera_tiny": {"side": 128, "stages": (1, 2, 2, 1), "global_att_blocks": (4,)},
    "hrnet_w18_small": {},
    "iformer_t": {},
    "inception_next_atto": _STAGES,
    "inception_resnet_v2": {"side": 96},
    "inception_v3": {"side": 96},
    "inception_v4": {"side": 96},
    "lcnetv2_small": _STAGES,
    "levit_128s": _SIZED,
    "lowformer_b0": {},
    "test_mambaout": _STAGES,
    "test_coatnet": _SIZED_STAGES,
    "test_maxvit": {"img_size": 64},
    "poolformerv2_s12": {},
    "caformer_s18": {},
    "gmlp_ti16_224": _SIZED,
    "mixer_s16_224": _SIZED,
    "resmlp_12_224": _SIZED,
    "mobilenetv3_small_050": {},
    "mobilenetv5_base": {},
    "mobilevit_xxs": _SIZED,
    "mobilevitv2_050": {},
    "mvitv2_tiny": _SIZED,
    "naflexvit_base_patch16_parfac_gap": _PLAIN,
    "nasnetalarge": {"side": 96},
    "nest_tiny": _SIZED,
    "nextvit_small": {},
    "test_nfnet": _STAGES,
    "pit_ti_224": _SIZED,
    "pnasnet5large": {"side": 96},
    "pvt_v2_b0": _STAGES,
    "qwen3_vit_88m": _PLAIN,
    "rdnet_tiny": {},
    "regnetx_002": {},
    "repghostnet_050": {},
    "repvit_m1": {},
    "res2next50": _LAYERS,
    "resnest14d": {},
    "resnet10t": _LAYERS,
    "resnetv2_18": _LAYERS,
    "rexnet_100": {},
    "selecsls42": {},
    "legacy_seresnet18": _LAYERS,
    "sequencer2d_s": _LAYERS,
    "shvit_s1": {},
    "skresnet18": _LAYERS,
    "starnet_s050": _STAGES,
    "swiftformer_xs": _LAYERS,
    "swin_tiny_patch4_window7_224": {**_SIZED_STAGES, "embed_dim": 24},
    "swinv2_tiny_window8_256": {**_SIZED_STAGES, "embed_dim": 24},
    "swinv2_cr_tiny_224": {**_SIZED_STAGES, "embed_dim": 24},
    "tiny_vit_5m_224": _STAGES,
    "tnt_s_legacy_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48},
    "tresnet_m": _LAYERS,
    "twins_svt_small": {**_SIZED_STAGES, "embed_dims": (24, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    "twins_pcpvt_small": {**_SIZED_STAGES, "embed_dims": (24, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    "vgg11": {},
    "visformer_tiny": _PLAIN,
    "test_vit": _PLAIN,
    "vit_tiny_patch16_224": _PLAIN,
    "vit_tiny_r_s16_p8_224": _PLAIN,
    "test_vit_relpos": _PLAIN,
    "samvit_base_patch16_224": _PLAIN,
    "vitamin_small_224": {"img_size": 32, "depth": 2},
    "volo_d1_224": _SIZED,
    "ese_vovnet19b_slim_dw": {},
    "legacy_xception": {},
    "xception41p": {},
    "xcit_nano_12_p8_224": _PLAIN,
    # Other builds within a family: parallel branches, norms elsewhere, gates, other positions, other mixers.
    "vit_small_patch16_18x2_224": _PLAIN,
    "vit_base_patch16_xp_224": _PLAIN,
    "vit_base_patch16_rpn_224": _PLAIN,
    "vit_dwee_patch16_reg1_gap_256": _PLAIN,
    "vit_base_patch14_dinov2": _PLAIN,
    "vit_base_patch16_siglip_224": _PLAIN,
    "aimv2_large_patch14_224": _PLAIN,
    "vit_small_patch16_rope_mixed_224": _PLAIN,
    "vit_pe_core_tiny_patch16_384": _PLAIN,
    "naflexvit_base_patch16_gap": _PLAIN,
    "gmixer_12_224": _SIZED,
    "convformer_s18": {},
    "maxxvit_rmlp_nano_rw_256": _SIZED_STAGES,
    "coatnext_nano_rw_224": _SIZED_STAGES,
    "efficientvit_l1": {},
    "convnextv2_atto": _STAGES,
    "deit3_small_patch16_224": _PLAIN,
    "vit_pwee_patch16_reg1_gap_256": _PLAIN,
    "vit_mediumd_patch16_reg4_gap_256": _PLAIN,
    "flexivit_small": _PLAIN,
    "vit_relpos_small_patch16_rpn_224": _PLAIN,
    "eva02_base_patch16_clip_224": _PLAIN,
    "vit_base_patch16_lingbot": _PLAIN,
    "qwen3_vit_88m_merge": _PLAIN,
    "naflexvit_base_patch16_par_gap": _PLAIN,
    "swinv2_cr_tiny_ns_224": {**_SIZED_STAGES, "embed_dim": 24},
    "coatnet_rmlp_nano_rw_224": _SIZED_STAGES,
    "mobilenetv4_hybrid_medium": {},
    "fastvit_mci0": {},
    "levit_conv_128s": _SIZED,
    "resnet50_clip": {"img_size": 64},
}
_SWIN: Settings = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}


def _mvit() -> nn.Module:
    def block(width: int, out: int, stride: int) -> MSBlockConfig:
        return MSBlockConfig(2, width, out, [3, 3, 3], [3, 3, 3], [1, stride, stride], [1, 2, 2])

    settings = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    blocks = [block(16, 16, 1), block(16, 32, 2), block(32, 32, 1)]
    return mvit.MViT((32, 32), 4, blocks, num_classes=10, **settings)


def _maxvit() -> nn.Module:
    settings = {"block_channels": [16, 32], "block_layers": [1, 2], "head_dim": 8, "stochastic_depth_prob": 0.1}
    return maxvit.MaxVit((64, 64), 16, 2, **settings)


# By torchvision's name: how to make it small, and the shape of what it takes.
_IMAGE, _VIDEO = (BATCH, 3, SIDE, SIDE), (BATCH, 3, 4, 32, 32)
_TORCHVISION: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit_b_16": (lambda: vision_transformer.VisionTransformer(SIDE, 16, 2, 4, 48, 96), _IMAGE),
    "swin_t": (lambda: swin_transformer.SwinTransformer([4, 4], window_size=[4, 4], **_SWIN), _IMAGE),
    "swin_v2_t": (
        lambda: swin_transformer.SwinTransformer(
            [4, 4],
            window_size=[4, 4],
            block=swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
            **_SWIN,
        ),
        _IMAGE,
    ),
    "maxvit_t": (_maxvit, _IMAGE),
    "mvit_v2_s": (_mvit, _VIDEO),
    "swin3d_t": (lambda: video_swin.SwinTransformer3d([2, 4, 4], window_size=[2, 4, 4], **_SWIN), _VIDEO),
    **{name: (partial(get_model, name), _IMAGE) for name in ("resnet18", "mobilenet_v3_small", "efficientnet_b0")},
    **{name: (partial(get_model, name), _IMAGE) for name in ("convnext_tiny", "squeezenet1_1", "shufflenet_v2_x0_5")},
}
# Models whose blocks of one build have different numbers of sub-layers, with the reason: none.
IRREGULAR: dict[str, str] = {}
# Why those fail that do.
EXPLAINED = {
    "timm:eca_botnext26ts_256": "a ResNet with attention: no module returns the sum, only what an activation makes of it",
    "timm:coat_tiny": "its parallel blocks add each branch to three streams, one for each scale",
    "timm:efficientvim_m1": "adds a weight times what a branch returns less the stream: x + w (f(x) - x)",
}


def names() -> list[str]:
    """Every timm family's, those that no settings are known for under the name of their first model; then torchvision's."""
    others = []
    for module in timm.list_modules():
        models = timm.list_models(module=module)
        if not any(name in _TIMM for name in models):
            others.append(models[0])
    return [f"timm:{name}" for name in (*_TIMM, *others)] + [f"torchvision:{name}" for name in _TORCHVISION]


def check_builds(name: str) -> None:
    """Build it as its library has it, without memory for weights; raises whatever that raises."""
    library, _, short = name.partition(":")
    with torch.device("meta"):
        timm.create_model(short) if library == "timm" else get_model(short)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model in eval mode, and an image or a video that it runs on."""
    torch.manual_seed(0)
    library, _, short = name.partition(":")
    if library == "timm":
        settings = dict(_TIMM.get(short, {}))
        side = settings.pop("side", settings.get("img_size", SIDE))
        model, shape = timm.create_model(short, **settings), (BATCH, 3, side, side)
    else:
        make, shape = _TORCHVISION[short]
        model = make()
    argument = next(iter(inspect.signature(model.forward).parameters))
    return randomise(model.eval()), {argument: torch.randn(shape, generator=torch.Generator().manual_seed(0))}
