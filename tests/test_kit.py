"""The life of an adapter: added, active, trained, removed; what it does to the model, and what not."""

import copy
import gc
import io
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkit as ak

from .helpers import trace_of
from .hosts.tiny import PostNormBlock, Tiny, randomise
from .strategies import adapter_names, configs, is_identity_at_init

CONFIG = ak.BottleneckConfig(targets=["attention.out", "down"], bottleneck_size=3)


@given(configs)
def test_a_new_adapter_is_the_identity_bit_for_bit(config: ak.BottleneckConfig) -> None:
    torch.manual_seed(0)
    model, ids = Tiny(PostNormBlock), torch.randint(0, 11, (3, 5))
    expected = model(ids)
    kit = ak.wrap(model, example_inputs=ids)
    kit.add("a", config)
    assert torch.equal(model(ids), expected), "added, not active"
    kit.activate("a")
    if is_identity_at_init(config):
        assert torch.equal(model.eval()(ids), expected)
        assert torch.equal(model.train()(ids), expected)


@given(configs)
def test_removing_an_adapter_restores_everything(config: ak.BottleneckConfig) -> None:
    torch.manual_seed(0)
    model, ids = Tiny(PostNormBlock).eval(), torch.randint(0, 11, (3, 5))
    before, expected = trace_of(model), model(ids)
    kit = ak.wrap(model, ids)
    kit.add("a", config, non_linearity="gelu")  # a narrow relu may be dead by chance
    randomise(kit, "a")
    kit.activate("a")
    assert not torch.equal(model(ids), expected)
    kit.remove("a")
    kit.unwrap()
    assert torch.equal(model(ids), expected)
    assert trace_of(model) == before


@given(configs)
def test_every_parameter_of_an_adapter_gets_a_gradient(config: ak.BottleneckConfig) -> None:
    torch.manual_seed(0)
    model, ids = Tiny(PostNormBlock), torch.randint(0, 11, (3, 5))
    kit = ak.wrap(model, ids)
    smooth = {"non_linearity": "gelu", "stochastic_depth": 0.0, "dropout": 0.0, "scaling": "channel"}
    kit.add("a", config.override({**smooth, "init": "bert"}))
    kit.train_adapter("a")
    model(ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in kit.parameters("a"))
    assert all(p.grad is None for name, p in model.named_parameters() if "_adapterkit" not in name)


def test_unwrap_restores_a_model_in_any_state(post_norm: Tiny, ids: Tensor) -> None:
    post_norm.embedding.requires_grad_(False)
    post_norm.blocks[0].eval()
    before, expected = trace_of(post_norm), post_norm(ids)
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG, heads=["classifier"])
    kit.add("b", CONFIG, bottleneck_size=2)
    kit.train_adapter("a")
    randomise(kit, "a")
    assert kit.unwrap() is post_norm
    assert trace_of(post_norm) == before
    assert torch.equal(post_norm(ids), expected)
    assert ak.wrap(post_norm).adapters == {}


def test_wrapping_changes_nothing_and_gives_one_kit(post_norm: Tiny) -> None:
    before = trace_of(post_norm)
    kit = ak.wrap(post_norm)
    assert ak.wrap(post_norm) is kit
    assert kit.model is post_norm
    assert trace_of(post_norm) == before


def test_a_kit_keeps_nothing_that_another_would_miss(post_norm: Tiny, ids: Tensor) -> None:
    ak.wrap(post_norm, ids).add("a", CONFIG)
    ak.wrap(post_norm).train_adapter("a")
    kit = ak.wrap(post_norm)
    assert kit.adapters == {"a": CONFIG}
    assert kit.summary().adapters[0].is_active


def test_a_kit_does_not_keep_its_model_alive() -> None:
    model = Tiny(PostNormBlock)
    gone = weakref.ref(model)
    ak.wrap(model).add("a", CONFIG)
    del model
    gc.collect()
    assert gone() is None


def test_only_a_module_can_be_wrapped() -> None:
    with pytest.raises(ak.ConfigError, match="found str"):
        ak.wrap("model")  # type: ignore[arg-type]  # wrong on purpose


