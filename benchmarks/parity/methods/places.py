"""Where the presets of both libraries go by themselves, family by family."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

import adapterkit as ak

from ..families import families
from ..measure import default_dtype
from .adapters_peer import AdaptersPeer
from .case import Case, Place
from .hosts import host

__all__ = ["default_places"]

# What places are called: by roles that lead there, and whether outputs or inputs are adapted.
_CALLED = (
    ("cross-attention", tuple(f"@crossattention.{part}" for part in "qkv"), "output"),
    ("the output of the feed-forward's first projections", ("@feedforward.first",), "output"),
    ("the feed-forward's output", ("@feedforward.last",), "output"),
    ("the input of the feed-forward's last projection", ("@feedforward.last",), "input"),
)


def default_places(chosen: list[str]) -> list[dict[str, Any]]:
    """For each preset and family: in words, what only that library adapts, and what only ours does."""
    return [_compared(preset, family) for preset in ("lora", "ia3") for family in families() if family in chosen]


def _compared(preset: str, family: str) -> dict[str, Any]:
    with default_dtype(torch.float64):
        it = host(family)
        peer = AdaptersPeer(Case("adapters", preset, family, "by default"), it.model)
        kit = ak.wrap(it.model, example_inputs=dict(it.inputs))
        theirs = {key.place for key in peer.leaves}
        ours = {
            Place(site.path, part, "input" if site.at == "input" else "output")
            for site in kit.sites(preset)
            for part in ([name for name, _ in site.slices] or [""])
        }
        found = {"theirs_alone": _called(kit, theirs - ours), "ours_alone": _called(kit, ours - theirs)}
        return {"preset": preset, "family": family, **found}


def _called(kit: ak.AdapterKit, places: set[Place]) -> list[str]:
    """These places in words; those that none fits, by their paths."""
    found, left = [], set(places)
    for words, roles, at in _CALLED:
        paths = {path for role in roles for path in _paths(kit, role)}
        own = {place for place in left if place.at == at and place.path in paths}
        found += [words] if own else []
        left -= own
    return found + sorted(place.path for place in left)


def _paths(kit: ak.AdapterKit, role: str) -> list[str]:
    """The modules that have a role; none if no module has."""
    with suppress(ak.TargetError):
        return [site.path for site in kit.sites("lora", targets=[role])]
    return []
