"""Where a peer is known to differ from the papers, or to refuse, and why; and what ours does not do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from . import theirs
from .case import Case, Key
from .hosts import Host

__all__ = ["Known", "known", "limit"]

Theirs = Callable[[Case, Host, Mapping[Key, Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Known:
    """A known difference.

    Attributes:
        reason: What differs and why, for the docs.
        applies: To which cases.
        aspects: In which aspects; "all" where the peer cannot run the adapted model at all.
        theirs: By aspect, what the peer computes instead, so that the reason can be proven.
    """

    reason: str
    applies: Callable[[Case], bool]
    aspects: tuple[str, ...]
    theirs: Mapping[str, Theirs] = field(default_factory=dict)


def known(case: Case, aspect: str) -> Known | None:
    """What is known of a case in an aspect."""
    return next((entry for entry in _KNOWN if aspect in entry.aspects and entry.applies(case)), None)


def limit(case: Case, aspect: str) -> Known | None:
    """What is known of a case that ours refuses in an aspect, or in "all"."""
    return next((entry for entry in _LIMITS if aspect in entry.aspects and entry.applies(case)), None)


def _of(peer: str, *methods: str, host: str = "", setting: str = "") -> Callable[[Case], bool]:
    """Cases of a peer with these methods, on this host, with a setting that begins like this."""

    def applies(case: Case) -> bool:
        is_there = host in ("", case.host) and case.setting.startswith(setting)
        return case.peer == peer and case.method in methods and is_there

    return applies


def _odd_convolution(case: Case) -> bool:
    odd = ("conv2d_same_dilation", "conv2d_circular", "conv2d_reflect", "conv2d_replicate")
    return case.peer == "peft" and case.method in ("lora", "dora") and case.host in odd


def _rs_combined(case: Case) -> bool:
    is_scaled_alone = _of("peft", "combine")(case) and (len(case.config["weights"]) == 1 or case.config["how"] != "linear")
    return is_scaled_alone and bool(case.config.get("use_rslora"))


def _summed_factors(case: Case) -> bool:
    return case.method == "combine" and case.config["how"] in ("linear", "negate_b") and len(case.config["weights"]) > 1


_WRONG = ("outputs", "gradients")
_KNOWN = (
    Known(
        "in DeBERTa (v1) queries, keys and values alternate head by head in `in_proj`; the adapter's parts are put on its "
        "three thirds of rows",
        _of("adapters", "lora", "ia3", host="deberta"),
        (*_WRONG, "merged"),
        {"outputs": theirs.thirds},
    ),
    Known(
        "a gated LoRA leaves out alpha / rank",
        _of("adapters", "lora", setting="gated"),
        _WRONG,
        {"outputs": theirs.no_scaling_if_gated},
    ),
    Known(
        "DoRA scales the bias with the weight, takes the norm of W + B A without alpha / rank, and lets the gradient run "
        "through the norm, which the paper holds constant",
        _of("adapters", "dora"),
        _WRONG,
        {"outputs": theirs.bias_is_scaled},
    ),
    Known(
        "DoRA merges as if alpha were the rank",
        _of("adapters", "dora", setting="rank 4, alpha 8"),
        ("merged",),
        {"merged": theirs.merged_without_alpha},
    ),
    Known("unmerging DoRA restores nothing", _of("adapters", "dora"), ("restored",), {}),
    Known(
        "IA3 merges into the weight alone, and leaves the bias unscaled",
        _of("adapters", "ia3"),
        ("merged",),
        {"merged": theirs.bias_is_unscaled},
    ),
    Known(
        "in the model classes of transformers the coupling's inverse never runs",
        lambda case: case.method == "invertible" and bool(case.config.get("plain")),
        _WRONG,
        {"outputs": theirs.no_inverse},
    ),
    Known(
        "LoRA and DoRA at a convolution drop its dilation and its padding mode (what they merge is right)",
        _odd_convolution,
        _WRONG,
        {"outputs": theirs.bare_convolution},
    ),
    Known(
        "DoRA at a convolution with groups takes the norm of a product of A and B across the groups",
        _of("peft", "dora", host="conv2d_groups"),
        _WRONG,
        {},
    ),
    Known(
        "at torch's attention the change of the output projection is added twice",
        _of("peft", "lora", host="attention", setting="torch"),
        (*_WRONG, "merged"),
        {"outputs": theirs.second_output_projection, "merged": theirs.second_output_projection},
    ),
    Known("unmerging IA3 divides by l + 1e-8", _of("peft", "ia3"), ("restored",), {}),
    Known(
        "the factors A and B are summed, each on its own: the product of sums is not the sum of products. (Ours does so "
        'where `how="linear"` asks for it; compared is its exact sum, `how="concatenate"`)',
        _summed_factors,
        ("outputs",),
        {},
    ),
    Known(
        "with rsLoRA a combination is scaled by the square root of its rank once too often, even that of one adapter with "
        "weight 1",
        _rs_combined,
        ("outputs",),
        {},
    ),
    Known(
        "the SVD of the sum has another rank but the old alpha, so that it is scaled anew",
        lambda case: _of("adapters", "combine")(case) and case.config["how"] == "svd",
        ("outputs",),
        {},
    ),
    Known(
        "LoRA and DoRA at a convolution drop its dilation, so that sizes no longer fit and the forward fails",
        _of("peft", "lora", "dora", host="conv2d_dilation"),
        ("all",),
    ),
    Known(
        "nothing is merged into a convolution with groups", _of("peft", "lora", "dora", host="conv2d_groups"), ("merged",)
    ),
    Known("there is no DoRA at torch's attention", _of("peft", "dora", host="attention"), ("all",)),
    Known("there is no IA3 at one-dimensional convolutions", _of("peft", "ia3", host="conv1d"), ("all",)),
    Known("there is no IA3 at embeddings", _of("peft", "ia3", host="embedding"), ("all",)),
    Known(
        "DoRA fails at GPT-2's fused projection of queries, keys and values",
        _of("adapters", "dora", host="gpt2"),
        ("all",),
    ),
    Known(
        "VeRA fails where the projections that it adapts have several widths, as with Llama's grouped queries",
        _of("adapters", "vera", host="llama"),
        ("all",),
    ),
    Known(
        "a GLOW coupling cuts tokens apart, not features, and fails",
        _of("adapters", "invertible", setting="GLOW"),
        ("all",),
    ),
)
# What ours refuses, by design.
_LIMITS = (
    Known(
        "DoRA and LoRA's trained bias are not to be had together",
        lambda case: case.method == "dora" and bool(case.config.get("bias")),
        ("all",),
    ),
    Known(
        "BitFit trains the biases that there are, and adds none to a layer without one",
        _of("peft", "bitfit", host="dense"),
        ("all",),
    ),
    Known("a gated LoRA depends on its input and cannot be merged", _of("adapters", "lora", setting="gated"), ("merged",)),
    Known(
        "a trained bias cannot be merged into a layer that has none",
        _of("peft", "lora", host="dense", setting="with a bias"),
        ("merged",),
    ),
)
