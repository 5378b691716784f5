"""The `adapters` library: a model with three adapters in it, and its words for our compositions."""

from __future__ import annotations

from typing import Any

import adapters
import adapters.composition as blocks
import torch
from adapters import AdapterFusionConfig, IA3Config, LoRAConfig
from adapters.methods.modeling import BertFusion

import adapterkit as ak

from ..measure import float_tensors
from ..methods.adapters_peer import leaves_of, prepared
from ..methods.case import Key, Leaf, Place
from ..methods.draw import draw_
from ..methods.hosts import Host
from ..peer import bottleneck_layers, preset_config
from .case import NAMES, ComposedCase

__all__ = ["KEY_BIAS", "REDUCTION", "ComposedPeer", "values_start"]

REDUCTION = 4
# Of their fusion alone: it adds the same to the score of every child.
KEY_BIAS = "key_bias"
_FUSION_LEAVES = {
    "query.weight": "query_weight",
    "query.bias": "query_bias",
    "key.weight": "key_weight",
    "key.bias": KEY_BIAS,
    "value.weight": "value_weight",
}


class ComposedPeer:
    """A copy of a model with three adapters of this method, every tensor random."""

    def __init__(self, case: ComposedCase, host: Host) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = prepared(case, host.model)
            for name in NAMES:
                self.model.add_adapter(name, config=_config(case))
        self.model.double().eval()
        self.leaves: dict[str, dict[Key, Leaf]] = {}
        for n, name in enumerate(NAMES):
            self.leaves[name] = leaves_of(self.model, name)
            draw_(self.leaves[name], seed=10 + n)

    def add_fusion(self, case: ComposedCase, fuse: ak.Fuse) -> dict[Key, Leaf]:
        """Add the fusion of a composition, every tensor random; its leaves."""
        given = case.fusion
        settings = {name: given.get(name, True) for name in ("query", "key", "value")} | {
            "query_before_ln": given.get("query_reads") == "site",
            "residual_before": given.get("residual_before", False),
            "value_initialized": given.get("value_init", "identity") == "identity",
            "temperature": "temperature" in given,
            **case.there,
        }
        children = [child if isinstance(child, str) else _block(child).last() for child in fuse.children]
        with torch.random.fork_rng(devices=[]):
            self.model.add_adapter_fusion(children, AdapterFusionConfig.load("dynamic", **settings), name=fuse.fusion)
        self.model.double().eval()
        leaves = {
            Key(Place(site.block, site.kind), _FUSION_LEAVES[name]): Leaf(parameter)
            for site in bottleneck_layers(self.model)
            if fuse.fusion in site.module.adapter_fusion_layer
            for name, parameter in site.module.adapter_fusion_layer[fuse.fusion].named_parameters()
            if name in _FUSION_LEAVES  # where nothing is projected there is one that nothing reads
        }
        draw_(leaves, seed=5)
        self.leaves[fuse.fusion] = leaves
        return leaves

    def remove_fusion(self, fuse: ak.Fuse) -> None:
        """Take it away again."""
        self.model.set_active_adapters(None)
        self.model.delete_adapter_fusion(fuse.fusion)
        self.leaves.pop(fuse.fusion, None)

    def run(self, case: ComposedCase, host: Host) -> list[torch.Tensor]:
        """The outputs with a composition."""
        composition, skipped = case.composition, None
        if isinstance(composition, ak.Drop):
            composition, skipped = composition.children[0], self._by_its_count(composition.layers)
        self.model.set_active_adapters(_block(composition), skip_layers=skipped)
        inputs = dict(host.inputs)
        if isinstance(composition, ak.Rows):
            names = sorted(set(composition.children))  # type: ignore[type-var]  # names, all of them
            inputs["task_ids"] = torch.tensor([names.index(name) for name in composition.children])
        for _ in range(case.forwards):
            outputs = float_tensors(self.model(**inputs))
        return outputs

    def _by_its_count(self, layers: tuple[int, ...]) -> list[int]:
        """Layers in that library's count, which goes on from one stack of blocks to the next; ours starts anew."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        ours = {
            index: next(int(part) for part in paths[id(block)].split(".") if part.isdecimal())
            for index, block in self.model.iter_layers()
        }
        return [index for index, own in ours.items() if own in layers]


def values_start() -> torch.Tensor:
    """What Wv of a new dynamic fusion is there. Shape: (width, width)."""
    with torch.random.fork_rng(devices=[]):
        return BertFusion(AdapterFusionConfig.load("dynamic"), 8, 0.0).value.weight.detach()


def _config(case: ComposedCase) -> adapters.AdapterConfig:
    if case.method == "lora":
        return LoRAConfig(r=case.config["rank"], alpha=case.config["alpha"])
    return IA3Config() if case.method == "ia3" else preset_config(case.method, REDUCTION)


def _block(composition: Any) -> Any:
    """A composition in that library's words."""
    if isinstance(composition, str):
        return composition
    children = [_block(child) for child in composition.children]
    if isinstance(composition, ak.Rows):
        return blocks.MultiTask(*sorted(set(children)))
    kind = getattr(blocks, type(composition).__name__)
    if isinstance(composition, ak.Average):
        return kind(*children, weights=composition.weights and list(composition.weights))
    if isinstance(composition, ak.Split):
        return kind(*children, splits=list(composition.sizes or ()))
    if isinstance(composition, ak.BatchSplit):
        return kind(*children, batch_sizes=list(composition.sizes or ()))
    return kind(*children, name=composition.fusion) if isinstance(composition, ak.Fuse) else kind(*children)
