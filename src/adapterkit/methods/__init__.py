"""The adapter methods, and what packages and notebooks need that bring one of their own.

A method of this package is a file here, its module in `nn`, and a line in `in_tree.py`. Other packages bring theirs by an
entry point in the group `adapterkit.methods` that leads to a Method, notebooks by `register`; nothing here changes.
"""

from ..config.settings import AdapterConfig, Targets, TensorConfig
from ..placement.layers import setting_at
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from ..placement.weights import projection_at
from .method import LinearInParameters, Method, SharesTensors
from .registry import (
    METHODS,
    UNION_PRESETS,
    all_methods,
    check_methods_of,
    method_named,
    method_of,
    preset_named,
    preset_names,
    presets,
    register,
)

__all__ = [
    "METHODS",
    "UNION_PRESETS",
    "AdapterConfig",
    "LinearInParameters",
    "Method",
    "Placement",
    "SharesTensors",
    "SiteSpec",
    "Targets",
    "TensorConfig",
    "all_methods",
    "check_methods_of",
    "method_named",
    "method_of",
    "preset_named",
    "preset_names",
    "presets",
    "projection_at",
    "register",
    "setting_at",
]
