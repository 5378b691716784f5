"""Combined adapters: what they compute, against formulas in float64; what their configs say; what is refused."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import adapterkit as ak
from adapterkit.lifecycle import attach
from adapterkit.lifecycle.build import build_modules
from adapterkit.methods import UNION_PRESETS, presets
from adapterkit.placement.layers import setting_at

from ...hosts.layers import LAYERS, layer, some_input
from ...hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise

HOWS = ["linear", "concatenate", "svd"]
EXACT = ["concatenate", "svd"]


def exact(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def modules(kit: ak.AdapterKit, name: str) -> dict[tuple[str, tuple[str, ...]], Any]:
    """An adapter's modules by host and Parameter."""
    return {
        (path, entry.spec.parameters): module
        for path, host in kit.model.named_modules()
        if "_adapterkit" in host._modules
        for entry, module in host._adapterkit.modules_of(name)
        if entry.spec is not None
    }


def deltas(kit: ak.AdapterKit, name: str) -> dict[tuple[str, tuple[str, ...]], Tensor]:
    """What an adapter adds to each weight."""
    return {key: module.weight_delta().detach() for key, module in modules(kit, name).items()}


def outputs(kit: ak.AdapterKit, name: str, x: Any) -> Tensor:
    with kit.active(name), torch.no_grad():
        found = kit.model(x)
    return found if isinstance(found, Tensor) else found[0]


def check_sum(kit: ak.AdapterKit, name: str, weights: dict[str, float]) -> None:
    """The result's change of each weight is the weighted sum of the sources' changes."""
    expected: dict[Any, Tensor] = {}
    for source, weight in weights.items():
        for key, delta in deltas(kit, source).items():
            expected[key] = expected.get(key, 0) + weight * delta
    found = deltas(kit, name)
    assert found.keys() == expected.keys()
    for key, delta in found.items():
        exact(delta, expected[key])


def check_config(kit: ak.AdapterKit, name: str) -> None:
    """The result's config leads to its sites, and to the rank and the scaling that its modules have."""
    config: Any = kit.adapters[name]
    held = modules(kit, name)
    sites = kit.sites(config)
    assert {(site.path, site.parameters) for site in sites} == held.keys()
    for site in sites:
        module = held[site.path, site.parameters]
        rank = setting_at(config.rank, site)
        assert module.low_rank.layout.slices == site.slices
        assert all(parameter.is_contiguous() for parameter in module.parameters())
        assert (module.low_rank.rank, module.lora_A.shape) == (rank, module.low_rank.a_shape)
        assert module.scaling == setting_at(config.alpha, site) / (rank**0.5 if config.use_rslora else rank)


def check_loads(kit: ak.AdapterKit, name: str, x: Any, directory: Path) -> None:
    """Saved and loaded into the bare model under another name, the result computes the same."""
    expected = outputs(kit, name, x)
    kit.save(name, directory)
    fresh = copy.deepcopy(kit.model)
    other = ak.wrap(fresh, kit.example_inputs)
    other.unwrap()
    other.load(directory, "loaded")
    assert torch.equal(outputs(other, "loaded", x), expected)
    assert other.adapters["loaded"] == kit.adapters[name]


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


# --- one adapter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("preset", [*presets(), *UNION_PRESETS])
def test_one_adapter_at_weight_one_is_the_same_to_the_bit(preset: str, how: Any, ids: Tensor, tmp_path: Path) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval(), ids)
    kit.add("a", preset, heads=["classifier"])
    randomise(kit, "a")
    with torch.no_grad():
        for parameter in kit.parameters("a", heads=True):
            parameter.add_(torch.randn_like(parameter) / 4)
    assert kit.combine("copy", {"a": 1}, how=how) == {}
    assert torch.equal(outputs(kit, "copy", ids), outputs(kit, "a", ids))
    assert kit.adapters["copy"] == kit.adapters["a"]
    check_loads(kit, "copy", ids, tmp_path)
    kit.train_adapter("copy")
    before = {key: value.clone() for key, value in kit.state_dict("a").items()}
    optimizer = torch.optim.SGD([p for p in kit.model.parameters() if p.requires_grad], lr=0.1)
    kit.model(ids).pow(2).sum().backward()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in kit.state_dict("a").items()), "they share no tensor"
    kit.remove("copy")
    assert [*kit.adapters] == ["a"]


