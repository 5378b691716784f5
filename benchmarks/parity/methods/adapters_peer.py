"""The `adapters` library: a model adapted by it, and its tensors in our layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import adapters
import torch
from adapters import (
    BertAdapterModel,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoRAConfig,
    GPT2AdapterModel,
    IA3Config,
    LoRAConfig,
    SeqBnInvConfig,
    VeraConfig,
)
from adapters.methods.lora import LoRA, LoRALayer, LoRAMergedLinear, Vera
from torch import Tensor, nn

from ..peer import LEAVES, find_sites
from .case import NAME, SHARED, Case, Key, Leaf, Place
from .draw import draw_

__all__ = ["AdaptersPeer", "leaves_of", "prepared"]


class AdaptersPeer:
    """A copy of a model, adapted by `adapters`."""

    def __init__(self, case: Case, host: nn.Module) -> None:
        self._case = case
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = prepared(case, host)
            self.model.add_adapter(NAME, config=_config(case))
        self.model.set_active_adapters(NAME)
        if case.method == "invertible":
            self.model.active_head = "lm"
        self.model.double().eval()
        self.leaves = leaves_of(self.model, NAME)
        draw_(self.leaves, seed=2)
        if case.setting.startswith("coupling alone"):
            for site in find_sites(self.model, NAME):
                for parameter in site.module.parameters():
                    parameter.data.zero_()

    def merge(self) -> None:
        """Put the adapter into the model's weights."""
        self.model.merge_adapter(NAME)

    def unmerge(self) -> None:
        """Take it out again."""
        self.model.reset_adapter()

    def add_other(self) -> Mapping[Key, Leaf]:
        """Add a second adapter of the same config, called "other"."""
        self.model.add_adapter("other", config=_config(self._case))
        self.model.double().eval()
        leaves = leaves_of(self.model, "other")
        draw_(leaves, seed=4)
        return leaves

    def combine(self, weights: Mapping[str, float], how: str) -> None:
        """Activate a combination of the adapters "parity" and "other", made anew."""
        kind = {"linear": "linear", "negate_b": "lora_linear_only_negate_b", "svd": "lora_delta_w_svd"}[how]
        self.model.average_adapter(
            "combined",
            list(weights),
            weights=list(weights.values()),
            combine_strategy=kind,
            normalize_weights=False,
            svd_rank=2 * self._case.config["rank"] if how == "svd" else None,
        )
        self.model.set_active_adapters("combined")
        self.model.double().eval()


def leaves_of(model: nn.Module, name: str) -> dict[Key, Leaf]:
    """All tensors of an adapter of that library; what sites share comes last."""
    leaves: dict[Key, Leaf] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALayer) and name in layer.loras:
            found = _of_fused(layer, name) if isinstance(layer, LoRAMergedLinear) else _of_linear(layer, name)
            leaves |= {Key(Place(path, part), tensor): leaf for part, tensor, leaf in found}
    for site in find_sites(model, name):
        for tensor, parameter in site.module.named_parameters():
            called = LEAVES.get(tensor, tensor.replace("adapter_down.0.", "down.").replace("adapter_up.", "up."))
            leaves[Key(Place(site.block, site.kind), called)] = Leaf(parameter)
    coupling = getattr(model.base_model, "invertible_adapters", {})
    if name in coupling:
        leaves |= {Key(Place("coupling"), n): Leaf(p) for n, p in coupling[name].named_parameters()}
    shared = model.base_model.shared_parameters
    names = {"lora_A": "vera_A", "lora_B": "vera_B"}
    for tensor, parameter in shared[name].items() if name in shared else ():
        leaves[Key(SHARED, names.get(tensor, tensor))] = Leaf(parameter, is_trained=tensor == "phm_rule")
    return leaves


