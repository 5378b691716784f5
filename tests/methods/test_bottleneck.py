"""The config of a bottleneck: its spellings, its round trips, and what it refuses."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

import adapterkit as ak

from ..strategies import configs


@given(configs)
def test_a_config_survives_json_pickle_and_repetition(config: ak.BottleneckConfig) -> None:
    again = ak.BottleneckConfig.model_validate_json(config.model_dump_json())
    assert again == config == pickle.loads(pickle.dumps(config))
    assert hash(again) == hash(config)


def test_a_map_by_layer_is_equal_whatever_its_order() -> None:
    one, other = ({"default": 16, "1": 2}, {"1": 2, "default": 16})
    a, b = (ak.BottleneckConfig(targets=["x"], reduction_factor=sizes) for sizes in (one, other))
    assert a == b
    assert hash(a) == hash(b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "targets: Field required"),
        ({"targets": []}, "targets: an empty list adapts nothing; name at least 1 module"),
        (
            {"targets": ["x"], "bottleneck_size": "8"},
            "bottleneck_size: found '8', a str; the setting may be a whole number",
        ),
        ({"targets": ["x"], "bottleneck_size": True}, "bottleneck_size: found 'True', a bool; the setting may be"),
        ({"targets": ["x"], "bottleneck_size": {"default": 8, "1": "2"}}, r"bottleneck_size\['1'\]: found '2', a str; "),
        ({"targets": ["x"], "scaling": "double"}, "scaling: found 'double'; .* a finite number, 'learned' or 'channel'$"),
        ({"targets": ["x"], "output": 1.5}, "output: found '1.5'; .* an index .*, a key .*, or a list of them$"),
        ({"targets": ["x"], "layers": ["0"]}, "layers: found '0', a str; .* a list of whole numbers$"),
        ({"targets": ["x"], "seed": "0"}, r"seed: .*\(found '0', a str\)"),
        ({"targets": [3]}, "targets: found '3'; .* names .*, roles .*, and predicates"),
        ({"targets": ["x"], "reduction_factor": 0}, "reduction_factor.*found '0'"),
        ({"targets": ["x"], "reduction_factor": -3.5}, "found '-3.5'"),
        ({"targets": ["x"], "bottleneck_size": 0}, "bottleneck_size.*found '0'"),
        ({"targets": ["x"], "bottleneck_size": {"1": 3}}, "needs a 'default'"),
        ({"targets": ["x"], "bottleneck_size": 3, "reduction_factor": 2}, "not both; found .*=2.* and bottleneck_size=3"),
        ({"targets": ["x"], "non_linearity": "rellu"}, "non_linearity.*found 'rellu'"),
        ({"targets": ["x"], "dropout": 1.0}, "dropout.*found '1.0'"),
        ({"targets": ["x"], "scaling": float("nan")}, "scaling"),
        ({"targets": ["x"], "at": "middle"}, "found 'middle'"),
        ({"targets": ["x"], "at": "input", "placement": "parallel"}, "at='output'; found at='input'"),
        ({"targets": ["x"], "at": "renormalised", "residual": "y"}, "found at='renormalised'"),
        (
            {"targets": ["x"], "residual_before_layer_norm": True},
            "needs layer_norm_after=True; found layer_norm_after=False",
        ),
        ({"targets": ["x"], "input": 0}, "input=0 names .* with at='output', placement='sequential'"),
        ({"targets": ["x"], "output": 0, "at": "input"}, "output=0 names .* with at='input' none"),
        ({"targets": ["x"], "seed": 2**70}, "seed"),
        ({"targets": ["x"], "layers": []}, "layers: an empty list"),
        ({"targets": ["x"], "dtype": "int8"}, "dtype.*found 'int8'"),
        ({"targets": ["x"], "reduction": 2}, "no setting reduction; did you mean reduction_factor"),
        ({"targets": ["x"], "is_parallel": True}, "no setting is_parallel; placement= says it: placement='parallel'"),
        ({"targets": ["x"], "mh_adapter": True}, r"no setting mh_adapter; targets= .*=\['@attention.out'\] is after"),
        ({"targets": ["x"], "output_adapter": True}, r"no setting output_adapter; targets= .*=\['@feedforward.out'\] is"),
        ({"targets": ["x"], "original_ln_before": True}, "no setting original_ln_before; at= says on which side of the"),
        ({"targets": ["x"], "ln_after": True}, r"no setting ln_after; did you mean layer_norm_after\?"),
        ({"targets": ["x"], "init_weights": "bert"}, r"no setting init_weights; did you mean init\?"),
        (
            {"targets": ["x"], "inv_adapter": "nice"},
            "no setting inv_adapter; an invertible adapter is .* the preset 'madx'",
        ),
        ({"targets": ["x"], "phm_layer": True}, "no setting phm_layer; .* ak.CompacterConfig"),
        ({"targets": ["x"], "method": "lora"}, "method.*found 'lora'"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_found(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        ak.BottleneckConfig(**settings)


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(ak.ConfigError, match=r"dropout.*stochastic_depth.*colour"):
        ak.BottleneckConfig(targets=["x"], dropout=2, stochastic_depth=-1, colour="red")  # type: ignore[call-arg]  # wrong on purpose


def test_several_spellings_mean_the_same() -> None:
    plain = ak.BottleneckConfig(targets=("x",), layers=(0, 1), dtype="float16", reduction_factor=4.0)
    assert plain == ak.BottleneckConfig(targets="x", layers=range(2), dtype=torch.float16, reduction_factor=4)


def test_an_override_is_validated_and_drops_its_rival() -> None:
    config = ak.BottleneckConfig(targets=["x"], reduction_factor=4)
    assert config.override({"bottleneck_size": 3}) == ak.BottleneckConfig(targets=["x"], bottleneck_size=3)
    assert config.override({}) is config
    with pytest.raises(ak.ConfigError, match="found '7'"):
        config.override({"dropout": 7})


def test_a_config_cannot_be_changed() -> None:
    config = ak.BottleneckConfig(targets=["x"])
    with pytest.raises(ValueError, match="frozen"):
        config.dropout = 0.5  # type: ignore[misc]  # frozen, on purpose


@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3)])
def test_integers_of_other_libraries_are_integers(number: Any) -> None:
    config = ak.BottleneckConfig(targets=["x"], bottleneck_size=number)
    assert config == ak.BottleneckConfig(targets=["x"], bottleneck_size=3)
    assert type(config.bottleneck_size) is int
