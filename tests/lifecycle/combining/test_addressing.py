"""Adapters at different sites, or at parts of a fused projection, are combined; the config leads to all of their sites."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import adapterkit as ak
from adapterkit.lifecycle import attach
from adapterkit.lifecycle.build import build_modules

from ...hosts.tiny import PostNormBlock, Tiny, randomise
from .helpers import EXACT, check_config, check_loads, check_sum, exact


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
    with pytest.raises(ak.TargetError, match=r"no config leads to all sites of \['a', 'c'\].* parts of fused projections"):
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
        attach.attach(model, name, config, build_modules(model, config, sites))
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
