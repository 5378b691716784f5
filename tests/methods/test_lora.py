"""What the config of a LoRA refuses, and what it says then."""

from typing import Any

import pytest

import adapterkit as ak


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"r": 8}, r"cannot be built: no setting r; did you mean rank\? the settings are targets, exclude, layers, seed, "),
        ({"lora_alpha": 8}, r"no setting lora_alpha; did you mean alpha\?"),
        ({"lora_dropout": 0.1}, r"no setting lora_dropout; did you mean dropout\?"),
        ({"target_modules": ["q"]}, r"no setting target_modules; did you mean targets\?"),
        ({"attn_matrices": ["q"]}, r"no setting attn_matrices; did you mean targets\?"),
        ({"layers_to_transform": [0]}, r"no setting layers_to_transform; did you mean layers\?"),
        ({"exclude_modules": ["q"]}, r"no setting exclude_modules; did you mean exclude\?"),
        ({"init_lora_weights": True}, r"no setting init_lora_weights; did you mean init\?"),
        ({"init_weights": "lora"}, r"no setting init_weights; did you mean init\?"),
        ({"use_gating": True}, r"no setting use_gating; did you mean gating\?"),
        ({"leave_out": [0]}, r"no setting leave_out; layers= lists the layers to keep, not those to leave out; or name "),
        ({"rank_pattern": {}}, r"no setting rank_pattern; rank= takes a map by layer or pattern: rank=\{'default': 8, "),
        ({"alpha_pattern": {}}, r"no setting alpha_pattern; alpha= takes a map by layer or pattern: alpha=\{'default'"),
        (
            {"output_lora": True},
            r"no setting output_lora; targets= says where adapters sit: targets=\['@feedforward.last'\]",
        ),
        ({"composition_mode": "scale"}, "no setting composition_mode; scaling in place of adding is .*: ak.IA3Config"),
        ({"fan_in_fan_out": True}, "no setting fan_in_fan_out; leave it out"),
        ({"modules_to_save": ["head"]}, r"no setting modules_to_save; did you mean heads=, an argument of kit.add\?"),
        ({"ranks": 8}, r"no setting ranks; did you mean rank\?"),
        ({"colour": "red"}, "no setting colour; the settings are targets, .* init$"),
        (
            {"r": 8, "lora_alpha": 8},
            r"no setting r; did you mean rank\? no setting lora_alpha; did you mean alpha\? the sett",
        ),
    ],
)
def test_an_unknown_setting_is_named_with_the_one_that_was_meant(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        ak.LoRAConfig(**setting)


def test_a_union_says_which_setting_was_meant() -> None:
    with pytest.raises(ak.ConfigError, match=r"no member .* has a setting \['r'\]: no setting r; did you mean rank\?"):
        ak.Union(ak.LoRAConfig(), ak.BitFitConfig()).override({"r": 8})


@pytest.mark.parametrize(
    ("rank", "found"),
    [
        ("8", "rank: found '8', a str"),
        (True, "rank: found 'True', a bool"),
        (0, "rank: found '0'"),
        (2.5, "rank: found '2.5'"),
        ({"default": 8, "layer.0.**": 0}, r"rank\['layer.0.\*\*'\]: found '0'"),
        ({"1": 2}, "rank: found \"{'1': 2}\""),
    ],
)
def test_a_rank_that_is_none_is_told_what_it_may_be_in_one_sentence(rank: Any, found: str) -> None:
    may_be = "a whole number of 1 or more, or a map of them by layer or pattern, which needs a 'default': {'default': 8}"
    with pytest.raises(ak.ConfigError, match=f"^LoRAConfig cannot be built: {found}; the setting may be {may_be}$"):
        ak.LoRAConfig(rank=rank)


def test_a_saved_config_loads() -> None:
    config = ak.LoRAConfig(targets=["x"], rank={"default": 8, "1": 2}, layers=[0, -1], seed=3)
    assert ak.LoRAConfig.model_validate_json(config.model_dump_json()) == config
    assert ak.LoRAConfig(**config.model_dump(mode="json")) == config
