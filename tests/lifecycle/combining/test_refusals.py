"""What cannot be combined is refused with the reason, and nothing changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

from ...hosts.tiny import PostNormBlock, Tiny


def zoo(ids: Tensor) -> ak.AdapterKit:
    kit = ak.wrap(Tiny(PostNormBlock).eval(), ids)
    at = {"targets": ["query"]}
    kit.add("lora", "lora", rank=2, **at)
    kit.add("wider", "lora", rank=3, **at)
    kit.add("biased", "lora", bias=True, **at)
    kit.add("parameter", "lora", targets=["query.weight"])
    kit.add("dora", "dora", **at)
    kit.add("gated", "lora", gating=True, **at)
    kit.add("vera", "vera", rank=4, seed=1, **at)
    kit.add("vera 2", "vera", rank=4, seed=2, **at)
    kit.add("vera 3", "vera", rank=5, seed=1, **at)
    kit.add("ia3", "ia3")
    kit.add("union", ak.Union(ak.LoRAConfig(**at), ak.BitFitConfig()))
    kit.add("union 2", ak.Union(ak.BitFitConfig(), ak.LoRAConfig(**at)))
    kit.add("relu", "pfeiffer")
    kit.add("swish", "pfeiffer", non_linearity="swish")
    kit.add("first", "pfeiffer", layers=[0])
    kit.add("houlsby", ak.BottleneckConfig(targets=["attention.out"], bottleneck_size=2))
    kit.add("houlsby 2", ak.BottleneckConfig(targets=["attention.out"], bottleneck_size=2, at="input"))
    kit.add("ia3 less", "ia3", exclude=["0.attention.key"], layers=[0])
    kit.add("ia3 more", "ia3", layers=[1])
    kit.add("nan", "lora", **at)
    next(kit.parameters("nan")).data[0, 0] = float("nan")
    kit.add("huge", "lora", dtype="float16", **at)
    for parameter in kit.parameters("huge"):
        parameter.data.fill_(6e4)
    return kit


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"name": "lora"}, ak.AdapterNameError, "already has an adapter 'lora'"),
    ({"weights": {"lora": 1, "lorra": 1}}, ak.AdapterNameError, "no adapter 'lorra'. Did you mean 'lora'"),
    ({"weights": {}}, ak.ConfigError, r"weights map the names of adapters to numbers.*found \{\}"),
    ({"weights": ["lora", "wider"]}, ak.ConfigError, r"found \['lora', 'wider'\]"),
    ({"weights": {"lora": float("nan"), "wider": 1}}, ak.ConfigError, r"a finite number; found \{'lora': nan\}"),
    ({"weights": {"lora": "1"}}, ak.ConfigError, r"a finite number; found \{'lora': '1'\}"),
    ({"weights": {"lora": True}}, ak.ConfigError, r"a finite number; found \{'lora': True\}"),
    ({"how": "cat"}, ak.ConfigError, r"how is one of \['linear', 'concatenate', 'svd'\]; found 'cat'"),
    ({"rank": 4}, ak.ConfigError, "for how='svd' alone; found rank=4 with how='concatenate'"),
    ({"rank": 0, "how": "svd"}, ak.ConfigError, "rank is a positive number.*found rank=0"),
    ({"weights": {"ia3": 2}, "how": "svd", "rank": 2}, ak.ConfigError, "rank=2 is that of a LoRA; of 'ia3' none"),
    ({"weights": {"lora": 1, "ia3": 1}}, ak.ConfigError, "'lora' is of lora, 'ia3' of ia3. To have both"),
    ({"weights": {"union": 1, "union 2": 1}}, ak.ConfigError, "'union' is of lora and bitfit, 'union 2' of bitfit and lora"),
    ({"weights": {"union": 1, "lora": 1}}, ak.ConfigError, "'union' is of lora and bitfit, 'lora' of lora"),
    ({"how": "linear"}, ak.ConfigError, r"takes one rank.*at 'blocks.0.attention.query' they are \{'lora': 2, 'wider': 3\}"),
    ({"weights": {"dora": 1, "lora": 1}}, ak.ConfigError, "'dora' is a DoRA, whose magnitudes multiply"),
    ({"weights": {"dora": 0.5}, "how": "linear"}, ak.ConfigError, "'dora' is a DoRA, whose magnitudes multiply"),
    ({"weights": {"dora": 1}, "how": "svd", "rank": 2}, ak.ConfigError, "'dora' is a DoRA"),
    ({"weights": {"gated": -1}}, ak.ConfigError, "'gated' is a gated LoRA, whose gate depends on the input"),
    ({"weights": {"vera": 0.5, "vera 2": 0.5}, "how": "linear"}, ak.ConfigError, r"frozen tensors \['shared.vera_A', 'shared"),
    ({"weights": {"vera": 0.5, "vera 3": 0.5}, "how": "linear"}, ak.ConfigError, "'vera' has rank=4 and 'vera 3' rank=5"),
    ({"weights": {"vera": -1}, "how": "linear"}, ak.ConfigError, "'vera' is not linear in its.*these sum to -1"),
    ({"weights": {"relu": 1, "swish": 1}}, ak.ConfigError, "how='concatenate' combines changes of.*'bottleneck' makes none"),
    ({"weights": {"relu": 1}, "rank": 3, "how": "svd"}, ak.ConfigError, "'bottleneck' makes none. how='linear' takes"),
    ({"weights": {"relu": 1, "swish": 1}, "how": "linear"}, ak.ConfigError, "weights that sum to 1; these sum to 2"),
    (
        {"weights": {"relu": 0.5, "swish": 0.5}, "how": "linear"},
        ak.ConfigError,
        "'relu' has non_linearity='relu' and 'swish' non_linearity='swish'",
    ),
    (
        {"weights": {"relu": 0.5, "first": 0.5}, "how": "linear"},
        ak.TargetError,
        r"'relu' and 'first' do not adapt the same sites.*they differ at \['blocks.1",
    ),
    (
        {"weights": {"houlsby": 0.5, "houlsby 2": 0.5}, "how": "linear"},
        ak.ConfigError,
        "'houlsby' has at='output' and 'houlsby 2' at='input'",
    ),
    (
        {"weights": {"biased": 1, "parameter": 1}},
        ak.ConfigError,
        r"\['biased'\] have biases, which the sum could not have at the Parameter 'blocks.0.attention.query.weight'",
    ),
    (
        {"weights": {"ia3 less": 1, "ia3 more": 1}},
        ak.TargetError,
        r"no config leads to all sites of \['ia3 less', 'ia3 more'\].*it has \['targets', 'feedforward_targets'\]",
    ),
    ({"weights": {"lora": 1, "nan": 1}}, ak.CompatibilityError, "'nan' has values that are not finite, in 'lora_A' at 'blocks.0"),
    ({"weights": {"huge": 3}}, ak.CompatibilityError, "'the sum' has values that are not finite, in 'lora_B' at 'blocks.0"),
]  # fmt: skip


def test_what_cannot_be_combined_is_refused_and_leaves_the_model_as_it_was(ids: Tensor) -> None:
    kit = zoo(ids)
    before = {key: value.clone() for key, value in kit.model.state_dict().items()}
    names, hooks = [*kit.adapters], count_hooks(kit.model)
    for changes, error, message in REFUSED:
        settings: dict[str, Any] = {"name": "sum", "weights": {"lora": 1, "wider": 1}, **changes}
        with pytest.raises(error, match=message):
            kit.combine(**settings)
        after = kit.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) or before[key].isnan().any() for key in before)
        assert ([*kit.adapters], count_hooks(kit.model)) == (names, hooks)


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_sources_of_different_tensors_or_shapes_at_one_place_are_refused(ids: Tensor) -> None:
    model = Tiny(PostNormBlock).eval()
    kit = ak.wrap(model, ids)
    kit.add("a", ak.BottleneckConfig(targets=["attention"], output=0, bottleneck_size={"default": 2}))
    kit.add("b", ak.BottleneckConfig(targets=["attention"], output=1, bottleneck_size={"default": 2}))
    kit.add("c", ak.BottleneckConfig(targets=["attention"], output=0, bottleneck_size={"default": 2}))
    model.blocks[0].attention._adapterkit.first_module("c").down_bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(ak.ConfigError, match="'a' has output=0 and 'b' output=1"):
        kit.combine("sum", {"a": 0.5, "b": 0.5}, how="linear")
    with pytest.raises(ak.ConfigError, match=r"'a' and 'c' have tensors of other shapes at 'blocks\.0\.attention'"):
        kit.combine("sum", {"a": 0.5, "c": 0.5}, how="linear")


def test_a_host_that_has_changed_between_two_adapters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["0"])
    model[0].weight = nn.Parameter(torch.randn(8, 4))
    kit.add("b", "lora", targets=["0"])
    with pytest.raises(
        ak.TargetError, match=r"at '0', 'a' and 'b' adapt different tensors: .*width=\(4, 6\).* and .*\(4, 8\)"
    ):
        kit.combine("sum", {"a": 1, "b": 1})


def test_parts_of_one_name_that_are_different_features_are_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    kit = ak.wrap(model)
    for name in "ab":
        kit.add(name, "lora", targets=["in_proj_weight"])
    for name, start in (("a", 0), ("b", 8)):
        (entry,) = model[0]._adapterkit.entries[name]
        parts = (("q", ((start, start + 8),)),)
        model[0]._adapterkit.entries[name] = (replace(entry, spec=replace(entry.spec, slices=parts)),)
    with pytest.raises(ak.TargetError, match=r"mean other features by 'q': \(\(0, 8\),\) and \(\(8, 16\),\)"):
        kit.combine("sum", {"a": 1, "b": 1})
