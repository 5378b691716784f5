"""Hypothesis generators."""

from typing import Any

from hypothesis import strategies as st

import adapterkit as ak
from adapterkit.composition.names import MAX_LENGTH
from adapterkit.nn.functional.non_linearities import NON_LINEARITIES
from benchmarks.zoo.wild.spec import Spec, grown

adapter_names = (
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=MAX_LENGTH)
    | st.sampled_from(["forward", "training", "a.b", "..", "%2E", "_x", "keys", "sst2", "record", "__class__", "日本語"])
).filter(str.isprintable)


def per_layer(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A value, or a map from layer to value with a default. The hosts of `hosts/tiny.py` have two layers."""
    layers = st.dictionaries(st.sampled_from(["0", "1"]), values)
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
# Settings for the hosts of `hosts/tiny.py`: where, and which targets make sense there.
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
        # It lies in no layer, and settings by layer are for those that do.
        rest = {key: value for key, value in rest.items() if key != "layers"}
        size = {key: value["default"] if isinstance(value, dict) else value for key, value in size.items()}
    return ak.BottleneckConfig(**place, **size, **norms, **rest)


configs = st.builds(_config, places, sizes, layer_norms, options)
"""Bottleneck configs that fit the post-norm host."""


def is_identity_at_init(config: ak.BottleneckConfig) -> bool:
    """Whether the paper's method starts as the identity with these settings."""
    return config.init in ("lora", "mam") and not config.residual_before_layer_norm


@st.composite
def wild_specs(draw: st.DrawFn) -> Spec:
    """A model of the wild zoo's grammar: the plain one, with a few parts changed."""
    return grown(lambda options: draw(st.sampled_from(options)))


@st.composite
def compositions(draw: st.DrawFn, names: st.SearchStrategy[Any], rows: int | None, tokens: int, depth: int = 3) -> Any:
    """A tree of compositions; most fit a batch of so many rows, and a sequence of so many tokens.

    Args:
        names: Of adapters; fusions, too.
        rows: None inside one row, which nothing divides.
    """
    kinds = ["name", "name", "Stack", "Average", "Split", "Drop"] + ["Rows", "Rows", "BatchSplit", "BatchSplit"] * (
        rows is not None
    )
    kind = draw(st.sampled_from(kinds if depth else ["name"]))
    if kind == "name":
        return draw(names)

    def child(rows: int | None = rows, tokens: int = tokens) -> Any:
        return draw(compositions(names, rows, tokens, depth - 1))

    if kind == "Rows":
        count = rows if draw(st.integers(0, 9)) else draw(st.integers(1, 5))
        return ak.Rows([child(None) if draw(st.integers(0, 3)) else None for _ in range(count or 1)])
    if kind == "Drop":
        return ak.Drop(child(), layers=draw(st.lists(st.sampled_from([0, 1, -1, 5]), max_size=2)))
    count = draw(st.integers(1, 3))
    if kind == "Stack":
        return ak.Stack(*(child() for _ in range(count)))
    if kind == "Average":
        weights = st.none() | st.lists(st.floats(0.1, 3), min_size=count, max_size=count)
        return ak.Average(*(child() for _ in range(count)), weights=draw(weights))
    whole = tokens if kind == "Split" else rows or 0
    if whole % count == 0 and draw(st.booleans()):
        sizes, parts = None, [whole // count] * count
    else:
        cuts = sorted(draw(st.lists(st.integers(0, whole), min_size=count - 1, max_size=count - 1)))
        sizes = parts = [end - start for start, end in zip([0, *cuts], [*cuts, whole], strict=True)]
    if kind == "Split":
        return ak.Split(*(child(tokens=size) for size in parts), sizes=sizes)
    return ak.BatchSplit(*(child(rows=size) if size else draw(names) for size in parts), sizes=sizes)
