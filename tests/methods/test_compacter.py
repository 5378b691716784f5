"""What is the Compacter's own; the laws of every method are in test_every_method."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkit as ak

from ..hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise
from ..strategies import options, per_layer

IDS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))


def site_paths(kit: ak.AdapterKit, preset: str) -> list[str]:
    return [site.path for site in kit.sites(preset)]


@pytest.mark.parametrize("block", [PostNormBlock, PreNormBlock])
def test_the_presets_have_the_places_of_houlsby_and_pfeiffer(block: type[nn.Module]) -> None:
    kit = ak.wrap(Tiny(block).eval(), IDS)
    assert site_paths(kit, "compacter") == site_paths(kit, "houlsby")
    assert site_paths(kit, "compacter++") == site_paths(kit, "pfeiffer")


def test_there_is_one_rule_and_it_is_counted_once() -> None:
    kit = ak.wrap(Tiny(PreNormBlock).eval(), IDS)
    kit.add("a", "compacter", phm_dim=2, bottleneck_size=4)
    names = [name for name, _ in kit.named_parameters("a")]
    assert sum("rule" in name for name in names) == 1
    # the rule; at each of 4 sites of width 8 the factors of both projections and their biases
    assert sum(p.numel() for p in kit.parameters("a")) == 2**3 + 4 * (2 * (4 + 2) + 4 + 2 * (2 + 4) + 8)


def test_the_reduction_factor_is_32_and_the_width_rounded_up() -> None:
    model = nn.Sequential(nn.Linear(320, 320), nn.Linear(320, 96))
    kit = ak.wrap(model)
    kit.add("a", ak.CompacterConfig(targets=["0", "1"]))
    biases = [p.numel() for name, p in kit.named_parameters("a") if name.endswith("down_bias")]
    assert biases == [12, 4]  # 320 / 32 = 10 and 96 / 32 = 3, to multiples of 4


@pytest.mark.parametrize("settings", [{"shared_rule": False}, {"shared_factors": True}, {"phm_rank": None}])
def test_other_ways_of_sharing_save_and_load(settings: dict[str, object], tmp_path: Path) -> None:
    first, second = Tiny(PostNormBlock).eval(), Tiny(PostNormBlock).eval()
    second.load_state_dict(first.state_dict())
    kit = ak.wrap(first, IDS)
    kit.add("a", "compacter", **settings)
    randomise(kit, "a")
    kit.activate("a")
    kit.save("a", tmp_path)
    other = ak.wrap(second, IDS)
    other.activate(other.load(tmp_path))
    assert torch.equal(second(IDS), first(IDS))


def test_shared_factors_are_those_of_every_site() -> None:
    kit = ak.wrap(Tiny(PreNormBlock).eval(), IDS)
    kit.add("a", "compacter", shared_factors=True, bottleneck_size=4)
    names = [name for name, _ in kit.named_parameters("a")]
    assert sum(name.endswith(("_left", "_right")) for name in names) == 4
    assert sum(name.endswith("_bias") for name in names) == 2 * 4


def test_shared_factors_at_sites_of_other_widths_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    kit = ak.wrap(model)
    config = ak.CompacterConfig(targets=["0", "1"], shared_factors=True, bottleneck_size=4)
    with pytest.raises(ak.ConfigError, match=r"same widths at every site; found 8 -> 4 -> 8 at '0', 4 -> 4 -> 4 at '1'"):
        kit.add("a", config)
    assert not kit.adapters


def test_images_are_adapted_on_their_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU())
    x = torch.randn(2, 3, 6, 6)
    base = model(x)
    kit = ak.wrap(model, x)
    kit.add("a", ak.CompacterConfig(targets=["0"]))
    kit.activate("a")
    assert torch.equal(model(x), base)
    randomise(kit, "a")
    adapted: Tensor = model(x)
    assert adapted.shape == base.shape
    assert not torch.allclose(adapted, base)


# --- the config -------------------------------------------------------------------------------------------------------

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
        ({"bottleneck_size": 3, "reduction_factor": 2}, "not both; found .*bottleneck_size=3"),
        ({"at": "input", "placement": "parallel"}, "found at='input'"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_found(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        ak.CompacterConfig(targets=["x"], **settings)