def test_adapters_are_kept_apart(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm)
    base, outputs = post_norm(ids), {}
    for name in ("a", "b"):
        kit.add(name, CONFIG)
        randomise(kit, name)
        with kit.active(name):
            outputs[name] = post_norm(ids)
    assert not torch.equal(outputs["a"], outputs["b"])
    kit.activate("b")
    assert torch.equal(post_norm(ids), outputs["b"])
    kit.remove("a")
    assert torch.equal(post_norm(ids), outputs["b"])
    kit.remove("b")
    assert torch.equal(post_norm(ids), base)
    assert repr(kit) == "AdapterKit(Tiny, adapters=[], active=None)"


def test_scopes_nest_and_restore_after_an_exception(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm)
    outputs: dict[str | None, Tensor] = {None: post_norm(ids)}
    for name in ("a", "b"):
        kit.add(name, CONFIG)
        randomise(kit, name)
        with kit.active(name):
            outputs[name] = post_norm(ids)

    def runs(name: str | None) -> bool:
        return torch.equal(post_norm(ids), outputs[name])

    kit.activate("a")
    with pytest.raises(ZeroDivisionError, match="zero"), kit.active("b"):
        assert runs("b")
        with kit.base():
            assert runs(None)
            kit.activate("a")
            assert runs("a")
        assert runs("b")
        1 / 0  # noqa: B018 (any exception)
    assert runs("a")
    kit.deactivate()
    assert runs(None)


