import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterkit as ak

from ..strategies import options, per_layer

configs = st.builds(
    lambda rest, own, size: ak.CompacterConfig(
        targets=["x"], **{key: value for key, value in rest.items() if key != "init"}, **own, **size
    ),
    options,
    st.fixed_dictionaries(
        {},
        optional={
            "phm_dim": st.integers(1, 8),
            "phm_rank": st.none() | st.integers(1, 4),
            "shared_rule": st.booleans(),
            "shared_factors": st.booleans(),
            "init": st.sampled_from(["lora", "compacter"]),
        },
    ),
    st.fixed_dictionaries({"bottleneck_size": per_layer(st.integers(1, 5))}) | st.just({}),
)


@given(configs)
def test_a_config_survives_json_pickle_and_repetition(config: ak.CompacterConfig) -> None:
    again = ak.CompacterConfig.model_validate_json(config.model_dump_json())
    assert again == config == pickle.loads(pickle.dumps(config))
    assert hash(again) == hash(config)


def test_defaults_are_the_papers() -> None:
    config = ak.CompacterConfig(targets=["x"])
    assert (config.phm_dim, config.phm_rank, config.shared_rule, config.shared_factors) == (4, 1, True, False)
    assert (config.non_linearity, config.default_reduction_factor) == ("gelu", 32.0)
    assert ak.BottleneckConfig.default_reduction_factor == 16.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phm_dim": 0}, "phm_dim.*found '0'"),
        ({"phm_dim": 257}, "phm_dim.*found '257'"),
        ({"phm_rank": 0}, "phm_rank.*found '0'"),
        ({"init": "bert"}, "init.*found 'bert'"),
        ({"method": "bottleneck"}, "method.*found 'bottleneck'"),
        ({"bottleneck_size": 3, "reduction_factor": 2}, "not both"),
        ({"at": "input", "placement": "parallel"}, "found at='input'"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_found(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        ak.CompacterConfig(targets=["x"], **settings)
