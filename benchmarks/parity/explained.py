"""Where the `adapters` library differs for a known reason, and that reason put right, so that the rest can be compared.

A case counts as explained only if both libraries agree to rounding once the reason is put right: what is put right is then
all that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .peer import NAME, PRESETS, Peer

__all__ = ["Explanation", "explanation", "without_languages"]


@dataclass(frozen=True)
class Explanation:
    """A known difference.

    Attributes:
        reason: What differs and why, for the docs.
        correct: Makes the adapted copy of that library compute the formula.
        prepare: Changes the plain model first, for both.
        targets: Our targets by preset, where our own preset goes elsewhere.
        dtype: In which the rest is compared; float32 for a model that computes in it whatever its weights are.
    """

    reason: str
    correct: Callable[[Peer], None] | None = None
    prepare: Callable[[nn.Module], None] | None = None
    targets: Mapping[str, list[str]] | None = None
    dtype: torch.dtype = torch.float64


def explanation(family: str, preset: str) -> Explanation | None:
    """What is known of a family with a preset."""
    return _KNOWN.get((family, preset)) or _KNOWN.get((family, "*"))


def _attention_reads_its_branch(peer: Peer) -> None:
    """ALBERT: hand the attention's adapter the branch as x and the stream as r, not the other way round."""
    for _, block in peer.model.iter_layers():
        layer = block.attention.attention_adapters
        layer.forward = partial(_swapped, layer.forward)


def _swapped(forward: Callable[..., Tensor], x: Tensor, r: Tensor, norm: nn.Module) -> Tensor:
    return forward(r, x, norm)


def _no_bias(peer: Peer) -> None:
    """DeBERTa: take away the bias that its projections of queries, keys and values never had."""
    for name, parameter in peer.model.named_parameters():
        if name.endswith("in_proj.bias"):
            parameter.data.zero_()


def _no_cross_adapter(peer: Peer) -> None:
    """Encoder-decoder of BERT: no adapter after cross-attention, as `cross_adapter=False` says."""
    for _, block in peer.model.iter_layers():
        if hasattr(block, "crossattention"):
            block.crossattention.output.delete_adapter(NAME)


def _reads_the_stream(peer: Peer) -> None:
    """GPT-J: the parallel adapter reads the stream that enters the block, as the feed-forward beside it does."""
    for _, block in peer.model.iter_layers():
        entered: list[Tensor] = []
        block.ln_1.register_forward_pre_hook(partial(_keep, entered))
        block.output_adapters.forward = partial(_beside, block.output_adapters.forward, entered)


def _keep(entered: list[Tensor], _module: nn.Module, args: tuple[Any, ...]) -> None:
    entered[:] = [args[0]]


def _beside(forward: Callable[..., Tensor], entered: list[Tensor], x: Tensor, r: Tensor, norm: nn.Module | None) -> Tensor:
    """Return x + f(stream) + r, where `forward(x, stream)` is x + f(stream) + stream."""
    return forward(x, entered[0], norm) - entered[0] + r


def _before_layer_scale(peer: Peer) -> None:
    """BEiT: adapt the branch before its layer scale, λ (x + f) + r, not after it, λ x + f + r."""
    for _, block in peer.model.iter_layers():
        for adapter, scale in ((block.attention_adapters, block.lambda_1), (block.output_adapters, block.lambda_2)):
            adapter.bottleneck_layer_forward = partial(_scaled, adapter.bottleneck_layer_forward, scale)


def _scaled(forward: Callable[..., Tensor], scale: Tensor, x: Tensor, r: Tensor, norm: nn.Module | None) -> Tensor:
    """Return λ (x / λ + f) + r, where `forward(x, r)` is x + f + r."""
    return scale * (forward(x / scale, r, norm) - r) + r


def without_languages(model: nn.Module) -> None:
    """X-MOD: let its language adapters add nothing."""
    for name, parameter in model.named_parameters():
        if ".adapter_modules." in name:
            parameter.data.zero_()


_ALBERT = Explanation(
    "ALBERT's attention hands its adapter the stream and the branch in each other's place, so that it computes "
    "LN(r + f(r) + x) where Houlsby et al. have LN(x + f(x) + r); ours is the paper's",
    correct=_attention_reads_its_branch,
)
_DEBERTA = Explanation(
    "`adapters.init` gives DeBERTa's `in_proj`, which has no bias, a random one, so that the base model itself changes; "
    "ours leaves it",
    correct=_no_bias,
    dtype=torch.float32,  # its norms cast
)
_CROSS = Explanation(
    "BERT as a decoder gets adapters after cross-attention, too, although `cross_adapter=False` (T5, BART and Whisper "
    "get none); ours adapts it where `@crossattention.out` is asked for",
    correct=_no_cross_adapter,
)
_GPTJ = Explanation(
    "GPT-J's feed-forward stands beside its attention and reads the stream that enters the block; that library's parallel "
    "adapter reads the stream after attention. Ours reads what the feed-forward does (He et al.)",
    correct=_reads_the_stream,
)
_BEIT = Explanation(
    "BEiT multiplies a branch by a bare parameter λ, and no module returns the product, so that our hook adapts the branch "
    "before it, λ(x + f) + r, and that library, in its own copy of BEiT's code, after it, λx + f + r. No paper says which; "
    "scaled projections make the one the other",
    correct=_before_layer_scale,
)
_FEEDFORWARD = "layer.*.output.dense"
_XMOD = Explanation(
    "`adapters.init` deletes X-MOD's language adapters, so that the base model itself changes, and puts its adapter in "
    "their place; ours keeps them as sub-layers of the model: a sequential adapter goes after them, as in MAD-X, and a "
    "parallel one is refused. Compared at that library's place (`targets=` set), with language adapters that add nothing "
    "(and `adapter_layer_norm=True`: by default X-MOD runs one norm twice in each block, a place that ours refuses)",
    prepare=without_languages,
    targets={
        "double_seq_bn": ["attention.output.dense", _FEEDFORWARD],
        **{preset: [_FEEDFORWARD] for preset in PRESETS if preset != "double_seq_bn"},
    },
)
_KNOWN = {
    ("albert", "double_seq_bn"): _ALBERT,
    ("beit", "double_seq_bn"): _BEIT,
    ("beit", "par_bn"): _BEIT,
    ("beit", "scaled_par_bn"): _BEIT,
    ("deberta", "*"): _DEBERTA,
    ("encoder_decoder", "double_seq_bn"): _CROSS,
    ("gptj", "par_bn"): _GPTJ,
    ("gptj", "scaled_par_bn"): _GPTJ,
    ("xmod", "*"): _XMOD,
}