def test_activation_changes_no_flag(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    kit.add("b", CONFIG)
    kit.train_adapter("a")
    flags = {name: p.requires_grad for name, p in post_norm.named_parameters()}
    kit.activate("b")
    kit.deactivate()
    assert {name: p.requires_grad for name, p in post_norm.named_parameters()} == flags


@pytest.mark.parametrize("call", ["remove", "activate", "active", "train_adapter", "save", "parameters", "freeze"])
def test_an_unknown_adapter_is_an_error_with_the_nearest_name(post_norm: Tiny, call: str, tmp_path: Path) -> None:
    kit = ak.wrap(post_norm)
    kit.add("sentiment", CONFIG)
    arguments = (tmp_path,) if call == "save" else ()
    with pytest.raises(ak.AdapterNameError, match=r"no adapter 'sentimnt'. Did you mean 'sentiment'"):
        next(filter(None, [getattr(kit, call)("sentimnt", *arguments)])).__enter__()


@given(st.lists(adapter_names, min_size=2, max_size=4, unique=True))
def test_any_printable_name_works(names: list[str]) -> None:
    model, ids = Tiny(PostNormBlock), torch.randint(0, 11, (3, 5))
    kit, base, outputs = ak.wrap(model), model(ids), {}
    for name in names:
        kit.add(name, CONFIG)
        randomise(kit, name)
        with kit.active(name):
            outputs[name] = model(ids)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert list(kit.adapters) == names
    for name in names:
        with kit.active(name):
            assert torch.equal(model(ids), outputs[name])
        kit.remove(name)
    assert torch.equal(model(ids), base)


@pytest.mark.parametrize("name", ["blocks", "classifier", "blocks.0", "a.b", "a"])
def test_a_name_may_equal_a_module_or_begin_another(post_norm: Tiny, ids: Tensor, name: str) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a.b.c", CONFIG)
    kit.add(name, CONFIG)
    randomise(kit, name)
    assert {key.split("._adapterkit.")[1].split(".")[0] for key, _ in kit.named_parameters(name)} == {
        name.replace(".", "%2E")
    }


def test_a_taken_name_is_refused(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    with pytest.raises(ak.AdapterNameError, match="already has an adapter 'a'"):
        kit.add("a", CONFIG)
    kit.remove("a")
    kit.add("a", CONFIG)


def test_parameters_come_in_a_fixed_order_and_heads_come_last(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG, heads=["classifier"])
    names = [name for name, _ in kit.named_parameters("a", heads=False)]
    assert len(names) == 4 * 4
    assert [name for name, _ in kit.named_parameters("a")] == [
        *names,
        "classifier._adapterkit.a.weight",
        "classifier._adapterkit.a.bias",
    ]
    assert list(kit.state_dict("a")) == names
    assert list(kit.state_dict("a", heads=True)) == [name for name, _ in kit.named_parameters("a")]
    assert set(names) < set(post_norm.state_dict())
    kit.freeze("a")
    assert [name for name, _ in kit.named_parameters("a", heads=False)] == names


def test_an_optimizer_over_the_parameters_holds_all_that_trains(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG, heads=["classifier"])
    kit.train_adapter("a")
    open_ones = {id(p) for p in post_norm.parameters() if p.requires_grad}
    assert {id(p) for p in kit.parameters("a")} == open_ones


@pytest.mark.parametrize("spelling", ["config", "mapping", "path", "string"])
def test_a_config_may_be_given_in_any_spelling(post_norm: Tiny, tmp_path: Path, spelling: str) -> None:
    settings = {"method": "bottleneck", "targets": ["attention.out", "down"], "bottleneck_size": 3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    kit = ak.wrap(post_norm)
    kit.add("a", {"config": CONFIG, "mapping": settings, "path": path, "string": str(path)}[spelling], dropout=0.5)
    assert kit.adapters["a"] == CONFIG.override({"dropout": 0.5})


@pytest.mark.parametrize("config", [None, 5, "{" * 5000, "a\0b", {"method": "bottleneck", 3: 4}])
def test_what_is_no_config_at_all_is_an_error(post_norm: Tiny, config: Any) -> None:
    with pytest.raises(ak.ConfigError, match=r"neither a preset nor|named by strings"):
        ak.wrap(post_norm).add("a", config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither a preset nor a config nor a JSON file"),
        ("{", "not JSON"),
        ("[1]", "JSON list"),
        ('{"method": "x"}', "found 'x'"),
    ],
)
def test_a_bad_config_file_is_an_error(post_norm: Tiny, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ak.ConfigError, match=message):
        ak.wrap(post_norm).add("a", path)


def test_a_predicate_is_kept_as_the_paths_that_it_matched(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", ak.BottleneckConfig(targets=[lambda module, path: path.endswith("down")], bottleneck_size=2))
    assert kit.adapters["a"].targets == (r"re:blocks\.0\.down", r"re:blocks\.1\.down")


failing = st.sampled_from(
    [
        {"targets": ["nothing"]},
        {"targets": ["attention.out", "nothing"]},
        {"targets": ["attention"]},  # its width cannot be told without example inputs
        {"targets": ["down", "blocks"]},  # an nn.ModuleList is never called
        {"targets": ["embedding"], "at": "input"},
        {"targets": ["embedding"], "layers": [0]},
        {"targets": ["down"], "layers": [5]},
        {"targets": ["down"], "residual": "nothing"},
        {"targets": ["down"], "residual": "attention.*"},
        {"targets": ["down"], "at": "renormalised"},
        {"targets": ["down"], "bottleneck_size": 0},
        {"targets": ["down"], "heads": ["nothing"]},
        {"targets": ["classifier"], "heads": ["classifier"]},
        {"targets": ["down"], "heads": ["blocks"]},
        {"targets": ["down"], "name": "taken"},
        {"targets": ["down"], "name": ""},
        {"targets": ["down"], "output": "hidden", "example": True},
        {"targets": ["down"], "channel_axis": 5, "example": True},
    ]
)


@given(failing)
def test_an_add_that_fails_leaves_the_model_as_it_was(settings: dict[str, Any]) -> None:
    model, ids = Tiny(PostNormBlock), torch.randint(0, 11, (3, 5))
    settings = dict(settings)
    kit = ak.wrap(model, ids if settings.pop("example", False) else None)
    kit.add("taken", CONFIG)
    kit.train_adapter("taken")
    before, expected, random_state = trace_of(model), model(ids), torch.get_rng_state()
    with pytest.raises(ak.AdapterKitError):
        kit.add(settings.pop("name", "a"), {"method": "bottleneck", **settings}, heads=settings.pop("heads", ()))
    assert trace_of(model) == before
    assert torch.equal(model(ids), expected)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_seed_decides_the_initialisation_and_leaves_the_generator_alone(post_norm: Tiny) -> None:
    kit, state = ak.wrap(post_norm), torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        kit.add(name, CONFIG, seed=seed)
    a, b, c = (list(kit.parameters(name)) for name in "abc")
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    assert not torch.equal(a[0], a[4]), "the sites of one adapter differ from one another"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_independent_and_whole(post_norm: Tiny, ids: Tensor, way: str) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG.override({"residual": "up"}), targets=["down"], heads=["classifier"])
    kit.train_adapter("a")
    randomise(kit, "a")
    expected = post_norm(ids)
    if way == "deepcopy":
        twin = copy.deepcopy(post_norm)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(post_norm))
    else:
        file = io.BytesIO()
        torch.save(post_norm, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(ids), expected)
    twin_kit = ak.wrap(twin)
    randomise(twin_kit, "a")
    assert not torch.equal(twin(ids), expected)
    twin_kit.unwrap()
    assert torch.equal(post_norm(ids), expected)
    assert not next(iter(twin.modules())).__dict__.get("_adapterkit_state")


def test_a_copy_made_within_a_scope_runs_what_the_original_ran(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG, heads="classifier")
    randomise(kit, "a")
    with kit.active("a"):
        expected = post_norm(ids)
        twin = copy.deepcopy(post_norm)
    assert torch.equal(twin(ids), expected)
    assert ak.wrap(twin).summary().adapters[0].is_active
    assert not kit.summary().adapters[0].is_active


def test_a_part_taken_out_of_a_model_keeps_its_adapters(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    randomise(kit, "a")
    kit.activate("a")
    block = copy.deepcopy(post_norm.blocks[0])
    x = torch.randn(1, 2, 8)
    assert torch.equal(block(x), post_norm.blocks[0](x))
    ak.wrap(block).unwrap()
    assert not torch.equal(block(x), post_norm.blocks[0](x))


def test_parts_that_were_wrapped_apart_are_refused(post_norm: Tiny) -> None:
    for block in post_norm.blocks:
        ak.wrap(block).add("a", CONFIG)
    with pytest.raises(ak.CompatibilityError, match=r"'blocks.1.attention.out' among them"):
        ak.wrap(post_norm).add("b", CONFIG)


def test_a_model_around_a_wrapped_one_is_refused_until_it_is_unwrapped(post_norm: Tiny) -> None:
    inner = ak.wrap(post_norm)
    inner.add("a", CONFIG)
    outer = ak.wrap(nn.ModuleDict({"inner": post_norm}))
    with pytest.raises(ak.CompatibilityError, match="'inner' among them"):
        outer.add("b", CONFIG)
    inner.unwrap()
    outer.add("b", CONFIG)


def test_a_part_taken_out_of_a_model_saves_under_its_own_paths(post_norm: Tiny, ids: Tensor, tmp_path: Path) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", ak.BottleneckConfig(targets=["down"], residual="up", bottleneck_size=3))
    randomise(kit, "a")
    kit.activate("a")
    block = copy.deepcopy(post_norm.blocks[1])
    x = torch.randn(2, 3, 8)
    expected = block(x)
    ak.wrap(block).add("b", CONFIG)
    assert torch.equal(block(x), expected), "adding another adapter keeps the first one's stream"
    folder = ak.wrap(block).save("a", tmp_path)
    fresh = copy.deepcopy(post_norm.blocks[1])
    other = ak.wrap(ak.wrap(fresh).unwrap())
    other.activate(other.load(folder))
    assert torch.equal(fresh(x), expected)


def test_a_model_that_is_distributed_already_is_refused(tmp_path: Path) -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Tiny(PostNormBlock)

    kit = ak.wrap(Tiny(PostNormBlock))
    kit.add("a", CONFIG)
    kit.save("a", tmp_path)
    with pytest.raises(ak.ConfigError, match=r"DistributedDataParallel.*add adapters first"):
        ak.wrap(DistributedDataParallel()).load(tmp_path)
    with pytest.raises(ak.ConfigError, match=r"DistributedDataParallel.*add adapters first"):
        ak.wrap(DistributedDataParallel()).add("a", CONFIG)


def test_a_thousand_adapters_come_and_go_without_a_trace(post_norm: Tiny, ids: Tensor) -> None:
    kit, before, expected = ak.wrap(post_norm), trace_of(post_norm), post_norm(ids)

    def cycle(times: int) -> int:
        for i in range(times):
            kit.add(f"a{i % 3}", CONFIG, targets=["attention.out"])
            kit.activate(f"a{i % 3}")
            kit.remove(f"a{i % 3}")
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    gc.collect()  # what other tests left
    assert cycle(1000) <= cycle(10)
    kit.unwrap()
    assert trace_of(post_norm) == before
    assert torch.equal(post_norm(ids), expected)


def test_a_removed_adapter_does_not_come_back_with_the_end_of_a_scope(post_norm: Tiny, ids: Tensor) -> None:
    kit, expected = ak.wrap(post_norm), post_norm(ids)
    kit.add("a", CONFIG)
    kit.activate("a")
    with kit.base():
        kit.remove("a")
    kit.add("a", CONFIG)
    randomise(kit, "a")
    assert torch.equal(post_norm(ids), expected)
    with kit.active("a"):
        kit.remove("a")
        assert torch.equal(post_norm(ids), expected)
    assert not kit.adapters


def test_an_adapter_added_while_another_trains_starts_frozen(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    assert all(p.requires_grad for p in kit.parameters("a"))
    kit.train_adapter("a")
    kit.add("b", CONFIG)
    assert not any(p.requires_grad for p in kit.parameters("b"))


def test_removing_the_adapter_that_trains_leaves_the_base_frozen_until_unfreeze(post_norm: Tiny, ids: Tensor) -> None:
    kit, expected = ak.wrap(post_norm), post_norm(ids)
    kit.add("a", CONFIG)
    kit.train_adapter("a")
    kit.remove("a")
    assert torch.equal(post_norm(ids), expected)
    assert not any(p.requires_grad for p in post_norm.parameters())
    kit.unfreeze()
    assert all(p.requires_grad for p in post_norm.parameters())


def test_sites_tell_what_would_be_adapted_and_change_nothing(post_norm: Tiny) -> None:
    before = trace_of(post_norm)
    sites = ak.wrap(post_norm).sites(CONFIG)
    assert [(s.path, s.host, s.width, s.layer) for s in sites] == [
        ("blocks.0.attention.out", "Linear", 8, (0, 2)),
        ("blocks.0.down", "Linear", 8, (0, 2)),
        ("blocks.1.attention.out", "Linear", 8, (1, 2)),
        ("blocks.1.down", "Linear", 8, (1, 2)),
    ]
    assert trace_of(post_norm) == before


def test_the_summary_counts_parameters_bytes_and_shares(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG, heads=["classifier"], dtype="bfloat16")
    kit.train_adapter("a")
    row = kit.summary().adapters[0]
    own = 4 * (2 * 8 * 3 + 3 + 8)
    theta = sum(p.numel() for name, p in post_norm.named_parameters() if "_adapterkit" not in name)
    assert (row.sites, row.parameters, row.head_parameters) == (4, own, 27)
    assert row.size_bytes == own * 2 + 27 * 4
    assert row.percent == pytest.approx(100 * own / theta)
    text = str(kit.summary())
    assert "a        bottleneck  4      236         27" in text
    assert f"{theta:,}" in text


def test_none_is_no_adapter(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    kit.activate("a")
    for switch in (kit.activate, kit.active):
        with pytest.raises(ak.AdapterNameError, match=r"no adapter None.*kit.deactivate\(\).*kit.base\(\)"):
            switch(None)  # type: ignore[arg-type]  # wrong on purpose
    assert kit.summary().adapters[0].is_active