FLAGS: list[dict[str, Any]] = [
    {"use_rslora": True, "rank": 3},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True, "alpha": 3},
    {"bias": True, "alpha": 2},
    {"gating": True},
    {"dropout": 0.5},
    {"rank": {"default": 2, "key": 5, "1": 3}, "alpha": {"default": 16, "query": 1}},
    {"init": "gaussian", "seed": 4},
    {"layers": (-1,), "exclude": ["query"]},
    {"dtype": "bfloat16"},
    {"dtype": "float64"},
]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_one_adapter_at_weight_one_is_the_same_for_every_setting(flags: dict[str, Any], how: Any, ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval())
    kit.add("a", "lora", targets=["query", "key", "up"], **flags)
    randomise(kit, "a")
    kit.combine("copy", {"a": 1.0}, how=how)
    assert torch.equal(outputs(kit, "copy", ids), outputs(kit, "a", ids))
    assert kit.adapters["copy"] == kit.adapters["a"]
    assert [p.dtype for p in kit.parameters("copy")] == [p.dtype for p in kit.parameters("a")]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("flags", [f for f in FLAGS if not {"use_dora", "gating"} & {*f}], ids=str)
def test_two_halves_of_one_adapter_are_the_same_for_every_setting(flags: dict[str, Any], how: Any, ids: Tensor) -> None:
    """Through the sums, not the copy."""
    kit = ak.wrap(Tiny(PostNormBlock).eval())
    kit.add("a", "lora", targets=["query", "key", "up"], **flags)
    randomise(kit, "a")
    kit.combine("b", {"a": 1.0}, how=how)
    kit.combine("sum", {"a": 0.75, "b": 0.25}, how="concatenate" if how == "linear" else how)
    close = {"atol": 2e-2, "rtol": 2e-2} if flags.get("dtype") == "bfloat16" else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(outputs(kit, "sum", ids), outputs(kit, "a", ids), **close)
    assert [p.dtype for p in kit.parameters("sum")] == [p.dtype for p in kit.parameters("a")]
    kit.model.train()
    assert kit.adapters["sum"].dropout == flags.get("dropout", 0.0)


# --- vera, plug-ins, fused projections --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", EXACT)
def test_veras_become_a_lora(how: Any, tmp_path: Path) -> None:
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), torch.randn(2, 3, 8)
    kit = ak.wrap(model.double().eval(), x.double())
    kit.add("a", "vera", rank=4, seed=1, dropout=0.0)
    kit.add("b", "vera", targets=["linear1", "@attention.q"], rank=2, seed=2)
    randomise(kit, "a"), randomise(kit, "b")
    weights = {"a": 1.5, "b": -1.0}
    kit.combine("sum", weights, how=how, rank=6 if how == "svd" else None)
    assert isinstance(kit.adapters["sum"], ak.LoRAConfig)
    check_sum(kit, "sum", weights)
    check_config(kit, "sum")
    check_loads(kit, "sum", x.double(), tmp_path)
    kit.combine("one", {"a": 1.0}, how="svd", rank=4)
    assert (kit.adapters["one"].method, kit.adapters["one"].rank) == ("lora", 4)
    check_sum(kit, "one", {"a": 1.0})
    kit.add("narrow", "vera", rank=2, dtype="bfloat16", dropout=0.0)
    kit.combine("minus", {"narrow": -1})
    assert kit.adapters["minus"].dtype == "bfloat16"
    assert {p.dtype for p in kit.parameters("minus")} == {torch.bfloat16}


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize(
    "targets",
    [
        (["@attention.q", "@attention.v"], ["@attention.v", "@attention.k"]),
        (["@attention.q"], ["in_proj_weight"]),
        (["@attention.v"], ["@attention.q", "linear1"]),
    ],
)
def test_parts_of_a_fused_projection_are_put_together(how: Any, targets: Any, tmp_path: Path) -> None:
    model, x = (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        torch.randn(2, 3, 8).double(),
    )
    kit = ak.wrap(model.double().eval(), x)
    for name, own, rank in zip("ab", targets, (2, 3), strict=True):
        kit.add(name, "lora", targets=own, rank=rank, alpha=5)
        randomise(kit, name)
    weights = {"a": 0.5, "b": -2.0}
    kit.combine("sum", weights, how=how, rank=8 if how == "svd" else None)
    check_sum(kit, "sum", weights)
    check_config(kit, "sum")
    check_loads(kit, "sum", x, tmp_path)


