"""Transformers as people write them by hand, and what each of their blocks holds, known because it was written here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .handwritten import language, libraries, mixers, vision
from .handwritten.parts import BATCH, DEPTH, HEADS, TOKENS, WIDTH, Tokens, features, image, tokens
from .weights import randomise

__all__ = ["IRREGULAR", "KINDS", "LIBRARIES", "build", "check_builds", "names"]


class _Model(NamedTuple):
    """How a model is made, what it is called with, and the sub-layers of all its blocks, as letters of `_KINDS`."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    kinds: str


LIBRARIES: tuple[str, ...] = ()


def _ids() -> dict[str, Any]:
    return {"input_ids": tokens()}


def _blocks(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Tokens([make() for _ in range(DEPTH)])


def _encoder(*, norm_first: bool, batch_first: bool) -> _Model:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, norm_first=norm_first, batch_first=batch_first)
        return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    return _Model(make, lambda: {"src": features(batch_first=batch_first)}, "af" * DEPTH)


def _decoder(*, norm_first: bool) -> _Model:
    def make() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 64, norm_first=norm_first), DEPTH)

    def inputs() -> dict[str, Tensor]:
        return {"tgt": features(batch_first=False), "memory": features(5, batch_first=False)}

    return _Model(make, inputs, "acf" * DEPTH)


def _pair() -> dict[str, Any]:
    return {"src": features(5), "tgt": features()}


def _x(kinds: str = "af", **settings: Any) -> _Model:
    def inputs() -> dict[str, Any]:
        return {"x": tokens(), **({"context": features(5)} if "c" in kinds else {})}

    return _Model(lambda: libraries.XTransformer(kinds, **settings), inputs, kinds * DEPTH)


_KINDS = {"a": "attention", "c": "crossattention", "f": "feedforward", "m": "mixer", "v": "convolution"}
_MODELS = {
    "torch-encoder-post": _encoder(norm_first=False, batch_first=True),
    "torch-encoder-pre": _encoder(norm_first=True, batch_first=True),
    "torch-encoder-post-seq-first": _encoder(norm_first=False, batch_first=False),
    "torch-encoder-pre-seq-first": _encoder(norm_first=True, batch_first=False),
    "torch-decoder-post": _decoder(norm_first=False),
    "torch-decoder-pre": _decoder(norm_first=True),
    "torch-transformer": _Model(
        lambda: nn.Transformer(WIDTH, HEADS, DEPTH, DEPTH, 64, batch_first=True), _pair, "afacf" * DEPTH
    ),
    "nanogpt": _Model(libraries.NanoGPT, lambda: {"idx": tokens()}, "af" * DEPTH),
    "x-rotary-glu": _x(),
    "x-post-norm": _x(pre_norm=False),
    "x-alibi": _x(alibi=True),
    "x-cross-attention": _x("acf"),
    "x-macaron": _x("faf"),
    "x-scale-residual": _x(scale_residual=True),
    "x-sigmoid-gate": _x(gate="sigmoid"),
    "x-gru-gate": _x(gate="gru")._replace(kinds=""),  # no addition
    "open-clip": _Model(libraries.OpenCLIP, lambda: {"image": image(), "text": tokens()}, "af" * 2 * DEPTH),
    "llama": _Model(_blocks(language.llama), _ids, "af" * DEPTH),
    "mixture-of-experts": _Model(_blocks(language.mixtral), _ids, "af" * DEPTH),
    "parallel-branches": _Model(_blocks(language.GPTJ), _ids, "af" * DEPTH),
    "sandwich-norm": _Model(_blocks(language.gemma), _ids, "af" * DEPTH),
    "deepnorm": _Model(_blocks(language.DeepNorm), _ids, "af" * DEPTH),
    "rezero": _Model(_blocks(language.ReZero), _ids, "af" * DEPTH),
    "conformer": _Model(_blocks(language.Conformer), _ids, "favf" * DEPTH),
    "shared-layers": _Model(language.AlbertGroup, _ids, "af"),
    "relative-bias": _Model(language.T5, lambda: {"input_ids": tokens(5), "decoder_input_ids": tokens()}, "afacf" * DEPTH),
    "reversible": _Model(language.Reversible, _ids, "af" * DEPTH),
    "stochastic-depth": _Model(language.Sequential, _ids, "af" * DEPTH),
    "by-keyword": _Model(
        language.ByKeyword,
        lambda: {"words": tokens(), "keep": torch.ones(BATCH, TOKENS, dtype=torch.long), "with_all": True},
        "af" * DEPTH,
    ),
    "state-space": _Model(_blocks(mixers.Mamba), _ids, "m" * DEPTH),
    "retention": _Model(_blocks(mixers.retnet), _ids, "mf" * DEPTH),
    "time-mix": _Model(_blocks(mixers.RWKV), _ids, "mf" * DEPTH),
    "linear-attention": _Model(_blocks(mixers.LinearAttention), _ids, "mf" * DEPTH),
    "mlp-mixer": _Model(_blocks(lambda: mixers.mlp_mixer(TOKENS)), _ids, "mf" * DEPTH),
    "gmlp": _Model(_blocks(lambda: mixers.GMLP(TOKENS)), _ids, "m" * DEPTH),
    "fourier": _Model(_blocks(mixers.FNet), _ids, "mf" * DEPTH),
    "dit": _Model(
        vision.DiT, lambda: {"x": image(), "t": torch.tensor([0.1, 0.7]), "y": torch.tensor([1, 3])}, "af" * DEPTH
    ),
    "long-skips": _Model(vision.UViT, lambda: {"image": image()}, "af" * (2 * DEPTH + 1)),
    "convnext": _Model(vision.ConvNeXt, lambda: {"image": image()}, "v" * 4),
    "windows": _Model(vision.Windows, lambda: {"image": image()}, "af" * 4),
    "latents": _Model(vision.Perceiver, lambda: {"x": features(30, 12)}, "cfaf" * DEPTH),
    "gated-cross-attention": _Model(
        vision.Flamingo, lambda: {"text": features(width=8), "media": features(5, 12)}, "cfaf" * DEPTH
    ),
}
# Models whose blocks of one build differ, with the reason: none.
IRREGULAR: dict[str, str] = {}
# How many sub-layers of each kind the blocks of a model hold.
KINDS = {
    name: {kind: model.kinds.count(letter) for letter, kind in _KINDS.items() if letter in model.kinds}
    for name, model in _MODELS.items()
}


def names() -> list[str]:
    """All of them."""
    return list(_MODELS)


def check_builds(name: str) -> None:
    """Raises what the model's own constructor raises."""
    _MODELS[name].make()


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model in eval mode with random weights, and keyword inputs that it runs on."""
    torch.manual_seed(0)
    return randomise(_MODELS[name].make().eval()), _MODELS[name].inputs()
