"""AdapterFusion: the attention over adapters, trained, saved, read, drawn and pruned."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.nn.fusion import Fusion

from ..hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [0, 2, 4, 6, 8]])


def wrapped(block: type[nn.Module] = PostNormBlock, methods: str = "pfeiffer") -> ak.AdapterKit:
    """A tiny model with adapters a, b, c that do something, and the fusion a,b."""
    torch.manual_seed(0)
    kit = ak.wrap(Tiny(block).eval(), IDS)
    settings = {"bottleneck_size": 3} if methods == "pfeiffer" else {}
    for name in "abc":
        kit.add(name, methods, **settings)
        randomise(kit, name)
    kit.add_fusion(ak.Fuse("a", "b"))
    randomise(kit, "a,b")
    return kit


def test_a_fusion_of_pfeiffer_adapters_is_the_formula_of_the_paper() -> None:
    """With keys, values and scores of every child apart, as it is written there."""
    kit = wrapped()
    entered: list[Tensor] = []
    with kit.model.blocks[0].norm_2.register_forward_pre_hook(lambda _m, args: entered.append(args[0]), prepend=True):
        kit.activate(ak.Fuse("a", "b"))
        seen: list[Tensor] = []
        with kit.model.blocks[0].norm_2.register_forward_hook(lambda _m, _a, out: seen.append(out)):
            kit.model(IDS)
    s, norm = entered[0], kit.model.blocks[0].norm_2
    p = {key.rpartition(".")[2]: value for key, value in kit.named_parameters("a,b") if "blocks.0" in key}
    z = F.layer_norm(s, (8,), norm.weight, norm.bias)
    site = norm._modules["_adapterkit"]
    u = torch.stack([site.first_module(name)(z, s) for name in "ab"], dim=-2)
    keys = u @ p["key_weight"].T + 0.7  # a bias of the keys adds the same to every score
    scores = (keys * F.linear(z, p["query_weight"], p["query_bias"]).unsqueeze(-2)).sum(-1)
    values = u @ p["value_weight"].T
    y = F.layer_norm(s + (scores.softmax(-1).unsqueeze(-1) * values).sum(-2), (8,), norm.weight, norm.bias)
    torch.testing.assert_close(seen[0], y)


@pytest.mark.parametrize(
    "options",
    [
        {"query": False},
        {"key": False},
        {"value": False},
        {"residual_before": True},
        {"temperature": 5.0},
        {"dropout": 0.5},
        {"query": False, "key": False, "value": False},
    ],
)
def test_every_option_of_the_module_has_its_effect(options: dict[str, Any]) -> None:
    module = Fusion(4, **options).train()
    p = {"query_weight": None, "query_bias": None, "key_weight": None, "value_weight": None}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            p[name] = parameter.copy_(torch.randn(parameter.shape))
    q, u, x = torch.randn(2, 3, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4)
    query = q if p["query_weight"] is None else F.linear(q, p["query_weight"], p["query_bias"])
    keys = u if p["key_weight"] is None else u @ p["key_weight"].T
    attention = ((keys * query.unsqueeze(-2)).sum(-1) / options.get("temperature", 1)).softmax(-1)
    torch.manual_seed(1)
    weights = F.dropout(attention, options.get("dropout", 0.0), training=True)
    values = u + x.unsqueeze(-2) if "residual_before" in options else u
    values = values if p["value_weight"] is None else values @ p["value_weight"].T
    expected = (weights.unsqueeze(-1) * values).sum(-2) - (x if "residual_before" in options else 0)
    torch.manual_seed(1)
    added, seen = module(q, u, x)
    torch.testing.assert_close(added, expected)
    torch.testing.assert_close(seen, attention)


def test_a_query_may_read_the_site_and_not_what_the_adapters_read() -> None:
    kit = wrapped()
    kit.add_fusion(ak.Fuse("a", "b", name="site"), query_reads="site", seed=1)
    kit.add_fusion(ak.Fuse("a", "b", name="adapter"), query_reads="adapter", seed=1)
    for (_, one), (_, other) in zip(kit.named_parameters("site"), kit.named_parameters("adapter"), strict=True):
        assert torch.equal(one, other)
    randomise(kit, "site")
    with torch.no_grad():
        for one, other in zip(kit.parameters("site"), kit.parameters("adapter"), strict=True):
            other.copy_(one)
    with kit.active("site"):
        there = kit.model(IDS)
    with kit.active("adapter"):
        assert not torch.allclose(kit.model(IDS), there)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value": False}, "value=False has no Wv to regularise"),
        ({"temperature_step": 0.1}, r"lowers a temperature above 1; found temperature=1.0"),
        ({"droput": 0.1}, "droput"),
        ({"dropout": 1.0}, "dropout"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        ak.FusionConfig(**settings)


def test_training_a_fusion_moves_it_and_its_head_and_nothing_else() -> None:
    kit = wrapped()
    kit.add_fusion(ak.Fuse("a", "b", name="f"), heads=["classifier"])
    kit.train_fusion("f")
    open_ones = {name for name, p in kit.model.named_parameters() if p.requires_grad}
    assert open_ones == {name for name, _ in kit.named_parameters("f", heads=True)}
    before = {name: tensor.clone() for name, tensor in kit.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in kit.model.parameters() if p.requires_grad], lr=0.5)
    (kit.model(IDS).square().sum() + kit.fusion_loss()).backward()
    optimizer.step()
    moved = {name for name, tensor in kit.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == open_ones
    kit.verify(IDS, optimizer=optimizer).require()


def test_the_regularisation_is_the_weighted_squared_distance_of_the_values_to_the_identity() -> None:
    kit = wrapped()
    kit.add_fusion(ak.Fuse("a", "c"), regularization=0.5)
    assert kit.fusion_loss().item() == pytest.approx(
        sum(0.01 * (w - torch.eye(8)).square().sum().item() for n, w in kit.named_parameters("a,b") if "value" in n),
        rel=1e-5,
    )
    kit.remove("a,b")
    assert kit.fusion_loss() == 0, "a new fusion's values are the identity"
    with torch.no_grad():
        next(p for n, p in kit.named_parameters("a,c") if "value" in n).add_(1)
    assert kit.fusion_loss().item() == pytest.approx(0.5 * 64)
    kit.fusion_loss().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in kit.parameters("a,c")) == 1


def test_the_temperature_falls_to_one_when_told_and_is_saved(tmp_path: Path) -> None:
    kit = wrapped()
    kit.add_fusion(ak.Fuse("a", "b", name="warm"), temperature=1.5, temperature_step=0.3)
    kit.activate("warm")
    outputs = [kit.model(IDS), kit.model(IDS)]
    assert torch.equal(*outputs), "a forward changes nothing"
    kit.anneal_fusion("warm")
    assert not torch.equal(kit.model(IDS), outputs[0])
    kit.save("warm", tmp_path)
    fresh = wrapped()
    fresh.activate(fresh.load(tmp_path))
    assert torch.equal(fresh.model(IDS), kit.model(IDS))
    kit.anneal_fusion("warm")
    kit.anneal_fusion("warm")
    assert {float(b) for n, b in kit.model.named_buffers() if "warm" in n} == {1.0}


@pytest.mark.parametrize("block", [PostNormBlock, PreNormBlock])
@pytest.mark.parametrize("methods", ["pfeiffer", "houlsby", "parallel", "lora", "dora", "ia3", "compacter", "madx"])
def test_adapters_of_every_method_that_adds_to_tensors_can_be_fused(block: type[nn.Module], methods: str) -> None:
    torch.manual_seed(0)
    kit = ak.wrap(Tiny(block).eval(), IDS)
    targets = {"targets": ["key", "value"], "feedforward_targets": ()} if methods == "ia3" else {}
    for name in "ab":
        kit.add(
            name, "lora" if methods == "dora" else methods, **targets, **({"use_dora": True} if methods == "dora" else {})
        )
        randomise(kit, name)
    kit.add_fusion(ak.Fuse("a", "b"))
    randomise(kit, "a,b")
    kit.train_fusion("a,b")
    kit.model(IDS).sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a,b"))
    fused = kit.model(IDS)
    for name in "ab":
        with kit.active(name):
            assert not torch.allclose(kit.model(IDS), fused)
    with kit.active(ak.Rows(["a", ak.Fuse("a", "b"), None])):
        mixed = kit.model(IDS)
    torch.testing.assert_close(mixed[1], fused[1], atol=1e-5, rtol=1e-5)


def test_a_fusion_of_equal_adapters_without_values_is_that_adapter() -> None:
    kit = wrapped()
    kit.add("twin", kit.adapters["a"])
    with torch.no_grad():
        for one, other in zip(kit.parameters("a"), kit.parameters("twin"), strict=True):
            other.copy_(one)
    kit.add_fusion(ak.Fuse("a", "twin"), "static")
    with kit.active("a"):
        alone = kit.model(IDS)
    with kit.active("a,twin"):
        torch.testing.assert_close(kit.model(IDS), alone)


def test_children_may_be_compositions_and_sit_in_different_places() -> None:
    kit = wrapped()
    kit.add("low", "lora", targets=["query"], layers=[0])
    randomise(kit, "low")
    fuse = ak.Fuse(ak.Stack("a", "c"), "low", ak.Average("a", "b"), name="mixed")
    kit.add_fusion(fuse)
    kit.activate(ak.Stack("b", fuse))
    with kit.fusion_attention() as seen:
        kit.model(IDS)
    assert seen.children == fuse.children
    # In the first block the query's projection is adapted by "low" alone; the others add nothing there.
    assert list(seen.weights) == ["blocks.0.attention.query", "blocks.0.norm_2", "blocks.1.norm_2"]
    assert all(torch.allclose(t.sum(-1), torch.ones(())) for kept in seen.weights.values() for t in kept)


def test_what_cannot_be_fused_is_refused_and_nothing_changes() -> None:
    kit = wrapped()
    kit.add("bias", "bitfit")
    before = {name: tensor.clone() for name, tensor in kit.model.state_dict().items()}
    for fuse, error, message in [
        (ak.Fuse("a", "bias"), ak.CompatibilityError, "changes the Parameter"),
        (ak.Fuse("a", "nobody"), ak.AdapterNameError, "no adapter 'nobody'"),
        (ak.Fuse("a", "b"), ak.AdapterNameError, "already has an adapter 'a,b'"),
        (ak.Stack("a", "b"), ak.ConfigError, r"takes an ak.Fuse\('a', 'b'\); found Stack"),
        (ak.Fuse("a,b", "c"), ak.ConfigError, r"Fuse cannot hold Fuse\('a', 'b'\)"),
        (ak.Fuse("c", ak.Stack("a", "a,b")), ak.ConfigError, r"cannot hold .*Fuse\('a', 'b'\)"),
    ]:
        with pytest.raises(error, match=message):
            kit.add_fusion(fuse)
    with pytest.raises(ak.ConfigError, match=r"'dinamic' is neither .* did you mean 'dynamic'"):
        kit.add_fusion(ak.Fuse("a", "c"), "dinamic")
    assert before.keys() == kit.model.state_dict().keys()
    assert [*kit.fusions] == ["a,b"]
    assert {*kit.adapters} == {"a", "b", "c", "bias"}


def test_a_fusion_that_is_not_there_is_not_run_as_something_else() -> None:
    kit = wrapped()
    with pytest.raises(ak.AdapterNameError, match=r"no fusion 'a,c'; kit.add_fusion\(Fuse\('a', 'c'\)\) makes one"):
        kit.activate(ak.Fuse("a", "c"))
    with pytest.raises(ak.CompatibilityError, match=r"no fusion 'a,b' weighs \['c'\]"):
        kit.activate(ak.Fuse("a", "c", name="a,b"))
    with pytest.raises(ak.AdapterNameError, match=r"no fusion 'nobody'; it has: \['a,b'\]"):
        kit.train_fusion("nobody")
    with pytest.raises(ak.AdapterNameError, match="no fusion 'c'"):
        kit.activate(ak.Fuse("a", "b", name="c"))


def test_an_adapter_that_a_fusion_weighs_is_not_removed_under_it() -> None:
    kit = wrapped()
    with pytest.raises(ak.CompatibilityError, match="'a' is weighed by the fusion 'a,b'"):
        kit.remove("a")
    kit.activate("a,b")
    kit.remove("a,b")
    assert "active=None" in repr(kit)
    kit.remove("a")


def test_unwrap_removes_fusions_too() -> None:
    kit = wrapped()
    keys = set(Tiny(PostNormBlock).state_dict())
    kit.train_fusion("a,b")
    assert set(kit.unwrap().state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in kit.model.modules())


def test_a_fusion_is_neither_merged_nor_combined() -> None:
    kit = wrapped(methods="lora")
    kit.activate("a,b")
    with pytest.raises(ak.CompatibilityError, match="'a,b' is a fusion"):
        kit.merge("a,b")
    with pytest.raises(ak.ConfigError, match="'a,b' is a fusion"):
        kit.combine("d", {"a,b": 1.0, "a": 1.0})
    with pytest.raises(ak.ActivationError, match="'a' is not active"):
        kit.merge("a")


def test_copies_compiled_and_checkpointed_models_run_the_fusion() -> None:
    kit = wrapped()
    kit.train_fusion("a,b")
    expected = kit.model(IDS)
    for other in (copy.deepcopy(kit.model), pickle.loads(pickle.dumps(kit.model))):
        assert torch.equal(other(IDS), expected)
    torch.testing.assert_close(torch.compile(kit.model, backend="eager", fullgraph=True)(IDS), expected)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in kit.parameters("a,b")]
    kit.model.zero_grad()
    x = kit.model.embedding(IDS)
    for block in kit.model.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    kit.model.classifier(x.mean(1)).sum().backward()
    for one, parameter in zip(gradients, kit.parameters("a,b"), strict=True):
        torch.testing.assert_close(one, parameter.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_fusion_computes_in_its_own_dtype(dtype: torch.dtype) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).to(dtype).eval(), IDS)
    for name in "ab":
        kit.add(name, "pfeiffer", bottleneck_size=3)
    kit.add_fusion(ak.Fuse("a", "b"))
    kit.activate("a,b")
    assert kit.model(IDS).dtype == dtype
    assert {p.dtype for p in kit.parameters("a,b")} == {torch.float64 if dtype == torch.float64 else torch.float32}


# --- files ------------------------------------------------------------------------------------------------------------


def saved(kit: ak.AdapterKit, folder: Path) -> Path:
    for name in ("a", "b", "a,b"):
        kit.save(name, folder / name)
    return folder


def test_a_fusion_is_loaded_over_adapters_with_the_same_tensors_whatever_they_are_called(tmp_path: Path) -> None:
    kit = wrapped()
    kit.add_fusion(ak.Fuse("a", "b", name="f"), heads=["classifier"])
    with torch.no_grad():
        for parameter in kit.parameters("f", heads=True):
            parameter.normal_()
    kit.activate("f")
    expected = kit.model(IDS)
    saved(kit, tmp_path)
    kit.save("f", tmp_path / "f")
    fresh = ak.wrap(Tiny(PostNormBlock).eval(), IDS)
    fresh.model.load_state_dict({k: v for k, v in kit.model.state_dict().items() if "_adapterkit" not in k})
    with pytest.raises(
        ak.CompatibilityError, match=r"weighs 'a' \(digest [0-9a-f]{12}…\), 'b' .* load these adapters first"
    ):
        fresh.load(tmp_path / "f")
    assert not fresh.adapters
    fresh.load(tmp_path / "b", "x")
    fresh.load(tmp_path / "a", "b")  # which is not the "b" that the fusion knows
    assert fresh.load(tmp_path / "f") == "f"
    assert fresh.fusions["f"] == ak.Fuse("b", "x", name="f")
    fresh.activate("f")
    assert torch.equal(fresh.model(IDS), expected)
    manifest = json.loads((tmp_path / "f" / "adapter.json").read_text())
    digests = [json.loads((tmp_path / name / "adapter.json").read_text())["digest"] for name in "ab"]
    assert [child["digest"] for child in manifest["children"]] == digests
    assert "| weighs | a (" in (tmp_path / "f" / "README.md").read_text()
    assert fresh.load(tmp_path / "f", "bare", heads=False) == "bare"
    assert {row.name: row.head_parameters for row in fresh.summary().adapters}["bare"] == 0


def test_adapters_that_have_changed_are_refused_unless_they_are_meant(tmp_path: Path) -> None:
    kit = wrapped()
    saved(kit, tmp_path)
    kit.remove("a,b")
    randomise(kit, "a")
    with pytest.raises(ak.CompatibilityError, match=r"weighs 'a' .*, whose adapter of this name holds other tensors"):
        kit.load(tmp_path / "a,b")
    assert kit.load(tmp_path / "a,b", any_base=True) == "a,b"
    kit.activate(ak.Fuse("a", "b"))
    kit.model(IDS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m["config"].update(children=["a", "c"]),
            ak.StoreError,
            r"weighs \['c'\], and does not say what they hold",
        ),
        (lambda m: m["config"].update(children=["a"]), ak.StoreError, "describes no fusion: Fuse takes at least 2"),
        (lambda m: m["config"].update(children=[{"type": "Rows"}, "a"]), ak.StoreError, "describes no fusion"),
        (lambda m: m["config"].update(dropout=7), ak.StoreError, "describes no adapter for this model: .*dropout"),
        (lambda m: m["sites"].pop(), ak.StoreError, "in one of file and model"),
        (lambda m: m.update(children=[]), ak.StoreError, "describes no adapter for this model"),
    ],
)
def test_a_manifest_that_describes_no_fusion_is_refused(
    tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    kit = wrapped()
    saved(kit, tmp_path)
    kit.remove("a,b")
    file = tmp_path / "a,b" / "adapter.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(error, match=message):
        kit.load(tmp_path / "a,b")
    assert not kit.fusions


# --- attention --------------------------------------------------------------------------------------------------------


def test_the_attention_is_read_summed_up_and_left_alone(tmp_path: Path) -> None:
    kit = wrapped()
    with pytest.raises(ak.ActivationError, match="one fusion must be active, to be watched; active is None"):
        kit.fusion_attention().__enter__()
    kit.activate("a,b")
    expected = kit.model(IDS)
    with kit.fusion_attention() as seen:
        assert torch.equal(kit.model(IDS), expected)
        kit.model(IDS[:1, :3])
    kit.model(IDS)
    assert [[tuple(t.shape) for t in kept] for kept in seen.weights.values()] == [[(3, 5, 2), (1, 3, 2)]] * 2
    mean = seen.mean()
    torch.testing.assert_close(mean.sum(-1), torch.ones(2))
    first = torch.cat([t.reshape(-1, 2) for t in seen.weights["blocks.0.norm_2"]])
    torch.testing.assert_close(mean[0], first.mean(0))
    masks = [torch.zeros(3, 5), torch.ones(1, 3)]
    torch.testing.assert_close(seen.mean(masks)[1], seen.weights["blocks.1.norm_2"][1][0].mean(0))
    with pytest.raises(ak.ConfigError, match="one for each of the 2 forwards"):
        seen.mean([torch.ones(3, 5)])
    assert seen.most_used(1) == [["a", "b"][int(mean.mean(0).argmax())]]
    with pytest.raises(ak.ConfigError, match="weighs 2 children; found count=3"):
        seen.most_used(3)
    with kit.fusion_attention("a,b") as unseen:
        pass
    with pytest.raises(ak.ActivationError, match="has not run within"):
        unseen.mean()


def test_the_attention_of_a_checkpointed_forward_is_kept_once() -> None:
    kit = wrapped()
    kit.train_fusion("a,b")
    with kit.fusion_attention() as seen:
        x = checkpoint(kit.model.blocks[0], kit.model.embedding(IDS), use_reentrant=False)
        x.sum().backward()
    assert [len(kept) for kept in seen.weights.values()] == [1, 0]


def test_the_attention_is_drawn(tmp_path: Path) -> None:
    kit = wrapped()
    kit.activate("a,b")
    with kit.fusion_attention() as seen:
        kit.model(IDS)
    seen.draw(tmp_path / "one.png")
    ak.draw_attention({"tweets": seen, "movies": seen}, tmp_path / "several.png")
    for name in ("one.png", "several.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    kit.add_fusion(ak.Fuse("a", "c"))
    kit.activate("a,c")
    with kit.fusion_attention() as other:
        kit.model(IDS)
    with pytest.raises(ak.ConfigError, match="over the same children"):
        ak.draw_attention({"one": seen, "other": other}, tmp_path / "none.png")


def test_a_pruned_fusion_weighs_the_most_used_children_alone(tmp_path: Path) -> None:
    kit = wrapped()
    fuse = ak.Fuse("a", "b", "c")
    kit.add_fusion(fuse)
    randomise(kit, "a,b,c")
    kit.activate(fuse)
    with kit.fusion_attention() as seen:
        kit.model(IDS)
    keep = seen.most_used(2)
    with pytest.raises(ak.CompatibilityError, match="is active with all of its children"):
        kit.prune_fusion(fuse, keep)
    with kit.base(), pytest.raises(ak.CompatibilityError, match="or will be when a `with` block ends"):
        kit.prune_fusion(fuse, keep)
    with kit.active(ak.Fuse(*keep, name="a,b,c")):  # without changing it
        expected = kit.model(IDS)
    kit.deactivate()
    pruned = kit.prune_fusion(fuse, keep)
    assert pruned == kit.fusions["a,b,c"] == ak.Fuse(*keep, name="a,b,c")
    with kit.active("a,b,c"):
        assert torch.equal(kit.model(IDS), expected)
    with pytest.raises(ak.CompatibilityError, match="no fusion 'a,b,c' weighs"):
        kit.activate(fuse)
    with pytest.raises(ak.ConfigError, match="it cannot keep"):
        kit.prune_fusion("a,b,c", ["a", "b", "c"])
    left_out = ({"a", "b", "c"} - {*keep}).pop()
    if left_out in ("a", "b"):
        kit.remove("a,b")
    kit.remove(left_out)
    kit.save("a,b,c", tmp_path)
    kit.remove("a,b,c")
    kit.activate(kit.load(tmp_path))
    assert torch.equal(kit.model(IDS), expected)
