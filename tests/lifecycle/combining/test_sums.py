"""Combined adapters compute the sum of what the single ones add, against formulas in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.placement.layers import setting_at

from ...hosts.layers import LAYERS, layer, some_input
from ...hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise
from .helpers import HOWS, check_config, check_loads, check_sum, deltas, exact, modules, outputs


class Model(nn.Module):
    """One layer of each kind that has a weight, in float64, each on its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: layer(name) for name in LAYERS})
        self.experts = nn.Parameter(torch.randn(2, 5, 3))
        self.double()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        found = [self.layers[name](inputs[name]).flatten() for name in LAYERS]
        return torch.cat([*found, torch.einsum("eoi,ti->eot", self.experts, inputs["experts"]).flatten()])


@pytest.fixture
def every() -> tuple[ak.AdapterKit, dict[str, Tensor]]:
    model = Model()
    inputs = {name: some_input(model.layers[name]) for name in LAYERS}
    return ak.wrap(model), inputs | {"experts": torch.randn(4, 3).double()}


EVERY = [*(f"layers.{name}" for name in LAYERS), "experts"]


def mixed(kit: ak.AdapterKit) -> dict[str, float]:
    """Three LoRAs that differ in rank, alpha, their kind of scaling and their places, with weights."""
    kit.add("a", "lora", targets=EVERY, rank={"default": 3, "conv1d": 1}, alpha=5)
    kit.add("b", "lora", targets=EVERY, rank=2, alpha={"default": 1, "re:layers.linear": 7}, use_rslora=True)
    kit.add("c", "lora", targets=["layers.*"], exclude=["conv3d", "embedding"], rank=4)
    for name in "abc":
        randomise(kit, name)
    return {"a": 1.0, "b": -0.5, "c": 2.0}


# --- exact sums -------------------------------------------------------------------------------------------------------


def test_a_concatenation_is_the_exact_sum_at_every_kind_of_weight(every: Any, tmp_path: Path) -> None:
    kit, inputs = every
    weights = mixed(kit)
    assert kit.combine("sum", weights, how="concatenate") == {}
    check_sum(kit, "sum", weights)
    check_config(kit, "sum")
    assert setting_at(kit.adapters["sum"].rank, next(s for s in kit.sites("lora", targets=["linear"]))) == 3 + 2 + 4
    changed = deltas(kit, "sum")
    tensors = dict(kit.model.named_parameters())
    new = {
        name: tensors[name] + changed[key]
        for key in changed
        for name in [f"{key[0]}.{key[1][0] if key[1] else 'weight'}".lstrip(".")]
    }
    exact(outputs(kit, "sum", inputs), torch.func.functional_call(kit.model, new, (inputs,)))
    check_loads(kit, "sum", inputs, tmp_path)


def test_a_reduction_of_enough_rank_is_the_exact_sum(every: Any, tmp_path: Path) -> None:
    kit, inputs = every
    weights = mixed(kit)
    errors = kit.combine("sum", weights, how="svd", rank=9)
    assert {*errors.values()} <= {0.0} | {e for e in errors.values() if e < 1e-12}
    assert errors.keys() == {*(f"layers.{name}" for name in LAYERS), "experts"}
    check_sum(kit, "sum", weights)
    check_config(kit, "sum")
    check_loads(kit, "sum", inputs, tmp_path)


def test_a_reduction_is_as_near_as_its_rank_allows_and_says_how_near() -> None:
    model = nn.Linear(7, 6).double()
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=[""], rank=3)
    kit.add("b", "lora", targets=[""], rank=2)
    randomise(kit, "a"), randomise(kit, "b")
    total = 0.5 * deltas(kit, "a")["", ()] - 2 * deltas(kit, "b")["", ()]
    values = torch.linalg.svdvals(total)
    for rank in (None, 1, 2, 4, 5, 20):
        errors = kit.combine(f"rank {rank}", {"a": 0.5, "b": -2}, how="svd", rank=rank)
        found, used = deltas(kit, f"rank {rank}")["", ()], rank or 3
        exact((found - total).norm(), values[used:].norm())
        assert errors[""] == pytest.approx(float(values[used:].norm() / total.norm()), abs=1e-12)
        assert (kit.adapters[f"rank {rank}"].rank, kit.adapters[f"rank {rank}"].alpha) == (used, used)


numbers = st.floats(-2, 2, allow_nan=False)
loras = st.fixed_dictionaries(
    {
        "targets": st.lists(st.sampled_from(["1", "2", "4", "4.weight"]), min_size=1, unique=True),
        "rank": st.integers(1, 5) | st.fixed_dictionaries({"default": st.integers(1, 4), "**": st.integers(1, 4)}),
        "alpha": st.floats(0.25, 8) | st.fixed_dictionaries({"default": st.floats(1, 4)}),
        "use_rslora": st.booleans(),
    }
)


