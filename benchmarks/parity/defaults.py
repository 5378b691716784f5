"""Which default settings of the same preset differ between the two libraries."""

from __future__ import annotations

from typing import Any

from adapterkit.methods.bottleneck import BottleneckConfig
from adapterkit.methods.spellings import as_config

from .peer import PRESETS, settings

__all__ = ["differing_defaults"]

# What that library calls an initialisation that we have under another name.
_SAME = {"mam_adapter": "lora"}


def differing_defaults() -> dict[str, dict[str, dict[str, Any]]]:
    """By preset and setting: that library's value and ours, where they differ."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for preset in PRESETS:
        ours = _ours(preset)
        for name, theirs in settings(preset).items():
            if _SAME.get(theirs, theirs) != ours[name]:
                found.setdefault(preset, {})[name] = {"theirs": theirs, "ours": ours[name]}
    return found


def _ours(preset: str) -> dict[str, Any]:
    config = as_config(preset, {})
    if not isinstance(config, BottleneckConfig):
        raise TypeError(f"{preset!r} is no bottleneck preset")
    return {**config.model_dump(), "reduction_factor": config.reduction_factor or config.default_reduction_factor}
