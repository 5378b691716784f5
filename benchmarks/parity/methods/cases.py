"""All cases: for each method, what a setting or a geometry could get wrong, with each peer that has the method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..families import families
from .case import Case

__all__ = ["QUICK", "cases"]

# What `--quick` leaves of the families.
QUICK = ("bert", "deberta", "gpt2", "llama", "t5")
_QV = {"target_modules": ["query", "value"]}
_CONVS = (
    "conv1d",
    "conv2d",
    "conv2d_1x1",
    "conv2d_same",
    "conv2d_bare",
    "conv2d_dilation",
    "conv2d_same_dilation",
    "conv2d_circular",
    "conv2d_reflect",
    "conv2d_replicate",
    "conv2d_groups",
    "conv3d",
)


def cases(chosen: list[str]) -> list[Case]:
    """Every case, of the model families only these."""
    found = [*_lora(), *_dora(), *_vera(), *_ia3(), *_biases(), *_bottlenecks(), *_combining()]
    return [case for case in found if case.host not in families() or case.host in chosen]


def _lora() -> Iterator[Case]:
    for family in families():  # the default, on queries and values wherever a family has them
        yield Case("adapters", "lora", family, "rank 4, alpha 8", {"rank": 4, "alpha": 8})
    there = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
    for family in ("bert", "gpt2", "t5", "llama"):
        yield Case("adapters", "lora", family, "q, k, v and feed-forward", {"rank": 3, "alpha": 4}, there)
    for part in ("q", "k", "v"):
        yield Case("adapters", "lora", "gpt2", f"{part} alone", {"rank": 2}, {"attn_matrices": [part]})
    for alpha in (4, 8):
        yield Case("adapters", "lora", "bert", f"gated, alpha {alpha}", {"rank": 4, "alpha": alpha}, {"use_gating": True})

    def peft(host: str, setting: str, there: dict[str, Any], **config: Any) -> Case:
        return Case("peft", "lora", host, setting, {"rank": 4, "alpha": 8, **config}, there)

    yield peft("bert", "rank 4, alpha 8", _QV)
    yield peft("bert", "rank 1, alpha 16", _QV, rank=1, alpha=16)
    yield peft("bert", "rank 8, alpha 3", _QV, rank=8, alpha=3)
    yield peft("bert", "rsLoRA", _QV, use_rslora=True)
    patterns = {"rank": {"default": 4, "query": 2, "0.attention.self.value": 6}, "alpha": {"default": 8, "value": 3}}
    yield peft("bert", "rank and alpha by pattern", _QV, **patterns)
    yield peft("bert", "rank and alpha by pattern, rsLoRA", _QV, **patterns, use_rslora=True)
    yield peft("bert", "with a bias", _QV, bias=True)
    for host in ("bert", "llama", "t5", "gpt2"):
        yield peft(host, "all linear layers", {"target_modules": "all-linear"}, rank=2)
    yield peft("gpt2", "c_attn, whole", {"target_modules": ["c_attn"]})
    yield peft("dense", "layers with and without a bias", {"target_modules": ["up", "down"]})
    yield peft("dense", "with a bias, where there is none", {"target_modules": ["down"]}, bias=True)
    for host in _CONVS:
        yield peft(host, "convolution", {"target_modules": ["conv"]})
    yield peft("conv2d", "with a bias", {"target_modules": ["conv"]}, bias=True)
    for host in ("embedding", "embedding_padding"):
        yield peft(host, "embedding", {"target_modules": ["embedding"]})
    yield peft("embedding", "rsLoRA", {"target_modules": ["embedding"]}, use_rslora=True)
    yield peft("attention", "torch's attention", {"target_modules": ["attention"]})
    yield peft("attention", "one parameter", {"target_modules": [], "target_parameters": ["attention.in_proj_weight"]})
    for host in ("experts", "experts_transposed"):
        for names in (["up_proj"], ["up_proj", "down_proj"]):
            there = {"target_modules": [], "target_parameters": [f"experts.{name}" for name in names]}
            yield peft(host, f"experts' {' and '.join(names)}", there)
    yield peft("experts", "rsLoRA", {"target_modules": [], "target_parameters": ["experts.up_proj"]}, use_rslora=True)


def _dora() -> Iterator[Case]:
    for host in ("bert", "llama", "vit"):
        yield Case("adapters", "dora", host, "rank 4, alpha 4", {"rank": 4, "alpha": 4, "use_dora": True})
    yield Case("adapters", "dora", "bert", "rank 4, alpha 8", {"rank": 4, "alpha": 8, "use_dora": True})
    here = {"targets": ["@attention.q", "@attention.v"]}
    yield Case("adapters", "dora", "gpt2", "rank 4, alpha 4", {"rank": 4, "alpha": 4, "use_dora": True}, here=here)

    def peft(host: str, setting: str, targets: list[str], **config: Any) -> Case:
        return Case("peft", "dora", host, setting, {"rank": 4, "alpha": 8, "use_dora": True, **config}, _to(targets))

    yield peft("bert", "rank 4, alpha 8", ["query", "value"])
    yield peft("bert", "rsLoRA", ["query", "value"], use_rslora=True)
    yield peft("bert", "with a bias", ["query", "value"], bias=True)
    yield peft("gpt2", "c_attn, whole", ["c_attn"])
    yield peft("llama", "layers without a bias", ["q_proj", "down_proj"])
    for host in _CONVS:
        yield peft(host, "convolution", ["conv"])
    yield peft("embedding", "embedding", ["embedding"])
    yield peft("attention", "torch's attention", ["attention"])


def _vera() -> Iterator[Case]:
    here = {"targets": ["@attention.q", "@attention.v"]}
    for host in ("bert", "llama", "vit"):
        yield Case("adapters", "vera", host, "rank 8, diagonal matrices", {"rank": 8}, here=here)
    yield Case("peft", "vera", "bert", "rank 8", {"rank": 8}, _to(["query", "value"]))
    yield Case("peft", "vera", "bert", "layers of several shapes", {"rank": 4}, _to(["query", "intermediate.dense"]))
    yield Case("peft", "vera", "gpt2", "c_attn, whole", {"rank": 8}, _to(["c_attn"]))
    yield Case("peft", "vera", "llama", "layers without a bias", {"rank": 8}, _to(["q_proj", "v_proj"]))


def _ia3() -> Iterator[Case]:
    for family in families():
        yield Case("adapters", "ia3", family, "k, v and feed-forward")

    def peft(host: str, setting: str, outputs: list[str], inputs: list[str]) -> Case:
        there = {"target_modules": [*outputs, *inputs], "feedforward_modules": inputs}
        return Case("peft", "ia3", host, setting, there=there)

    yield peft("bert", "k, v and feed-forward", ["key", "value"], ["output.dense"])
    yield peft("gpt2", "c_attn, whole, and feed-forward", ["c_attn"], ["mlp.c_proj"])
    yield peft("llama", "k, v and feed-forward", ["k_proj", "v_proj"], ["down_proj"])
    yield peft("t5", "k, v and feed-forward", ["k", "v"], ["wo"])
    yield peft("dense", "outputs", ["up", "down"], [])
    yield peft("dense", "inputs", [], ["down", "head"])
    for host in ("conv2d", "conv2d_circular", "conv3d", "conv1d"):
        yield peft(host, "a convolution's output", ["conv"], [])
        yield peft(host, "a convolution's input", [], ["conv"])
    yield peft("conv2d_groups", "a convolution's output", ["conv"], [])
    yield peft("embedding", "an embedding's output", ["embedding"], [])


def _biases() -> Iterator[Case]:
    yield Case("peft", "bitfit", "bert", "queries and feed-forward", there=_to(["query", "intermediate.dense"]))
    yield Case("peft", "bitfit", "dense", "a layer without a bias", there=_to(["down"]))
    yield Case("peft", "norm_tuning", "bert", "LayerNorm", there=_to(["LayerNorm"]))
    yield Case("peft", "norm_tuning", "gpt2", "LayerNorm", there=_to(["ln_1", "ln_2", "ln_f"]))
    yield Case("peft", "norm_tuning", "llama", "RMSNorm", there=_to(["input_layernorm", "norm"]))


def _bottlenecks() -> Iterator[Case]:
    gelu = {"non_linearity": "gelu", "reduction_factor": 4}
    for host in ("bert", "gpt2"):
        yield Case("adapters", "compacter", host, "phm_dim 4", gelu)
        yield Case("adapters", "compacter", host, "phm_dim 2, rank 3", gelu, {"phm_dim": 2, "phm_rank": 3})
        yield Case("adapters", "compacter++", host, "phm_dim 4", gelu | {"original_ln_before": True})
    relu = {"non_linearity": "relu", "reduction_factor": 4, "original_ln_before": True}
    for host in ("bert_masked_lm", "gpt2_causal_lm"):
        yield Case("adapters", "invertible", host, "MAD-X: coupling and bottleneck", relu)
        yield Case("adapters", "invertible", host, "coupling alone", relu)
        yield Case("adapters", "invertible", host, "in transformers' own class", relu | {"plain": True})
    yield Case("adapters", "invertible", "bert_masked_lm", "GLOW", relu, {"inv_adapter": "glow"})
    for host in ("bert", "gpt2"):
        yield Case("adapters", "union", host, "LoRA and sequential bottleneck", relu | {"rank": 4, "alpha": 8})


def _combining() -> Iterator[Case]:
    weights = ({"parity": 1.0}, {"parity": 1.0, "other": 1.0}, {"parity": 1.0, "other": -0.5})
    for mix in weights:
        told = " + ".join(f"{weight:g} {'ab'[n]}" for n, weight in enumerate(mix.values()))
        for how in ("linear", "concatenate", "svd"):
            for flags in ({}, {"use_rslora": True}):
                config = {"rank": 3, "alpha": 7, "weights": mix, "how": how, **flags}
                yield Case("peft", "combine", "bert", f"{how}: {told}{', rsLoRA' if flags else ''}", config, _QV)
        for how in ("linear", "negate_b", "svd"):
            config = {"rank": 3, "alpha": 7, "weights": mix, "how": how}
            yield Case("adapters", "combine", "bert", f"{how}: {told}", config)

    mix = {"parity": 0.7, "other": 0.3}
    config = {"rank": 3, "alpha": 7, "weights": mix, "how": "factors"}
    yield Case("peft", "combine", "bert", "factor by factor: 0.7 a + 0.3 b", config, _QV)


def _to(targets: list[str]) -> dict[str, Any]:
    return {"target_modules": targets}
