"""The grammar: what a model may be made of, which parts go together, and a line of text for each model.

    norm=post,attention=gqa,container=stages

names every part that is not the plain one (the first of its row in `PARTS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = ["PARTS", "Spec", "changed", "grown", "parse", "why_not"]

PARTS: dict[str, tuple[str, ...]] = {
    # Where a block normalises, how the norm is written, and which module holds it.
    "norm": ("pre", "post", "sandwich", "end", "none"),
    "norm_by": ("layer", "rms", "torch", "hand"),
    "norm_in": ("block", "part"),
    "attention": (
        "self",
        "gqa",
        "cross",
        "cross_one",  # one token to attend to
        "talking",  # scores are mixed over heads
        "linear",  # no softmax over scores: phi(q) (phi(k) v)
        "sparse",  # queries are ranked on a sample of the keys first
        "window",
        "gated_values",
        "gated_output",
        "value_residual",  # the first layer's values are added to each layer's
        "residual_scores",  # the scores of the layer before are added
        "torch",  # nn.MultiheadAttention
        "conv_mix",  # no attention: Conv1d over the tokens' axis
        "token_mlp",  # no attention: an MLP on the transposed tensor
    ),
    "core": ("sdpa", "hand", "einsum"),
    "qkv": ("separate", "fused", "kv"),
    "feedforward": ("mlp", "glu", "glu_fused", "conv", "moe"),
    "router": ("none", "top1", "topk", "sigmoid", "dense", "soft", "expert_choice", "hash"),
    "experts": ("modules", "tensor", "shared"),
    "stream": (
        "plain",
        "parallel",
        "scaled",  # sqrt(2) x + f(x); with post-norm: DeepNorm
        "half",  # x + 0.5 f(x), by a function
        "layerscale",  # by a module
        "sum_scaled",  # (x + f(x)) / sqrt(2)
        "macaron",  # half a feed-forward, attention, half a feed-forward
        "reversible",  # two streams in one tensor
        "two",  # two streams, each attends to the other
        "nested",  # blocks behind a projection, with a skip around them
        "long_add",  # a U-Net's skips, added
        "long_cat",  # or concatenated and projected
        "hyper",  # several streams, mixed by small matrices
        "trend",  # a moving average is taken off the stream
        "broadcast",  # the last attention computes one token, which is added to all
    ),
    # Which module returns the branch: the part, its last projection, none (it adds itself), the part in a tuple.
    "unit": ("part", "bare", "residual", "tuple"),
    "container": ("blocks", "sequential", "pairs", "dicts", "stages", "attributes", "columns", "tied", "flat"),
    "wrapper": ("none", "compile", "checkpoint"),
    # Which axis is the batch's; or whether features are on the second axis, and every projection a pointwise convolution.
    "layout": ("first", "second", "third", "channels"),
    # A low-rank branch beside each projection, projections by a custom operation, one dropout for all branches.
    "side": ("none", "lora", "quantised", "dropout"),
}


@dataclass(frozen=True)
class Spec:
    """One model: a choice of each part."""

    norm: str = "pre"
    norm_by: str = "layer"
    norm_in: str = "block"
    attention: str = "self"
    core: str = "sdpa"
    qkv: str = "separate"
    feedforward: str = "mlp"
    router: str = "none"
    experts: str = "modules"
    stream: str = "plain"
    unit: str = "part"
    container: str = "blocks"
    wrapper: str = "none"
    layout: str = "first"
    side: str = "none"

    def parts(self) -> Iterator[tuple[str, str]]:
        """Yield (row, part) for each part that is not the plain one."""
        chosen = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ((row, part) for row, part in chosen if part != PARTS[row][0])

    def __str__(self) -> str:
        return ",".join(f"{row}={part}" for row, part in self.parts()) or "plain"


def parse(text: str) -> Spec:
    """Read a spec from its line. Raises ValueError for a part that there is not, or parts that do not go together."""
    chosen = {} if text == "plain" else dict(pair.split("=") for pair in text.split(","))
    unknown = [f"{row}={part}" for row, part in chosen.items() if part not in PARTS.get(row, ())]
    if unknown:
        raise ValueError(f"there is no {unknown}; there are {PARTS}")
    spec = Spec(**chosen)
    reason = why_not(spec)
    if reason:
        raise ValueError(f"{spec}: {reason}")
    return spec


def changed(spec: Spec, row: str, part: str) -> Spec:
    """Return the spec with another part, and what that part cannot be without."""
    router = spec.router if spec.router != "none" else "topk"
    needs: dict[str, str] = {}
    if f"{row}={part}" == "stream=trend":
        needs = {"norm": "none"}
    elif part == "moe" or (row in ("router", "experts") and part not in ("none", "modules")):
        needs = {"feedforward": "moe", "router": router}
    elif row == "feedforward":
        needs = {"router": "none", "experts": "modules"}
    return replace(spec, **{**needs, row: part})


# What is chosen from: rows with many parts more often.
_ROWS = (*PARTS, *("attention", "stream", "container", "norm") * 2)


def grown(choose: Callable[[Sequence[Any]], Any]) -> Spec:
    """Grow a spec from the plain one, by a few changes that go together with those before.

    None is compiled, which takes a minute: that is left to the curated ones.

    Args:
        choose: Chooses one of several: at random, or as hypothesis likes.
    """
    spec = Spec()
    for _ in range(choose(range(1, 8))):
        row = choose(_ROWS)
        others = (changed(spec, row, part) for part in PARTS[row])
        spec = choose([other for other in others if why_not(other) is None and other.wrapper != "compile"])
    return spec


_WITHOUT_HEADS = ("conv_mix", "token_mlp")
_CROSS = ("cross", "cross_one")
_STATEFUL = ("value_residual", "residual_scores")
_OWN_CORE = ("talking", "linear", "sparse", "residual_scores", "torch", *_WITHOUT_HEADS)
_WITH_BLOCKS = ("blocks", "sequential", "attributes", "tied")
# Each law: the reason, and whether a spec breaks it.
_LAWS: Mapping[str, Callable[[Spec], bool]] = {
    "there is no norm to write": lambda s: s.norm == "none" and (s.norm_by != "layer" or s.norm_in != "block"),
    "the part holds the norm before it only": lambda s: s.norm_in == "part" and s.norm != "pre",
    "a function is no module that could be held": lambda s: s.norm_in == "part" and s.norm_by in ("torch", "hand"),
    "this attention has a core of its own": lambda s: s.core != "sdpa" and s.attention in _OWN_CORE,
    "these queries, keys and values are projected apart": lambda s: (
        s.qkv != "separate" and s.attention in ("torch", *_WITHOUT_HEADS)
    ),
    "queries come from elsewhere": lambda s: s.qkv == "fused" and (s.attention in _CROSS or s.stream == "broadcast"),
    "experts need a router, and a router experts": lambda s: (s.feedforward == "moe") != (s.router != "none"),
    "there are no experts": lambda s: s.feedforward != "moe" and s.experts != "modules",
    "parts with tensors of their own are modules": lambda s: (
        s.unit == "bare" and (s.feedforward == "moe" or s.attention in ("torch", "value_residual"))
    ),
    "a bare part lies in a block": lambda s: (
        s.unit == "bare" and (s.container not in _WITH_BLOCKS or s.norm_in == "part" or s.stream == "macaron")
    ),
    "one dropout for all lies in a block": lambda s: (
        s.side == "dropout" and (s.container not in _WITH_BLOCKS or s.unit == "residual")
    ),
    "a sub-layer that adds itself has one stream": lambda s: (
        s.unit == "residual" and s.stream in ("parallel", "reversible", "two", "hyper", "broadcast")
    ),
    "a sequence hands on one tensor": lambda s: (
        s.container == "sequential" and (s.attention in (*_CROSS, *_STATEFUL) or s.stream in ("two", "hyper", "trend"))
    ),
    "layers that hand something on are not tied": lambda s: s.container == "tied" and s.attention in _STATEFUL,
    "stages differ in width": lambda s: s.container == "stages" and s.attention in (*_CROSS, *_STATEFUL),
    "these streams are blocks' own": lambda s: s.container != "blocks" and s.stream in ("two", "hyper", "nested", "trend"),
    "a half of the stream enters": lambda s: (
        s.stream == "reversible" and (s.container not in ("blocks", "sequential", "attributes") or s.norm != "pre")
    ),
    "self-attention has two streams": lambda s: s.stream in ("reversible", "two") and s.attention in (*_CROSS, *_STATEFUL),
    "two streams attend to one another": lambda s: (
        s.stream == "two" and (s.attention != "self" or s.qkv == "fused" or s.layout == "third")
    ),
    "branches from one stream are normalised before": lambda s: (
        s.stream == "parallel" and (s.norm not in ("pre", "none") or s.container == "flat" or s.attention in _CROSS)
    ),
    "several streams lie on an axis of their own": lambda s: (
        s.stream == "hyper" and (s.layout != "first" or s.norm not in ("pre", "none") or s.side == "dropout")
    ),
    "a trend is taken off in the norm's place": lambda s: (
        s.stream == "trend" and (s.norm != "none" or s.layout != "first" or s.unit == "residual" or s.side == "dropout")
    ),
    "one token is computed from all": lambda s: (
        s.stream == "broadcast"
        and (
            s.attention not in ("self", "gqa", "gated_output")
            or s.layout != "first"
            or s.norm != "pre"
            or s.norm_in == "part"
            or s.container in ("sequential", "tied", "stages")
        )
    ),
    "a flat list does not tell whose the two feed-forwards are": lambda s: s.container == "flat" and s.stream == "macaron",
    "long skips go around whole blocks": lambda s: (
        s.stream in ("long_add", "long_cat") and s.container not in ("blocks", "pairs", "dicts", "attributes", "columns")
    ),
    "what wraps wraps blocks": lambda s: (
        s.wrapper != "none" and (s.container not in _WITH_BLOCKS or s.stream == "nested" or s.attention in _STATEFUL)
    ),
    "tokens are mixed on the second axis": lambda s: s.attention in _WITHOUT_HEADS and s.layout != "first",
    "torch's attention has features last": lambda s: (
        s.attention == "torch" and (s.layout in ("channels", "third") or s.side != "none")
    ),
    "this projection is a Linear": lambda s: s.layout == "channels" and s.side in ("lora", "quantised"),
}


def why_not(spec: Spec) -> str | None:
    """Return the reason why these parts do not go together; None if they do."""
    return next((reason for reason, is_broken in _LAWS.items() if is_broken(spec)), None)