@given(st.lists(st.tuples(loras, numbers), min_size=1, max_size=3), st.sampled_from(HOWS), st.integers(1, 20))
def test_whatever_is_combined_is_the_sum_and_has_an_honest_config(sources: Any, how: Any, rank: int) -> None:
    layers = [nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)]
    kit = ak.wrap(nn.Sequential(*layers).double())
    weights = {}
    for index, (settings, weight) in enumerate(sources):
        kit.add(f"{index}", "lora", **settings)
        randomise(kit, f"{index}")
        weights[f"{index}"] = weight
    if how == "linear" and len(sources) > 1:
        return
    kit.combine("sum", weights, how=how, rank=max(rank, 15) if how == "svd" else None)
    check_sum(kit, "sum", weights)
    check_config(kit, "sum")


@pytest.mark.parametrize("how", HOWS)
def test_an_adapter_and_its_negation_give_the_base(every: Any, how: Any) -> None:
    kit, inputs = every
    mixed(kit)
    kit.combine("minus", {"a": -1}, how=how)
    check_sum(kit, "minus", {"a": -1.0})
    kit.combine("nothing", {"a": 1, "minus": 1}, how=how)
    base = kit.model(inputs)
    exact(outputs(kit, "nothing", inputs), base)
    assert not torch.allclose(outputs(kit, "minus", inputs), base)


@pytest.mark.parametrize("how", HOWS)
def test_biases_of_loras_are_summed_exactly(how: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double(), torch.randn(5, 4).double()
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["0", "1"], rank=2, alpha=3, bias=True)
    kit.add("b", "lora", targets=["0"], rank=2, alpha=5, use_rslora=True, bias=True)
    kit.add("c", "lora", targets=["0", "1"], rank=2, alpha=3)
    for name in "abc":
        randomise(kit, name)
    weights = {"a": 2.0, "b": -0.5, "c": 1.0}
    kit.combine("sum", weights, how=how, rank=6 if how == "svd" else None)
    bias = model[0].bias + 2.0 * 1.5 * modules(kit, "a")["0", ()].lora_bias
    bias = bias - 0.5 * 5 / 2**0.5 * modules(kit, "b")["0", ()].lora_bias
    last = model[1].bias + 2.0 * 1.5 * modules(kit, "a")["1", ()].lora_bias
    changed = deltas(kit, "sum")
    hidden = x @ (model[0].weight + changed["0", ()]).T + bias
    exact(outputs(kit, "sum", x), hidden @ (model[1].weight + changed["1", ()]).T + last)
    if how != "linear":
        check_sum(kit, "sum", weights)


@pytest.mark.parametrize("how", HOWS)
def test_biases_of_loras_that_are_scaled_alike_are_summed_exactly(how: Any) -> None:
    model, x = nn.Linear(4, 6).double(), torch.randn(5, 4).double()
    kit = ak.wrap(model)
    for name in "ab":
        kit.add(name, "lora", targets=[""], rank=2, alpha=3, bias=True)
        randomise(kit, name)
    kit.combine("sum", {"a": 2.0, "b": -0.5}, how=how, rank=4 if how == "svd" else None)
    (_, _, one), (_, _, other) = (list(kit.parameters(name)) for name in "ab")
    bias = model.bias + 1.5 * (2.0 * one - 0.5 * other)
    exact(outputs(kit, "sum", x), x @ (model.weight + deltas(kit, "sum")["", ()]).T + bias)


# --- linear -----------------------------------------------------------------------------------------------------------


def test_factors_are_added_with_the_roots_of_the_weights() -> None:
    kit = ak.wrap(nn.Linear(4, 6).double())
    kit.add("a", "lora", targets=[""], rank=2, alpha=3)
    kit.add("b", "lora", targets=[""], rank=2, alpha=8)
    randomise(kit, "a"), randomise(kit, "b")
    errors = kit.combine("sum", {"a": 0.25, "b": -4.0}, how="linear")
    (a_1, b_1), (a_2, b_2), (a, b) = (list(kit.parameters(name)) for name in ("a", "b", "sum"))
    config: Any = kit.adapters["sum"]
    exact(a, 0.5 * a_1 + 2.0 * a_2)
    exact(config.alpha / config.rank * b, 0.5 * 1.5 * b_1 - 2.0 * 4.0 * b_2)
    wanted = 0.25 * deltas(kit, "a")["", ()] - 4.0 * deltas(kit, "b")["", ()]
    # What is more than the sum: one's A times the other's B.
    cross = 0.5 * 2.0 * (1.5 * b_1 @ a_2 - 4.0 * b_2 @ a_1)
    exact(deltas(kit, "sum")["", ()], wanted + cross)
    assert errors[""] == pytest.approx(float((cross.norm() / wanted.norm()).detach()))


