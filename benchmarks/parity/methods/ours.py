"""Ours: the same adapter on a copy of the same host."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

import adapterkit as ak
from adapterkit.methods.spellings import as_config

from .case import NAME, SHARED, Case, Key, Leaf
from .draw import draw_
from .hosts import Host
from .own_tensors import own_tensors

__all__ = ["Ours", "PlacesDifferError", "config_of"]

Tensors = Mapping[Key, Tensor]
# Of each place that is a module or Parameter with a target of its own, one tensor.
_OF_TARGETS = {"lora_A", "lambda_b", "scale", "weight", "bias"}


class PlacesDifferError(Exception):
    """Ours cannot be given the peer's tensors: it sits elsewhere, or its tensors have other shapes."""


class Ours:
    """A copy of a host, adapted by adapterkit.

    Args:
        tensors: What the adapter is to hold, by place; None to draw it, at the places that the case names.

    Raises:
        AdapterKitError: the adapter is refused.
        PlacesDifferError: it has other tensors than those given.
    """

    def __init__(self, case: Case, host: Host, tensors: Tensors | None) -> None:
        self.model = copy.deepcopy(host.model)
        self._case = case
        self.kit = ak.wrap(self.model, example_inputs=dict(host.inputs))
        self.leaves = self._add(NAME, tensors)
        self.kit.train_adapter(NAME)

    def merge(self) -> None:
        """Put the adapter into the model's weights."""
        self.kit.merge(NAME)

    def unmerge(self) -> None:
        """Take it out again."""
        self.kit.unmerge(NAME)

    def add_other(self, tensors: Tensors) -> None:
        """Add a second adapter of the same config, called "other"."""
        self._add("other", tensors)

    def combine(self, weights: Mapping[str, float], how: str) -> None:
        """Activate a combination of the adapters "parity" and "other", made anew."""
        called = {"linear": "concatenate", "negate_b": "concatenate", "factors": "linear"}  # a sum by the peers' names
        rank = 2 * self._case.config["rank"] if how == "svd" else None
        self.kit.combine("combined", weights, how=called.get(how, how), rank=rank)
        self.kit.activate("combined")

    def _add(self, name: str, tensors: Tensors | None) -> dict[Key, Leaf]:
        """Add an adapter that holds these tensors, or drawn ones."""
        self.kit.add(name, config_of(self._case, tensors), seed=1, dtype="float64")
        own = own_tensors(self.model, name)
        leaves = {key: Leaf(it.parameter, it.of, is_trained=it.parameter.requires_grad) for key, it in own.items()}
        if tensors is None:
            draw_(leaves, seed=2)
            return leaves
        if set(own) != set(tensors):
            there, here = set(tensors) - set(own), set(own) - set(tensors)
            raise PlacesDifferError(f"theirs alone: {sorted(there)[:2]}, ours alone: {sorted(here)[:2]}")
        for key, value in tensors.items():
            there, shape = value.detach(), leaves[key].value().shape
            if key.place == SHARED:  # matrices as large as the largest site here, or larger there
                there = there[tuple(map(slice, shape))]
            if there.shape != shape:
                raise PlacesDifferError(f"{key}: {tuple(shape)} ours, {tuple(there.shape)} theirs")
            own[key].parameter.data[own[key].index] = there
        return {key: leaves[key] for key in tensors}


def config_of(case: Case, tensors: Tensors | None) -> ak.AdapterConfig | ak.Union:
    """The case's settings in our words, at the places of these tensors; of bottlenecks, our presets'."""
    makers: dict[str, Callable[[], ak.AdapterConfig | ak.Union]] = {
        "vera": lambda: ak.VeRAConfig(**_targets(case, tensors), rank=case.config["rank"]),
        "ia3": lambda: ak.IA3Config(**_targets(case, tensors)),
        "bitfit": lambda: ak.BitFitConfig(**_targets(case, tensors)),
        "norm_tuning": lambda: ak.NormTuningConfig(**_targets(case, tensors)),
        "compacter": lambda: _bottleneck(case, "compacter"),
        "compacter++": lambda: _bottleneck(case, "compacter++"),
        "invertible": lambda: ak.Union(
            ak.InvertibleConfig(block=case.there.get("inv_adapter", "nice")), _bottleneck(case, "seq_bn")
        ),
        "union": lambda: ak.Union(_lora(case, tensors), _bottleneck(case, "seq_bn")),
    }
    return makers[case.method]() if case.method in makers else _lora(case, tensors)


def _lora(case: Case, tensors: Tensors | None) -> ak.LoRAConfig:
    names = ("rank", "alpha", "use_rslora", "use_dora", "bias")
    settings = {name: case.config[name] for name in names if name in case.config}
    return ak.LoRAConfig(**_targets(case, tensors), **settings, gating=case.there.get("use_gating", False))


def _bottleneck(case: Case, preset: str) -> ak.AdapterConfig | ak.Union:
    """A preset with the case's settings."""
    settings = {name: case.config[name] for name in ("non_linearity", "reduction_factor")}
    phm = {name: case.there[name] for name in ("phm_dim", "phm_rank") if name in case.there}
    return as_config(preset, settings | phm)


def _targets(case: Case, tensors: Tensors | None) -> dict[str, Any]:
    """Targets for these places: modules and Parameters by their paths, parts of fused projections by their roles."""
    if case.here:
        return dict(case.here)
    if tensors is None:
        named, inputs = case.there["target_modules"], case.there.get("feedforward_modules", [])
        outputs = [name for name in named if name not in inputs]
    else:
        places = dict.fromkeys(key.place for key in tensors if key.name in _OF_TARGETS)
        leaf = ".bias" if case.method == "bitfit" else ""
        inputs = [_exactly(place.path) for place in places if place.at == "input"]
        whole = [_exactly(place.path + leaf) for place in places if place.at == "output" and not place.part]
        outputs = [*whole, *sorted({f"@attention.{place.part}" for place in places if place.part})]
    return {"targets": outputs, **({"feedforward_targets": inputs} if case.method == "ia3" else {})}


def _exactly(path: str) -> str:
    return f"re:{re.escape(path)}"
