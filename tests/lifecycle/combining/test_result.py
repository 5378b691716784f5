"""The adapter that a combination makes: its config, dtype and device, and what it may be used for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.methods import UNION_PRESETS, presets

from ...hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise
from .helpers import EXACT, HOWS, check_config, check_loads, check_sum, deltas, exact, modules, outputs


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