class Whole(nn.Module):
    """A plug-in's module: any change of a weight."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(shape))

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.delta.dtype

    def forward(self, z: Tensor, x: Tensor, host: Any) -> Tensor:
        return nn.functional.linear(z, self.delta)

    def weight_delta(self) -> Tensor:
        return self.delta


def test_any_method_that_tells_its_change_of_a_weight_becomes_a_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.methods.vera import VeRA

    monkeypatch.setattr(VeRA, "build", lambda self, config, site, *, host, dtype: Whole(host.weight.shape))
    monkeypatch.setattr(VeRA, "shared", lambda self, config, sites, *, dtype: nn.Identity())
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(5, 4)
    kit = ak.wrap(model)
    for name in "ab":
        kit.add(name, "vera", targets=["0", "1"], rank=9)
        randomise(kit, name)
    kit.combine("sum", {"a": 1, "b": -3}, how="svd")
    for key, delta in deltas(kit, "sum").items():
        torch.testing.assert_close(delta, deltas(kit, "a")[key] - 3 * deltas(kit, "b")[key])
    assert kit.combine("low", {"a": 1, "b": -3}, how="svd", rank=2)["0"] > 0.01
    with pytest.raises(
        ak.ConfigError, match="how='concatenate' combines changes of weights that are low-rank; 'vera' makes"
    ):
        kit.combine("c", {"a": 1, "b": 1}, how="concatenate")
    outputs(kit, "sum", x)
    grouped = ak.wrap(nn.Conv1d(4, 6, 3, groups=2).double())
    monkeypatch.setattr(Whole, "forward", lambda self, z, x, host: x)
    grouped.add("a", "vera", targets=[""], rank=6)
    randomise(grouped, "a")
    grouped.combine("sum", {"a": -2}, how="svd")
    torch.testing.assert_close(deltas(grouped, "sum")["", ()], -2 * deltas(grouped, "a")["", ()])


# --- what a combination is --------------------------------------------------------------------------------------------


def test_layers_of_several_adapters_are_put_together_on_a_fused_projection(tmp_path: Path) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3).double().eval()
    x = torch.randn(2, 3, 8).double()
    kit = ak.wrap(model, x)
    kit.add("a", "lora", layers=[0], rank=2)
    kit.add("b", "lora", layers=[-1], rank=3)
    randomise(kit, "a"), randomise(kit, "b")
    kit.combine("sum", {"a": 2, "b": -1})
    assert kit.adapters["sum"].layers == (0, -1)
    check_sum(kit, "sum", {"a": 2, "b": -1})
    check_config(kit, "sum")
    check_loads(kit, "sum", x, tmp_path)
    kit.add("c", "lora", targets=["@attention.k"], layers=[1])
    with pytest.raises(ak.TargetError, match=r"no config leads to all places of \['a', 'c'\].* parts of fused projections"):
        kit.combine("d", {"a": 1, "c": 1})


def test_places_that_no_targets_name_together_are_named_by_their_paths(tmp_path: Path, ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).double().eval())
    kit.add("a", "lora", targets=["query", "up.weight"], layers=[0], rank=2)
    kit.add("b", "lora", targets=["attention.*", "query.weight"], exclude=["out"], rank=3)
    randomise(kit, "a"), randomise(kit, "b")
    kit.combine("sum", {"a": 2, "b": -1})
    config: Any = kit.adapters["sum"]
    assert len(config.targets) == 9
    assert {"re:blocks\\.0\\.up\\.weight", "re:blocks\\.1\\.attention\\.query\\.weight"} < {*config.targets}
    check_sum(kit, "sum", {"a": 2, "b": -1})
    check_config(kit, "sum")
    check_loads(kit, "sum", ids, tmp_path)


def test_adapters_that_exclude_different_modules_are_named_by_paths() -> None:
    kit = ak.wrap(Tiny(PostNormBlock).double().eval())
    kit.add("a", "lora", targets=["attention.*"], exclude=["query"], rank=2)
    kit.add("b", "lora", targets=["query", "up"], rank=2)
    kit.add("c", "lora", targets=["attention.*"], exclude=["key", "value"], rank=2)
    for others in ("b", "c"):
        kit.combine(f"a {others}", {"a": 1, others: 2})
        check_sum(kit, f"a {others}", {"a": 1, others: 2})
        check_config(kit, f"a {others}")


def test_ia3_scales_of_parts_are_put_together(ids: Tensor) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=32)).double().eval()
    kit = ak.wrap(model)
    config = ak.IA3Config(targets=["c_attn"], feedforward_targets=())
    (site,) = kit.sites(config)
    parts = {"q": ("q", ((0, 8),)), "k": ("k", ((8, 16),)), "v": ("v", ((16, 24),))}
    for name in ("kv", "q", "qv"):  # as roles give them
        sites = [replace(site, slices=tuple(parts[part] for part in name))]
        attach.attach(model, name, config, build_modules(model, config, sites, []))
        randomise(kit, name)
    kit.add("all", config)
    randomise(kit, "all")
    kv, q, qv, whole = (next(kit.parameters(name)) - 1 for name in ("kv", "q", "qv", "all"))
    kit.combine("sum", {"kv": 1, "qv": 2})
    exact(next(kit.parameters("sum")) - 1, torch.cat([2 * qv[:8], kv[:8], kv[8:] + 2 * qv[8:]]))
    kit.combine("with the whole", {"q": -1, "all": 3})
    exact(next(kit.parameters("with the whole")) - 1, 3 * whole - torch.cat([q, torch.zeros(16)]))


def test_adapters_of_a_part_of_a_model_are_combined_where_they_are_now() -> None:
    outer = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), nn.Linear(4, 4)).double()
    whole = ak.wrap(outer)
    for name in "ab":
        whole.add(name, "lora", targets=["0.0", "0.1"], rank=2)
        randomise(whole, name)
    kit = ak.wrap(copy.deepcopy(outer[0]))
    kit.combine("sum", {"a": 2, "b": -1})
    check_sum(kit, "sum", {"a": 2, "b": -1})
    assert [entry.spec.path for layer in kit.model for entry in layer._adapterkit.entries["sum"]] == ["0", "1"]


def test_the_result_is_where_its_host_computes() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["0"])
    model[0]._hf_hook = SimpleNamespace(execution_device="meta")  # as accelerate's; no values, but a device
    kit.combine("sum", {"a": 2})
    kit.combine("copy", {"a": 1})
    assert {p.device.type for name in ("sum", "copy") for p in kit.parameters(name)} == {"meta"}


def test_the_sources_stay_and_the_result_is_not_active(ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval())
    kit.add("a", "lora", targets=["query"])
    kit.add("b", "lora", targets=["query"])
    randomise(kit, "a"), randomise(kit, "b")
    kit.train_adapter("a")
    state, before = kit.state_dict("a"), kit.model(ids)
    torch.manual_seed(5)
    noise = torch.rand(1)
    torch.manual_seed(5)
    kit.combine("sum", {"a": 1, "b": 1})
    assert torch.equal(torch.rand(1), noise), "no random number was drawn"
    assert [*kit.adapters] == ["a", "b", "sum"]
    assert torch.equal(kit.model(ids), before)
    assert all(torch.equal(state[key], value) for key, value in kit.state_dict("a").items())
    assert not any(p.requires_grad for p in kit.parameters("sum"))
    kit.train_adapter("sum")
    kit.model(ids).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in kit.parameters("sum"))
    kit.verify(ids).require()


def test_settings_that_differ_are_settled() -> None:
    kit = ak.wrap(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))
    kit.add("a", "lora", targets=["0"], dropout=0.2, dtype="bfloat16", init="gaussian", seed=1)
    kit.add("b", "lora", targets=["0", "1"], dropout=0.1, dtype="float16")
    kit.combine("sum", {"a": 1, "b": 1})
    config: Any = kit.adapters["sum"]
    assert (config.dropout, config.dtype, config.init) == (0.1, "float32", "gaussian")
    assert {p.dtype for p in modules(kit, "sum")["0", ()].parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_narrow_tensors_are_rounded_once(dtype: torch.dtype) -> None:
    kit = ak.wrap(nn.Linear(4, 6))
    for name in "ab":
        kit.add(name, "lora", targets=[""], rank=2, alpha=3, dtype=dtype)
        randomise(kit, name)
    kit.combine("sum", {"a": 0.3, "b": -0.7})
    (_, b_1), (_, b_2), (_, b) = (list(kit.parameters(name)) for name in ("a", "b", "sum"))
    expected = torch.cat([0.3 * 1.5 * b_1.double(), -0.7 * 1.5 * b_2.double()], 1).to(dtype)
    assert torch.equal(b, expected)


def test_a_union_is_combined_member_by_member(ids: Tensor, tmp_path: Path) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).double().eval(), ids)
    for name, rank in (("a", 2), ("b", 3)):
        kit.add(name, ak.Union(ak.LoRAConfig(targets=["query"], rank=rank), ak.BitFitConfig(targets=["up"])))
        randomise(kit, name)
    kit.combine("sum", {"a": 1, "b": -1})
    found: Any = kit.adapters["sum"]
    assert [(member.method, getattr(member, "rank", None)) for member in found.configs] == [("lora", 5), ("bitfit", None)]
    a, b, total = (modules(kit, name) for name in ("a", "b", "sum"))
    for key, module in total.items():
        if hasattr(module, "delta"):
            exact(module.delta, a[key].delta - b[key].delta)
        else:
            exact(module.weight_delta(), a[key].weight_delta() - b[key].weight_delta())
    check_loads(kit, "sum", ids, tmp_path)


def test_heads_are_the_models_own_and_the_weighted_differences_to_it(ids: Tensor, tmp_path: Path) -> None:
    model = Tiny(PostNormBlock).double().eval()
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["query"], heads=["classifier"])
    kit.add("b", "lora", targets=["query"], heads=["classifier"])
    kit.add("c", "lora", targets=["query"])
    with torch.no_grad():
        for name in "ab":
            for parameter in kit.parameters(name, heads=True):
                parameter.add_(torch.randn_like(parameter))
    kit.combine("sum", {"c": 1, "a": 2, "b": -0.5})
    heads = [list(kit.parameters(name, heads=True))[-2:] for name in ("a", "b", "sum")]
    own = [p for name, p in model.classifier.named_parameters() if "_adapterkit" not in name]
    for base, a, b, found in zip(own, *heads, strict=True):
        exact(found, base + 2 * (a - base) - 0.5 * (b - base))
    check_loads(kit, "sum", ids, tmp_path)
    kit.add("d", "lora", targets=["classifier"])
    randomise(kit, "d")
    kit.activate("d")
    kit.merge("d")
    kit.combine("while one is merged", {"c": 1, "a": 2, "b": -0.5})
    for one, other in zip(*(kit.parameters(name, heads=True) for name in ("sum", "while one is merged")), strict=True):
        assert torch.equal(one, other)
    kit.combine("without", {"a": 1, "b": 1}, heads=False)
    assert len(list(kit.parameters("without", heads=True))) == len(list(kit.parameters("without")))


def test_a_head_with_tied_weights_and_a_counter_is_combined_once() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.two(self.one(x)))

    model = nn.Sequential(nn.Linear(4, 4), Head()).double()
    kit = ak.wrap(model)
    for name in "ab":
        kit.add(name, "lora", targets=["0"], heads=["1"])
    own = model[1].one.weight
    for index, name in enumerate("ab"):
        head: Any = model[1]._adapterkit.first_module(name)
        with torch.no_grad():
            head.one.weight.add_(index + 1.0)
            head.norm.running_mean.add_(index + 1.0)
            head.norm.num_batches_tracked.add_(7 + index)
    kit.combine("sum", {"a": 3, "b": -1})
    found: Any = model[1]._adapterkit.first_module("sum")
    assert found.two.weight is found.one.weight
    exact(found.one.weight, own + 1.0)
    exact(found.norm.running_mean, torch.ones(4).double())
    assert found.norm.num_batches_tracked == 7


def test_parts_that_roles_find_in_gpt2_are_put_together(tmp_path: Path, ids: Tensor) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=32)).double().eval()
    kit = ak.wrap(model, ids)
    kit.add("a", "lora", rank=2)
    kit.add("b", "lora", targets=["@attention.v", "@attention.k", "@feedforward.last"], rank=3, alpha=1)
    kit.add("c", "ia3")
    kit.add("d", "ia3", targets=["@attention.q"])
    for name in "abcd":
        randomise(kit, name)
    kit.combine("sum", {"a": 1.0, "b": -0.5})
    check_sum(kit, "sum", {"a": 1.0, "b": -0.5})
    check_config(kit, "sum")
    check_loads(kit, "sum", ids, tmp_path / "lora")
    kit.combine("scales", {"c": 1.0, "d": -0.5})
    sites = {(site.path, site.tag): site.slices for site in kit.sites(kit.adapters["scales"])}
    assert [name for name, _ in sites["transformer.h.0.attn.c_attn", "output"]] == ["q", "k", "v"]
    check_loads(kit, "scales", ids, tmp_path / "ia3")


@pytest.mark.parametrize("how", EXACT)
def test_a_sum_can_be_merged(how: Any, ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PreNormBlock).double().eval(), ids)
    for name in "ab":
        kit.add(name, "lora", rank=2, bias=True)
        randomise(kit, name)
    kit.combine("sum", {"a": 1.0, "b": -0.5}, how=how)
    expected = outputs(kit, "sum", ids)
    kit.activate("sum")
    kit.merge("sum")
    exact(kit.model(ids).detach(), expected)


def test_gpt2_has_a_sum_that_loads(tmp_path: Path, ids: Tensor) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=32)).double().eval()
    kit = ak.wrap(model, ids)
    for name, rank in (("a", 2), ("b", 3)):
        kit.add(name, "lora", targets=["c_attn", "c_proj"], rank=rank)
        randomise(kit, name)
    kit.combine("sum", {"a": 1.0, "b": -0.5})
    check_sum(kit, "sum", {"a": 1.0, "b": -0.5})
    check_config(kit, "sum")
    check_loads(kit, "sum", ids, tmp_path)


# --- refusals ---------------------------------------------------------------------------------------------------------


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
        r"'relu' and 'first' do not sit at the same places.*they differ at \['blocks.1",
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
        r"no config leads to all places of \['ia3 less', 'ia3 more'\].*it has \['targets', 'feedforward_targets'\]",
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


def test_a_head_and_a_site_in_it_are_refused(ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval())
    kit.add("a", "lora", targets=["query"], heads=["classifier"])
    kit.add("b", "lora", targets=["query", "classifier"])
    with pytest.raises(ak.TargetError, match=r"\['classifier'\] lie inside the head 'classifier'"):
        kit.combine("sum", {"a": 1, "b": 1})
    assert [*kit.adapters] == ["a", "b"]
    kit.combine("sum", {"a": 1, "b": 1}, heads=False)


def test_new_heads_are_copied_from_their_only_owner_and_averaged_where_there_are_several(
    ids: Tensor, tmp_path: Path
) -> None:
    class Encoder(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            return x

    kit = ak.wrap(Encoder(PostNormBlock).double().eval(), ids)
    tags, classes = ak.TaggingHead(("O", "B")), ak.ClassificationHead(num_labels=3, seed=1)
    for name, heads in {
        "a": [tags, classes],
        "b": [ak.ClassificationHead(num_labels=3, seed=2)],
        "c": [ak.TaggingHead(("O", "C"))],
    }.items():
        kit.add(name, "lora", targets=["query"], heads=heads)
    kit.combine("mean", {"a": 0.25, "b": 0.75})
    a, b, mean = (
        {entry.head.config.name: module for entry, module in kit.model._adapterkit.modules_of(name)}
        for name in ("a", "b", "mean")
    )
    for key, tensor in mean["tagging"].state_dict().items():
        assert torch.equal(tensor, a["tagging"].state_dict()[key])
    assert mean["tagging"].layers.last.weight is not a["tagging"].layers.last.weight
    for key, tensor in mean["classification"].state_dict().items():
        exact(tensor, 0.25 * a["classification"].state_dict()[key] + 0.75 * b["classification"].state_dict()[key])
    kit.activate("mean")
    found = kit.model(ids)
    kit.save("mean", tmp_path)
    kit.remove("mean")
    kit.activate(kit.load(tmp_path))
    assert torch.equal(kit.model(ids).heads["classification"], found.heads["classification"])
    for weights, message in (
        ({"a": 1, "b": 1}, r"the heads 'classification' of \['a', 'b'\] are no copies .* but the weights sum to 2"),
        ({"a": 0.5, "c": 0.5}, r"the heads 'tagging' of \['a', 'c'\] .* but they have other settings or shapes"),
    ):
        with pytest.raises(ak.ConfigError, match=message):
            kit.combine("sum", weights)
    kit.combine("sum", {"a": 1, "b": 1}, heads=False)


def test_copies_of_one_head_for_other_labels_are_not_summed(ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock), ids)
    for name, labels in (("a", ("x", "y", "z")), ("b", ("z", "y", "x"))):
        kit.add(name, "lora", targets=["query"], heads=ak.OwnHead("classifier", labels=labels))
    with pytest.raises(ak.ConfigError, match=r"the heads 'classifier' of \['a', 'b'\] have other labels"):
        kit.combine("sum", {"a": 0.5, "b": 0.5})