@pytest.mark.parametrize("other", [{"alpha": 6}, {"alpha": 3, "use_rslora": True}])
def test_factors_of_other_scalings_are_added_where_the_first_adapter_has_none(other: dict[str, Any]) -> None:
    kit = ak.wrap(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)).double())
    kit.add("a", "lora", targets=["0"], rank=2, alpha=3)
    kit.add("b", "lora", targets=["1"], rank=2, **other)
    randomise(kit, "a"), randomise(kit, "b")
    kit.combine("sum", {"a": 3, "b": -2}, how="linear")
    check_sum(kit, "sum", {"a": 3, "b": -2})
    check_config(kit, "sum")


def test_factors_of_one_scaling_keep_it() -> None:
    kit = ak.wrap(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))
    for name in "ab":
        kit.add(name, "lora", targets=["0", "1"], rank={"default": 2, "1": 3}, alpha=8, use_rslora=True, dropout=0.1)
    kit.combine("sum", {"a": 0.5, "b": 0.5}, how="linear")
    assert kit.adapters["sum"] == kit.adapters["a"]


@pytest.mark.parametrize("how", HOWS)
def test_methods_that_are_linear_in_their_parameters_are_summed_exactly(how: Any, ids: Tensor, tmp_path: Path) -> None:
    model = Tiny(PostNormBlock).double().eval()
    kit = ak.wrap(model, ids)
    parts = [
        ak.BitFitConfig(targets=["attention.out", "up"]),
        ak.NormTuningConfig(targets=["norm_1"]),
        ak.IA3Config(targets=["key", "value"], feedforward_targets=["down"]),
    ]
    kit.add("a", ak.Union(*parts))
    kit.add("b", ak.Union(parts[0].override({"targets": ["up", "down"]}), parts[1], parts[2].override({"layers": (0,)})))
    kit.add("c", ak.Union(parts[0].override({"exclude": ["0.up.bias"]}), parts[1].override({"layers": (1,)}), parts[2]))
    for name in "abc":
        randomise(kit, name)
    weights = {"a": 0.5, "b": -2.0, "c": 1.5}
    assert kit.combine("sum", weights, how=how) == {}
    held = {name: modules_by_key(kit, name) for name in ("a", "b", "c", "sum")}
    assert held["sum"].keys() == held["a"].keys() | held["b"].keys() | held["c"].keys()
    for key, parameter in held["sum"].items():
        neutral = 1.0 if key[-1] == "ia3_l" else 0.0
        expected = torch.full_like(parameter, neutral)
        for name, weight in weights.items():
            if key in held[name]:
                expected += weight * (held[name][key] - neutral)
        exact(parameter, expected)
    sites = kit.sites(kit.adapters["sum"])
    assert {(site.path, site.tag, site.parameters) for site in sites} == {key[:3] for key in held["sum"]}
    check_loads(kit, "sum", ids, tmp_path)


def modules_by_key(kit: ak.AdapterKit, name: str) -> dict[tuple[Any, ...], Tensor]:
    """An adapter's parameters by host, tag, Parameter and their own name."""
    return {
        (path, entry.spec.tag, entry.spec.parameters, key): parameter.detach()
        for path, host in kit.model.named_modules()
        if "_adapterkit" in host._modules
        for entry, module in host._adapterkit.modules_of(name)
        for key, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("preset", ["pfeiffer", "parallel", "adapter_plus", "compacter", "madx", "vera"])
def test_other_methods_take_the_mean_of_parameters(preset: str, ids: Tensor, tmp_path: Path) -> None:
    model = Tiny(PreNormBlock).double().eval()
    kit = ak.wrap(model, ids)
    for name in "ab":
        kit.add(name, preset, seed=3)
        randomise(kit, name)
    kit.combine("mean", {"a": 1.25, "b": -0.25}, how="linear")
    for one, other, mean in zip(*(kit.parameters(name) for name in ("a", "b", "mean")), strict=True):
        exact(mean, 1.25 * one - 0.25 * other)
    if preset == "vera":
        frozen = [modules(kit, name)["blocks.0.attention.query", ()].shared.vera_A for name in ("a", "mean")]
        assert torch.equal(*frozen)
    assert kit.adapters["mean"] == kit.adapters["a"]
    check_loads(kit, "mean", ids, tmp_path)
