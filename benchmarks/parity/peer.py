"""The `adapters` library: the same model adapted by it, and what it calls its places and tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import adapters
import torch
from adapters import AdapterConfig, AdapterPlusConfig
from adapters.methods.bottleneck import BottleneckLayer
from torch import nn

__all__ = [
    "LEAVES",
    "PRESETS",
    "Factor",
    "Peer",
    "PeerSite",
    "bottleneck_layers",
    "find_sites",
    "preset_config",
    "settings",
]

Factor = float | Mapping[str, float]

NAME = "parity"
PRESETS = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "adapter_plus")
# What that library calls an adapter's tensors, and what we do.
LEAVES = {
    "adapter_down.0.weight": "down_weight",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
    "scaling": "scale",
}
_KINDS = {"mh_adapter": "attention", "output_adapter": "feedforward", "cross_adapter": "crossattention"}


@dataclass(frozen=True)
class PeerSite:
    """One adapter of that library: its path, the path of its block, what it comes after, and the module."""

    path: str
    block: str
    kind: str
    module: nn.Module


class Peer:
    """A copy of a model, adapted by the `adapters` library; the model is not touched."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]):  # what it initialises at random is to be the same in every run
            torch.manual_seed(0)
            adapters.init(self.model)
        self.model.eval()

    def add(self, preset: str, factor: Factor) -> None:
        """Add the preset's adapters with this reduction factor, make all of their tensors random, and activate them."""
        config = preset_config(preset, self._by_its_count(factor))
        self.model.add_adapter(NAME, config=config)
        self.model.set_active_adapters(NAME)
        self.model.eval()
        draw = torch.Generator().manual_seed(2)
        for site in self.sites():
            for parameter in site.module.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else 1
                parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=draw) / fan_in**0.5)
                parameter.requires_grad_(True)

    def sites(self) -> list[PeerSite]:
        """Its adapters, block by block."""
        return find_sites(self.model, NAME)

    def _by_its_count(self, factor: Factor) -> Factor:
        """A map by layer in that library's count, which goes on from one stack of blocks to the next; ours starts anew."""
        if not isinstance(factor, Mapping):
            return factor
        paths = {id(module): path for path, module in self.model.named_modules()}
        ours = {
            index: next(part for part in paths[id(block)].split(".") if part.isdecimal())
            for index, block in self.model.iter_layers()
        }
        return {"default": factor["default"]} | {str(i): factor[own] for i, own in ours.items() if own in factor}


def find_sites(model: nn.Module, name: str) -> list[PeerSite]:
    """The bottleneck adapters of this name in a model, block by block."""
    return [
        replace(site, module=site.module.adapters[name])
        for site in bottleneck_layers(model)
        if name in site.module.adapters
    ]


def bottleneck_layers(model: nn.Module) -> list[PeerSite]:
    """The places for bottleneck adapters in a model, block by block, each with the module that holds those of all names."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [
        PeerSite(paths[id(module)], paths[id(block)], _KINDS[module.location_key], module)
        for _, block in model.iter_layers()
        for module in block.modules()
        if isinstance(module, BottleneckLayer)
    ]


def preset_config(preset: str, factor: Factor) -> AdapterConfig:
    """That library's own preset; only the reduction factor is set.

    AdapterPlus has no name there, and its stochastic depth needs torchvision: off, since it acts in training alone.
    """
    if preset == "adapter_plus":
        return AdapterPlusConfig(reduction_factor=factor, stochastic_depth=0.0)
    return AdapterConfig.load(preset, reduction_factor=factor)


def settings(preset: str) -> dict[str, Any]:
    """What that library's preset sets, under our names."""
    config = AdapterPlusConfig() if preset == "adapter_plus" else AdapterConfig.load(preset)
    return {
        "reduction_factor": config.reduction_factor,
        "non_linearity": config.non_linearity,
        "scaling": config.scaling,
        "dropout": config.dropout,
        "stochastic_depth": config.stochastic_depth,
        "init": config.init_weights,
    }