def _of_linear(layer: LoRALayer, name: str) -> Iterator[tuple[str, str, Leaf]]:
    """The tensors at a linear layer."""
    lora = layer.loras[name]
    if isinstance(lora, Vera):  # full matrices there, diagonals in the paper
        for tensor, parameter in (("lambda_b", lora.vera_B), ("lambda_d", lora.vera_D)):
            yield "", tensor, Leaf(parameter, torch.diagonal, within=torch.eye(len(parameter), dtype=parameter.dtype))
    elif isinstance(lora, LoRA):
        yield "", "lora_A", Leaf(lora.lora_A)
        yield "", "lora_B", Leaf(lora.lora_B)
        if lora.use_dora:
            yield "", "magnitude", Leaf(lora.m.weight, torch.flatten)
        if lora.use_gating:
            yield "", "gate_weight", Leaf(lora.gate.weight)
            yield "", "gate_bias", Leaf(lora.gate.bias)
    else:
        yield "", "scale", Leaf(lora.lora_B, torch.flatten)


def _of_fused(layer: LoRAMergedLinear, name: str) -> Iterator[tuple[str, str, Leaf]]:
    """The tensors at a projection of queries, keys and values at once, stacked part by part."""
    lora, out = layer.loras[name], layer.out_features // 3
    parts = [part for part, on in zip("qkv", lora.enable_lora, strict=True) if on]
    for n, part in enumerate(parts):
        if isinstance(lora, LoRA):
            yield part, "lora_A", Leaf(lora.lora_A, _block(n, lora.r))
            yield part, "lora_B", Leaf(lora.lora_B, _block(n, out))
        else:
            yield part, "scale", Leaf(lora.lora_B, lambda tensor, n=n: _block(n, out)(tensor).flatten())


def _block(n: int, size: int) -> Callable[[Tensor], Tensor]:
    """The n-th of stacked blocks of rows."""
    return lambda tensor: tensor[n * size : (n + 1) * size]


def prepared(case: Case, host: nn.Module) -> nn.Module:
    """A copy with that library's code in it; for language models, which need its own heads, its own class of model."""
    if case.method != "invertible" or case.config.get("plain"):
        model = copy.deepcopy(host)
        adapters.init(model)
        for name, parameter in model.named_parameters():
            if name.endswith("in_proj.bias"):  # DeBERTa has none there; that library makes one up (see `explained.py`)
                parameter.data.zero_()
        return model
    if hasattr(host, "bert"):
        model = BertAdapterModel(host.config)
        model.bert.load_state_dict(host.bert.state_dict(), strict=False)  # a pooler that no language model reads
        model.add_masked_lm_head("lm")
        head, own = model.heads["lm"], host.cls.predictions
        pairs = ((head[0], own.transform.dense), (head[2], own.transform.LayerNorm), (head[3], own.decoder))
    else:
        model = GPT2AdapterModel(host.config)
        model.transformer.load_state_dict(host.transformer.state_dict())
        model.add_causal_lm_head("lm", layers=1)
        pairs = ((model.heads["lm"].get_output_embeddings(), host.lm_head),)
    for theirs, own in pairs:
        theirs.weight = nn.Parameter(own.weight.detach().clone())
        theirs.bias = None if own.bias is None else nn.Parameter(own.bias.detach().clone())
    return model


def _config(case: Case) -> adapters.AdapterConfig:
    """Our settings in their words."""
    config, there = case.config, case.there
    lora = {"r": config.get("rank", 8), "alpha": config.get("alpha", 8), **there}
    reduced: dict[str, Any] = {"reduction_factor": config.get("reduction_factor", 4), **there}
    makers: dict[str, Callable[[], adapters.AdapterConfig]] = {
        "lora": lambda: LoRAConfig(**lora),
        "combine": lambda: LoRAConfig(**lora),
        "dora": lambda: DoRAConfig(**lora),
        "vera": lambda: VeraConfig(**lora),
        "ia3": lambda: IA3Config(**there),
        "compacter": lambda: CompacterConfig(**reduced),
        "compacter++": lambda: CompacterPlusPlusConfig(**reduced),
        "invertible": lambda: SeqBnInvConfig(**reduced),
        "union": lambda: adapters.ConfigUnion(LoRAConfig(**lora), adapters.SeqBnConfig(reduction_factor=4)),
    }
    return makers[case.method]()
