"""Hypothesis generators."""

from typing import Any

from hypothesis import strategies as st

import adapterkit as ak
from adapterkit.names import MAX_LENGTH
from adapterkit.ops.activations import NON_LINEARITIES

adapter_names = (
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=MAX_LENGTH)
    | st.sampled_from(["forward", "training", "a.b", "..", "%2E", "_x", "keys", "sst2", "record", "__class__", "日本語"])
).filter(str.isprintable)


def per_layer(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A value, or a map from layer to value with a default."""
    layers = st.dictionaries(st.sampled_from(["0", "1", "7"]), values)
    return values | st.builds(lambda default, rest: {**rest, "default": default}, values, layers)


sizes = st.one_of(
    st.fixed_dictionaries({"reduction_factor": per_layer(st.sampled_from([0.5, 1.0, 2.0, 3.5, 16.0, 64.0]))}),
    st.fixed_dictionaries({"bottleneck_size": per_layer(st.integers(1, 5))}),
)
layer_norms = st.sampled_from(
    [
        {},
        {"layer_norm_before": True},
        {"layer_norm_after": True},
        {"layer_norm_after": True, "residual_before_layer_norm": True},
    ]
)
options = st.fixed_dictionaries(
    {},
    optional={
        "non_linearity": st.sampled_from(sorted(NON_LINEARITIES)),
        "scaling": st.sampled_from([1.0, 4.0, 0.25, "learned", "channel"]),
        "gating": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.3]),
        "stochastic_depth": st.sampled_from([0.0, 0.5]),
        "init": st.sampled_from(["lora", "mam", "houlsby", "bert"]),
        "seed": st.none() | st.integers(0, 2**31),
        "layers": st.none() | st.sampled_from([(0,), (1,), (-1,), (0, 1)]),
    },
)
# Settings for the tiny hosts of conftest: where, and which targets make sense there.
places = st.sampled_from(
    [
        {"targets": ["attention.out"]},
        {"targets": ["attention"], "output": 0},
        {"targets": ["blocks.*.norm_2"], "at": "renormalised"},
        {"targets": ["norm_?"], "at": "input"},
        {"targets": ["blocks.*.up"], "placement": "parallel"},
        {"targets": ["re:blocks\\.\\d\\.down"], "residual": "up"},
        {"targets": ["blocks.*.down"], "residual": "up", "placement": "parallel"},
        {"targets": ["embedding"]},
        {"targets": ["**.norm_*"], "exclude": ["norm_1"]},
    ]
)


def _config(place: dict[str, Any], size: dict[str, Any], norms: dict[str, Any], rest: dict[str, Any]) -> Any:
    if place["targets"] == ["embedding"]:
        rest = {key: value for key, value in rest.items() if key != "layers"}
    return ak.BottleneckConfig(**place, **size, **norms, **rest)


configs = st.builds(_config, places, sizes, layer_norms, options)
"""Bottleneck configs that fit the post-norm host."""


def is_identity_at_init(config: ak.BottleneckConfig) -> bool:
    """Whether the paper's method starts as the identity with these settings."""
    return config.init in ("lora", "mam") and not config.residual_before_layer_norm
