import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterkit as ak

configs = st.builds(
    lambda settings: ak.InvertibleConfig(**settings),
    st.fixed_dictionaries(
        {},
        optional={
            "block": st.sampled_from(["nice", "glow"]),
            "reduction_factor": st.sampled_from([0.5, 2, 3.5]),
            "non_linearity": st.sampled_from(["relu", "gelu"]),
            "targets": st.sampled_from(["wte", ("wte",), ["@embedding", "x"]]),
            "output_targets": st.sampled_from(["lm_head", (), ["@output_embedding"]]),
            "seed": st.none() | st.integers(0, 9),
        },
    ),
)


@given(configs)
def test_a_config_survives_json_pickle_and_repetition(config: ak.InvertibleConfig) -> None:
    again = ak.InvertibleConfig.model_validate_json(config.model_dump_json())
    assert again == config == pickle.loads(pickle.dumps(config))
    assert hash(again) == hash(config)


def test_defaults_are_the_papers() -> None:
    config = ak.InvertibleConfig()
    assert (config.block, config.reduction_factor, config.non_linearity) == ("nice", 2.0, "relu")
    assert (config.targets, config.output_targets) == (("@embedding",), ("@output_embedding",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": "affine"}, "block.*found 'affine'"),
        ({"reduction_factor": 0}, "reduction_factor.*found '0'"),
        ({"targets": []}, "targets.*at least 1"),
        ({"non_linearity": "rellu"}, "non_linearity.*found 'rellu'"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_found(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        ak.InvertibleConfig(**settings)
