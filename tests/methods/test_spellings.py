"""Names of methods that other libraries have."""

import pytest
from torch import nn

import adapterkit as ak
from adapterkit.methods import all_methods, presets
from adapterkit.methods.not_built import _NOT_BUILT, why_not_built


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning", "ptuning", "p-tuning", "loreft", "AdaLoRA"])
def test_a_known_method_that_is_not_built_is_said_to_be_so(name: str) -> None:
    with pytest.raises(ak.ConfigError, match=f"^'{name}' is not built yet; the presets are bitfit, pfeiffer, "):
        ak.wrap(nn.Linear(2, 2)).add("a", name)


@pytest.mark.parametrize("name", ["unipelt", "mam"])
def test_a_union_with_prefixes_is_said_to_need_them(name: str) -> None:
    with pytest.raises(ak.ConfigError, match=f"^'{name}' has prefix tuning in it, which is not built yet; ak.Union"):
        ak.wrap(nn.Linear(2, 2)).add("a", name)


def test_a_method_with_another_name_here_is_told_it() -> None:
    with pytest.raises(ak.ConfigError, match=r"^'ln_tuning' is called 'norm_tuning' here; the presets are"):
        ak.wrap(nn.Linear(2, 2)).add("a", "ln_tuning")


def test_a_mapping_with_such_a_method_says_it_as_well() -> None:
    with pytest.raises(ak.ConfigError, match="found 'prompt_tuning'; 'prompt_tuning' is not built yet"):
        ak.wrap(nn.Linear(2, 2)).add("a", {"method": "prompt_tuning"})


def test_no_name_that_is_built_is_said_not_to_be() -> None:
    assert not [name for name in (*all_methods(), *presets()) if why_not_built(name)]
    assert not [name for name in ("dense", "colour", 3, None) if why_not_built(name)]
    assert all(name == name.lower().replace("-", "_") for name in _NOT_BUILT)
