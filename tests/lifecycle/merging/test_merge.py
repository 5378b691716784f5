"""Merging changes the weights and not what the model computes; unmerging restores them to the bit."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.lifecycle.attach import state_of
from adapterkit.lifecycle.merging.merge import merge
from adapterkit.lifecycle.merging.merged_weights import merged_weights
from adapterkit.runtime.hooks import KitHook
from adapterkit.runtime.originals import originals_of

from ...hosts.layers import Conv1D
from ...hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise

LORA = ak.LoRAConfig(targets=["query", "up", "down"], rank=3, alpha=5.0)


class Experts(nn.Module):
    """Two experts in one Parameter (expert, out, in), mixed by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.weights = nn.Parameter(torch.randn(2, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...e,eoi,...i->...o", self.gate(x).softmax(-1), self.weights, x)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        nn.init.normal_(self.mha.in_proj_bias)
        nn.init.normal_(self.mha.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class KeywordCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(input=x))


class TwoWeights(nn.Module):
    """Holds one Parameter under two names and reads it under both."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.w2 = self.w

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T) @ self.w2


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x)))


def rows() -> Tensor:
    return torch.randn(3, 5, 6)


def image() -> Tensor:
    return torch.randn(2, 6, 9, 8)


# A model, its input, what is adapted, further settings.
HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Any]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), rows, {"targets": ["0"], "bias": True}),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 4, bias=False)), rows, {"targets": ["0"]}),
    "Conv1D": (lambda: nn.Sequential(Conv1D(4, 6)), rows, {"targets": ["0"], "bias": True}),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(6, 4, 3, stride=2)), lambda: torch.randn(2, 6, 11), {"targets": ["0"]}),
    "dilated": (lambda: nn.Sequential(nn.Conv2d(6, 4, 3, dilation=2, padding=(1, 2))), image, {"targets": ["0"]}),
    "circular": (
        lambda: nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")),
        image,
        {"targets": ["0"], "bias": True},
    ),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(6, 9, 3, groups=3, padding="same")), image, {"targets": ["0"]}),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2)), lambda: torch.randn(2, 2, 4, 4, 4), {"targets": ["0"]}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=2)),
        lambda: torch.randint(0, 11, (3, 5)),
        {"targets": ["0"]},
    ),
    "mha": (Attending, rows, {"targets": ["mha"]}),
    "mha.q": (Attending, rows, {"targets": ["mha.in_proj_weight"]}),
    "experts": (Experts, rows, {"targets": ["weights"]}),
    "keyword": (KeywordCalled, rows, {"targets": ["layer"], "bias": True}),
    "two names": (TwoNames, rows, {"targets": ["again"]}),
    "rslora": (lambda: nn.Sequential(nn.Linear(6, 4)), rows, {"targets": ["0"], "use_rslora": True}),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 4)), rows, {"targets": ["0"], "dropout": 0.5}),
    "rank of its own": (lambda: nn.Sequential(nn.Linear(6, 4)), rows, {"targets": ["0"], "rank": {"0": 2, "default": 1}}),
}


def adapted(model: nn.Module, *names: str, inputs: Any = None, config: Any = LORA, **settings: Any) -> ak.AdapterKit:
    """With random adapters, in eval mode; the first is active."""
    kit = ak.wrap(model.eval(), inputs)
    for name in names or ("a",):
        kit.add(name, config, **settings)
        randomise(kit, name)
    kit.activate((names or ("a",))[0])
    return kit


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every base tensor."""
    return {k: v.detach().clone() for k, v in (*model.named_parameters(), *model.named_buffers()) if "_adapterkit" not in k}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def kit(ids: Tensor) -> ak.AdapterKit:
    return adapted(Tiny(PostNormBlock), "a", "b", inputs=ids)


# --- the same numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HOSTS)
def test_a_merged_model_computes_the_same_and_is_restored_to_the_bit(name: str, dtype: torch.dtype) -> None:
    build, some, settings = HOSTS[name]
    model, x = build().to(dtype), some()
    x = x.to(dtype) if x.is_floating_point() else x
    kit = adapted(model, inputs=x, config=ak.LoRAConfig(**{"rank": 3, "alpha": 5.0, **settings}))
    before, expected = weights(model), model(x)
    with kit.base():
        plain = model(x)
    kit.merge("a")
    close(model(x), expected)
    assert (expected - plain).abs().max() > 0.01, "the adapter does something"
    assert not same(weights(model), before)
    kit.unmerge("a")
    assert same(weights(model), before)
    assert torch.equal(model(x), expected)


def test_the_merged_weight_is_w_plus_scaling_b_a() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).double()
    kit = adapted(model, inputs=rows().double(), config=ak.LoRAConfig(targets=["0"], rank=3, alpha=5.0, bias=True))
    w, b = model[0].weight.clone(), model[0].bias.clone()
    a = {name.rpartition(".")[2]: tensor for name, tensor in kit.state_dict("a").items()}
    kit.merge("a")
    close(model[0].weight, w + 5 / 3 * a["lora_B"] @ a["lora_A"])
    close(model[0].bias, b + 5 / 3 * a["lora_bias"])


def test_gpt2_with_its_transposed_fused_layers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=13, n_positions=16)
    model = transformers.GPT2Model(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ids = torch.randint(0, 13, (2, 5))
    kit = adapted(model, inputs={"input_ids": ids}, config=ak.LoRAConfig(targets=["c_attn", "c_fc", "wte"], alpha=3.0))
    before, expected = weights(model), model(ids).last_hidden_state
    kit.merge("a")
    close(model(ids).last_hidden_state, expected)
    kit.unmerge("a")
    assert same(weights(model), before)


def test_a_part_of_a_fused_weight_leaves_the_rest_of_it_alone() -> None:
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    kit = adapted(model, inputs=rows(), config=ak.LoRAConfig(targets=["@attention.q"]))
    before, x = model.self_attn.in_proj_weight.clone(), rows()
    expected = model(x)
    kit.merge("a")
    close(model(x), expected)
    assert torch.equal(model.self_attn.in_proj_weight[6:], before[6:])
    assert not torch.equal(model.self_attn.in_proj_weight[:6], before[:6])


def test_several_members_of_a_union_at_one_host_are_merged_in_order() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)), rows()
    config = ak.Union(
        ak.LoRAConfig(targets=["0"], bias=True), ak.LoRAConfig(targets=["0.weight"]), ak.LoRAConfig(targets=["0"])
    )
    kit = adapted(model, inputs=x, config=config)
    before, expected = weights(model), model(x)
    kit.merge("a")
    close(model(x), expected)
    kit.unmerge("a")
    assert same(weights(model), before)


class Scaled(nn.Module):
    """What IA3 does: x * l at a host's input or output."""

    compute_dtype = torch.float32

    def __init__(self, width: int, at: str) -> None:
        super().__init__()
        self.at, self.l = at, nn.Parameter(torch.randn(width))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x * (self.l - 1)

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.at == "input":
            return {"weight": tensors["weight"] * self.l}
        return {"weight": tensors["weight"] * self.l[:, None], "bias": tensors["bias"] * self.l}


class ScalingConfig(ak.BottleneckConfig):
    method: str = "scaling"  # type: ignore[assignment]  # another method's
    where: str = "output"


class Scaling:
    name = "scaling"
    config_type = ScalingConfig
    presets: ClassVar[dict[str, Any]] = {}

    def placements(self, config: ScalingConfig) -> Any:
        from adapterkit.placement.rule import Placement

        return (Placement(at=config.where, level="projection", reads="site"),)

    def build(self, config: ScalingConfig, site: ak.SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> nn.Module:
        return Scaled(site.width, site.at)


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit import methods
    from adapterkit.lifecycle import add, build

    for module in (methods, add, build):
        known = module.method_of
        monkeypatch.setattr(
            module, "method_of", lambda c, known=known: Scaling() if isinstance(c, ScalingConfig) else known(c)
        )


@pytest.mark.usefixtures("scaling")
def test_scaled_inputs_and_outputs_are_merged_in_the_order_in_which_they_act() -> None:
    """diag(l_out) (W + B A) diag(l_in), then + B' A' diag(l_in), whatever the order in the union."""
    x = rows()
    low_rank, out = ak.LoRAConfig(targets=["0"], bias=True), ScalingConfig(targets=["0"])
    into = ScalingConfig(targets=["0"], where="input")
    for config in (
        ak.Union(into, low_rank, out),
        ak.Union(out, low_rank, into),
        ak.Union(low_rank, into),
        ak.Union(out, into),
    ):
        model = nn.Sequential(nn.Linear(6, 4))
        kit = adapted(model, inputs=x, config=config)
        before, expected = weights(model), model(x)
        kit.merge("a")
        close(model(x), expected)
        kit.unmerge("a")
        assert same(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_half_precision_host_only_the_rounding_of_the_weight_differs(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)).to(dtype), rows().to(dtype)
    kit = adapted(model, inputs=x, config=ak.LoRAConfig(targets=["0"], alpha=3.0))
    before, expected = weights(model), model(x)
    a = {name.rpartition(".")[2]: tensor for name, tensor in kit.state_dict("a").items()}
    kit.merge("a")
    exact = before["0.weight"].float() + 3 / 8 * a["lora_B"] @ a["lora_A"]
    assert torch.equal(model[0].weight, exact.to(dtype)), "rounded once"
    torch.testing.assert_close(model(x), expected, atol=10 * torch.finfo(dtype).eps, rtol=10 * torch.finfo(dtype).eps)
    kit.unmerge("a")
    assert same(weights(model), before)


def test_a_half_precision_adapter_and_autocast_do_not_make_the_merge_coarse() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)), rows()
    kit = adapted(model, inputs=x, config=ak.LoRAConfig(targets=["0"], dtype="bfloat16", alpha=8.0))
    w, a = model[0].weight.clone(), {k.rpartition(".")[2]: v.float() for k, v in kit.state_dict("a").items()}
    with torch.autocast("cpu", torch.bfloat16):
        kit.merge("a")
    close(model[0].weight, w + a["lora_B"] @ a["lora_A"])


# --- what is active -----------------------------------------------------------------------------------------------------


def test_only_the_active_adapter_can_be_merged(kit: ak.AdapterKit) -> None:
    with pytest.raises(ak.ActivationError, match=r"'b' is not active.*kit.activate\('b'\)"):
        kit.merge("b")
    kit.deactivate()
    with pytest.raises(ak.ActivationError, match="'a' is not active"):
        kit.merge("a")
    with pytest.raises(ak.AdapterNameError, match="no adapter 'c'"):
        kit.merge("c")
    with kit.active("a"), pytest.raises(ak.ActivationError, match="within a `with` block"):
        kit.merge("a")


def test_within_a_block_that_comes_back_to_it_an_adapter_can_be_merged(kit: ak.AdapterKit, ids: Tensor) -> None:
    expected = kit.model(ids)
    with kit.active("a"):
        kit.merge("a")
        close(kit.model(ids), expected)
    close(kit.model(ids), expected)


def test_while_an_adapter_is_merged_nothing_runs_without_it(kit: ak.AdapterKit, ids: Tensor) -> None:
    expected = kit.model(ids)
    kit.merge("a")
    way_out = r"'a' is merged into the weights.*kit.unmerge\('a'\)"
    for refused in (lambda: kit.activate("b"), kit.deactivate, lambda: kit.train_adapter("b")):
        with pytest.raises(ak.ActivationError, match=way_out):
            refused()
    for scope in (kit.base, lambda: kit.active("b")):
        with pytest.raises(ak.ActivationError, match=way_out), scope():
            pass
    kit.activate("a")
    with kit.active("a"):
        close(kit.model(ids), expected)
    kit.unmerge("a")
    with kit.base():
        assert not torch.allclose(kit.model(ids), expected)


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors(kit: ak.AdapterKit) -> None:
    kit.merge("a")
    with pytest.raises(ak.ActivationError, match="'a' is merged already"):
        kit.merge("a")
    with pytest.raises(ak.ActivationError, match=r"'b' is not merged; merged are: \['a'\]"):
        kit.unmerge("b")
    kit.unmerge("a")
    with pytest.raises(ak.ActivationError, match="'a' is not merged; merged are: none"):
        kit.unmerge("a")
    with pytest.raises(ak.AdapterNameError, match="no adapter 'c'"):
        kit.unmerge("c")


def test_hooks_stay_and_do_no_more_than_those_of_an_inactive_adapter(kit: ak.AdapterKit) -> None:
    def hooks() -> int:
        return sum(isinstance(h, KitHook) for m in kit.model.modules() for h in m._forward_hooks.values())

    def steps() -> set[str]:
        held = [m for m in kit.model.modules() if type(m).__name__ == "AdapterSite"]
        return {type(s).__name__ for m in held for s in (*m.output_steps, *m.input_steps, *m.weight_steps)}

    before = hooks()
    kit.merge("a")
    assert (hooks(), steps()) == (before, {"Pass"})
    kit.unmerge("a")
    assert "AddProjected" in steps()


def test_heads_are_no_weights_and_go_on_running(ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval(), ids)
    kit.add("a", LORA, heads=["classifier"])
    randomise(kit, "a")
    kit.activate("a")
    with torch.no_grad():
        for _, parameter in list(kit.named_parameters("a", heads=True))[-2:]:
            parameter.add_(1.0)
    expected, own = kit.model(ids), kit.model.classifier.weight.clone()
    kit.merge("a")
    close(kit.model(ids), expected)
    assert torch.equal(kit.model.classifier.weight, own)


def test_a_compiled_model_notices(kit: ak.AdapterKit, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, resets, reset = torch.compile(kit.model, backend="eager"), [], torch._dynamo.reset
    monkeypatch.setattr(torch._dynamo, "reset", lambda: (resets.append(1), reset()))
    expected = kit.model(ids)
    close(compiled(ids), expected)
    kit.merge("a")
    close(compiled(ids), expected)
    kit.unmerge("a")
    close(compiled(ids), expected)
    assert len(resets) == 2, "weights may be folded into a graph"


# --- what trains --------------------------------------------------------------------------------------------------------


def test_a_merged_adapter_does_not_train_and_goes_on_where_it_was(kit: ak.AdapterKit) -> None:
    kit.train_adapter("a")
    kit.merge("a")
    assert not any(p.requires_grad for p in kit.parameters("a"))
    for refused in (lambda: kit.train_adapter("a"), lambda: kit.unfreeze("a")):
        with pytest.raises(ak.ActivationError, match=r"'a' is merged into the weights.*kit.unmerge\('a'\)"):
            refused()
    assert not any(p.requires_grad for p in kit.model.parameters())
    kit.unmerge("a")
    assert all(p.requires_grad for p in kit.parameters("a"))
    assert not any(p.requires_grad for p in kit.parameters("b"))


def test_an_adapter_that_is_frozen_while_merged_stays_frozen(kit: ak.AdapterKit) -> None:
    kit.train_adapter("a")
    kit.merge("a")
    kit.freeze("a")
    kit.unmerge("a")
    assert not any(p.requires_grad for p in kit.parameters("a"))


def test_a_failed_train_adapter_freezes_nothing(kit: ak.AdapterKit) -> None:
    kit.merge("a")
    with pytest.raises(ak.ActivationError):
        kit.train_adapter("a")
    assert all(p.requires_grad for name, p in kit.model.named_parameters() if "_adapterkit" not in name)


def test_autograd_notices_that_weights_changed_before_backward(kit: ak.AdapterKit, ids: Tensor) -> None:
    kit.train_adapter("a")
    loss = kit.model(ids).sum()
    kit.merge("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_not_recomputed_with_merged_weights(reentrant: bool) -> None:
    class Checkpointed(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if torch.is_grad_enabled() else block(x)
            return self.classifier(x.mean(1))

    ids = torch.randint(0, 11, (3, 5))
    kit = adapted(Checkpointed(PostNormBlock), inputs=ids)
    kit.train_adapter("a")
    loss = kit.model(ids).sum()
    kit.merge("a")
    with pytest.raises(ak.ActivationError, match="merged or unmerged between forward and backward"):
        loss.backward()
    kit.unmerge("a")
    kit.model(ids).sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))


# --- θ stays θ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["freeze", "merge"])
def test_a_merged_base_has_not_moved(kit: ak.AdapterKit, first: str, ids: Tensor) -> None:
    before = weights(kit.model)
    for step in [kit.freeze, lambda: kit.merge("a")][:: 1 if first == "freeze" else -1]:
        step()
    kit.verify(ids).require()
    assert kit.verify(ids).base_is_unmoved
    kit.unmerge("a")
    assert kit.verify(ids).base_is_unmoved
    kit.unfreeze()
    assert same(weights(kit.model), before)


def test_verify_names_what_changed_after_merging(kit: ak.AdapterKit, ids: Tensor) -> None:
    kit.merge("a")
    with torch.no_grad():
        kit.model.blocks[0].up.weight[0, 0] += 1
    assert any("changed since ['a'] were merged into them: blocks.0.up.weight" in p for p in kit.verify(ids).problems)


def test_an_adapter_that_is_saved_while_merged_names_the_base_without_it(
    kit: ak.AdapterKit, ids: Tensor, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = Tiny(PostNormBlock).eval()
    base.load_state_dict({k: v for k, v in kit.model.state_dict().items() if "_adapterkit" not in k})
    expected = kit.model(ids)
    kit.merge("a")
    kit.save("a", tmp_path / "a")
    fresh = ak.wrap(base, ids)
    fresh.activate(fresh.load(tmp_path / "a"))
    assert torch.equal(base(ids), expected)
    kit.load(tmp_path / "a", "again")
    assert not recwarn.list, "no other base"


def test_the_summary_says_what_is_merged(kit: ak.AdapterKit) -> None:
    kit.merge("a")
    assert [row.is_merged for row in kit.summary().adapters] == [True, False]
    assert str(kit.summary()).splitlines()[0].endswith("merged")


def test_a_merged_model_is_exported_as_a_plain_checkpoint(kit: ak.AdapterKit, ids: Tensor) -> None:
    expected = kit.model(ids)
    kit.merge("a")
    with kit.base_checkpoint():
        state = copy.deepcopy(kit.model.state_dict())
    plain = Tiny(PostNormBlock).eval()
    plain.load_state_dict(state, strict=True)
    close(plain(ids), expected)
    with pytest.warns(UserWarning, match=r"\['a'\] merged into them, and the adapters as well"):
        kit.model.state_dict()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_merged_model_are_merged_and_can_be_unmerged(kit: ak.AdapterKit, ids: Tensor, how: str) -> None:
    before, expected = weights(kit.model), kit.model(ids)
    kit.merge("a")
    if how == "deepcopy":
        twin = copy.deepcopy(kit.model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(kit.model))
    else:
        file = io.BytesIO()
        torch.save(kit.model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    close(twin(ids), expected)
    ak.wrap(twin).unmerge("a")
    assert same(weights(twin), before)
    close(twin(ids), expected)
    assert not same(weights(kit.model), before), "the copy has originals of its own"


# --- remove, unwrap, add ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["remove", "unwrap"])
def test_removing_unmerges_first(kit: ak.AdapterKit, ids: Tensor, way: str) -> None:
    before = weights(kit.model)
    with kit.base():
        plain = kit.model(ids)
    kit.merge("a")
    if way == "remove":
        kit.remove("b")
        assert not same(weights(kit.model), before)
        kit.remove("a")
    else:
        kit.unwrap()
    assert same(weights(kit.model), before)
    assert torch.equal(kit.model(ids), plain)


def test_an_adapter_that_another_thread_runs_is_neither_removed_nor_unmerged(kit: ak.AdapterKit) -> None:
    kit.merge("a")
    running, done = threading.Event(), threading.Event()

    def run() -> None:
        with kit.active("a"):
            running.set()
            done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    running.wait()
    now = weights(kit.model)
    with pytest.raises(ak.ActivationError, match="is running this model with 'a'"):
        kit.remove("a")
    done.set()
    thread.join()
    assert same(weights(kit.model), now)
    assert kit.summary().adapters[0].is_merged


def test_other_adapters_can_be_added_while_one_is_merged(kit: ak.AdapterKit, ids: Tensor) -> None:
    before, expected = weights(kit.model), kit.model(ids)
    kit.merge("a")
    kit.add("c", "lora")
    kit.add("d", "pfeiffer", reduction_factor=2)
    close(kit.model(ids), expected)
    kit.unmerge("a")
    kit.remove("c")
    assert same(weights(kit.model), before)


# --- weights that changed -----------------------------------------------------------------------------------------------


def changes(ids: Tensor) -> dict[str, Callable[[nn.Module], Any]]:
    other = Tiny(PostNormBlock)
    return {
        "checkpoint": lambda model: model.load_state_dict(other.state_dict()),
        "assigned": lambda model: model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
        "cast": lambda model: model.double(),
        "parametrised": lambda model: parametrizations.weight_norm(model.blocks[0].up),
    }


@pytest.mark.parametrize("how", ["checkpoint", "assigned", "cast", "parametrised"])
def test_weights_that_changed_after_merging_are_not_overwritten(kit: ak.AdapterKit, ids: Tensor, how: str) -> None:
    kit.merge("a")
    changes(ids)[how](kit.model)
    now = weights(kit.model)
    for refused in (lambda: kit.unmerge("a"), lambda: kit.remove("a"), kit.unwrap):
        with pytest.raises(ak.CompatibilityError, match=r"up.weight.* changed since.*restore=False"):
            refused()
    assert same(weights(kit.model), now)
    assert list(kit.adapters) == ["a", "b"]
    kit.unmerge("a", restore=False)
    assert same(weights(kit.model), now)
    kit.deactivate()


def test_an_adapter_acts_on_the_weights_that_were_loaded(kit: ak.AdapterKit, ids: Tensor) -> None:
    other = Tiny(PostNormBlock).eval()
    kit.merge("a")
    kit.model.load_state_dict(other.state_dict())
    kit.unmerge("a", restore=False)
    with kit.base():
        assert torch.equal(kit.model(ids), other(ids))
    assert not torch.allclose(kit.model(ids), other(ids))
    kit.merge("a")


def test_a_second_merge_does_not_build_on_weights_that_changed(kit: ak.AdapterKit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.merge("a")
    monkeypatch.setattr(kit._state().activation, "stays", lambda name: True)  # as a composition of both will
    with torch.no_grad():
        kit.model.blocks[0].up.weight.add_(1)
    with pytest.raises(ak.CompatibilityError, match=r"'blocks.0.up.weight' changed since"):
        kit.merge("b")


def test_moving_a_merged_model_to_another_place_is_no_change(kit: ak.AdapterKit) -> None:
    before = weights(kit.model)
    kit.merge("a")
    for parameter in kit.model.parameters():
        parameter.data = parameter.data.clone()
    kit.unmerge("a")
    assert same(weights(kit.model), before)


# --- refusals -----------------------------------------------------------------------------------------------------------


class Bound(nn.Module):
    """Two layers with one weight, or with one memory."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        if how == "Parameter":
            self.two.weight = self.one.weight
        else:
            self.two.weight.data = self.one.weight.data.t() if how == "transposed" else self.one.weight.data[:]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class ScaledEmbedding(nn.Embedding):
    scale = 3.0

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * self.scale


class SameForward(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.linear(z, self.weight * 1.0, self.bias)


class Strange(nn.Linear):
    def forward(self, z: Tensor, factor: Tensor | None = None) -> Tensor:
        if factor is None:
            raise ValueError("no factor")
        return super().forward(z) * factor


class StrangelyCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Strange(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.ones(()))


class ReadAround(nn.Module):
    """A language model whose output layer is its embedding, by hand."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.embedding, self.layer = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.embedding(ids).to(self.embedding.weight))
        assert x.dtype == self.embedding.weight.dtype
        return x @ self.read(self.embedding.weight)


class MyTensor(Tensor):
    pass


def weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 4)))


def pruned() -> nn.Module:
    layer = nn.Linear(6, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer)


def expanded() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.randn(1, 6).expand(4, 6))
    return nn.Sequential(layer)


def subclassed() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.randn(4, 6).as_subclass(MyTensor))
    return nn.Sequential(layer)


LAYER = ak.LoRAConfig(targets=["0"])
REFUSALS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "bottleneck": (
        lambda: nn.Sequential(nn.Linear(6, 4)),
        ak.BottleneckConfig(targets=["0"]),
        "'0': 'bottleneck' is no change",
    ),
    "union": (
        lambda: nn.Sequential(nn.Linear(6, 4)),
        ak.Union(LAYER, ak.BottleneckConfig(targets=["0"])),
        "'bottleneck' is no change of a weight",
    ),
    "gated": (lambda: nn.Sequential(nn.Linear(6, 4)), LAYER.override({"gating": True}), "'0': a gated LoRA.*depends"),
    "bias of none": (
        lambda: nn.Sequential(nn.Linear(6, 4, bias=False)),
        LAYER.override({"bias": True}),
        "trained bias and the host has none",
    ),
    "tied": (lambda: Bound("Parameter"), ak.LoRAConfig(targets=["one"]), "'one'.*weight is shared with 'two.weight'"),
    "same memory": (lambda: Bound("memory"), ak.LoRAConfig(targets=["one"]), "weight is shared with 'two.weight'"),
    "transposed": (lambda: Bound("transposed"), ak.LoRAConfig(targets=["two"]), "weight is shared with 'one.weight'"),
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4))),
        LAYER,
        r"computed by torch.nn.utils.parametrize \(_WeightNorm\).*remove_parametrizations",
    ),
    "orthogonal": (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6))),
        LAYER,
        "torch.nn.utils.parametrize.*remove_parametrizations",
    ),
    "old weight_norm": (weight_normed, LAYER, r"computed from \['weight_g', 'weight_v'\].*remove_weight_norm"),
    "spectral_norm": (
        lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 4))),
        LAYER,
        r"computed from \['weight_orig'\].*remove_spectral_norm",
    ),
    "pruned": (pruned, LAYER, r"computed from \['weight_orig'\]"),
    "expanded": (expanded, LAYER, "several of whose values are one in memory"),
    "subclass": (subclassed, LAYER, r"weight is a MyTensor \(packed, quantised or sharded\)"),
    "own forward": (
        lambda: nn.Sequential(Strange(6, 4)),
        LAYER,
        "its own forward could not be tried: ValueError: no factor",
    ),
}


def inputs_of(model: nn.Module) -> Tensor:
    return torch.randint(0, 11, (3, 5)) if any(isinstance(m, nn.Embedding) for m in model.modules()) else rows()


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_merged_is_refused_with_the_reason_and_nothing_changes(case: str) -> None:
    build, config, reason = REFUSALS[case]
    model = build()
    kit = adapted(model, config=config)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ak.CompatibilityError, match=rf"adapter 'a' cannot be merged into .*{reason}.*Nothing was changed"):
        kit.merge("a")
    assert same(weights(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not kit.summary().adapters[0].is_merged
    kit.deactivate()


def test_a_host_that_does_more_than_multiply_is_tried() -> None:
    ids = torch.randint(0, 11, (3, 5))
    model = nn.Sequential(ScaledEmbedding(11, 6), nn.Linear(6, 4))
    kit = adapted(model, inputs=ids, config=LAYER)
    with pytest.raises(ak.CompatibilityError, match="ScaledEmbedding does more than multiply by its weight"):
        kit.merge("a")
    for harmless in (ScaledEmbedding(11, 6), nn.Embedding(11, 6)):
        harmless.scale = 1.0
        model = nn.Sequential(harmless, SameForward(6, 4))
        kit = adapted(model, inputs=ids, config=ak.LoRAConfig(targets=["0", "1"]))
        expected, state = model(ids), torch.get_rng_state()
        kit.merge("a")
        close(model(ids), expected)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_was_put_on_the_instance_is_tried_too() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x).abs()  # type: ignore[method-assign]  # as some libraries do
    kit = adapted(model, inputs=rows(), config=LAYER)
    with pytest.raises(ak.CompatibilityError, match="does more than multiply"):
        kit.merge("a")
    model[0].forward = lambda x: plain(x + 0)
    kit.merge("a")


def test_a_trial_looks_at_the_rows_of_a_vocabulary_that_change() -> None:
    model = nn.Sequential(ScaledEmbedding(5000, 6))
    kit = adapted(model, inputs=torch.randint(0, 11, (3, 5)), config=LAYER)
    with torch.no_grad():
        a = next(p for name, p in kit.named_parameters("a") if name.endswith("lora_A"))
        a[:, torch.arange(5000) != 1234] = 0.0
    with pytest.raises(ak.CompatibilityError, match="does more than multiply"):
        kit.merge("a")


def test_a_trial_is_without_dropout_and_leaves_the_mode_alone() -> None:
    class Dropping(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(z, 0.5, self.training))

    model = nn.Sequential(Dropping(6, 4))
    kit = adapted(model, inputs=rows(), config=LAYER.override({"dropout": 0.5}))
    model.train()
    kit.merge("a")
    assert all(module.training for module in model.modules())


@pytest.mark.usefixtures("scaling")
def test_modules_at_one_host_that_depend_on_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that scales by what it reads of the host's own weight, not of the changed one."""
    monkeypatch.setattr(Scaled, "forward", lambda self, z, x: x * self.l.mean() - x * 0.5)
    monkeypatch.setattr(Scaled, "merged", lambda self, tensors: {"weight": tensors["weight"] * self.l.mean()})
    kit = adapted(nn.Sequential(nn.Linear(6, 4)), inputs=rows(), config=ak.Union(LAYER, ScalingConfig(targets=["0"])))
    with pytest.raises(ak.CompatibilityError, match="the modules at it depend on one another"):
        kit.merge("a")


def test_an_embedding_that_shortens_its_rows_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(11, 6))
    kit = adapted(model, config=LAYER)
    model[0].max_norm = 1.0
    with pytest.raises(ak.CompatibilityError, match=r"max_norm=1.0 it changes its weight as it looks rows up"):
        kit.merge("a")


def test_weights_that_lie_side_by_side_in_one_memory_are_not_shared() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)), rows()
    flat = torch.randn(72)
    model[0].weight.data, model[1].weight.data = flat[:36].view(6, 6), flat[36:].view(6, 6)
    kit = adapted(model, inputs=x, config=LAYER)
    expected, other = model(x), flat[36:].clone()
    kit.merge("a")
    close(model(x), expected)
    assert torch.equal(flat[36:], other)


def test_a_small_delta_at_a_host_of_its_own_kind_is_not_drowned_in_rounding() -> None:
    for scale, merges in ((1.0, True), (1.01, False)):
        model = nn.Sequential(ScaledEmbedding(11, 6)).bfloat16()
        model[0].scale = scale
        kit = adapted(model, inputs=torch.randint(0, 11, (3, 5)), config=LAYER)
        with torch.no_grad():
            for parameter in kit.parameters("a"):
                parameter.mul_(0.1)
        if merges:
            kit.merge("a")
        else:
            with pytest.raises(ak.CompatibilityError, match="does more than multiply"):
                kit.merge("a")


def test_a_tied_weight_is_merged_where_the_parameter_itself_is_adapted() -> None:
    model, x = Bound("Parameter"), rows()
    kit = adapted(model, inputs=x, config=ak.LoRAConfig(targets=["one.weight"]))
    assert [site.path for site in kit.sites(ak.LoRAConfig(targets=["one.weight"]))] == ["one", "two"]
    before, expected = weights(model), model(x)
    kit.merge("a")
    close(model(x), expected)
    assert model.one.weight is model.two.weight
    kit.unmerge("a")
    assert same(weights(model), before)


def test_a_parameter_under_two_names_of_one_module_is_merged_once() -> None:
    model, x = nn.Sequential(TwoWeights()), rows()
    kit = adapted(model, inputs=x, config=ak.LoRAConfig(targets=["0.w"], rank=2))
    before, expected = weights(model), model(x)
    kit.merge("a")
    close(model(x), expected)
    kit.unmerge("a")
    assert same(weights(model), before)
    assert torch.equal(model(x), expected)
    model[0].w2 = nn.Parameter(torch.randn(6, 6))
    with pytest.raises(ak.CompatibilityError, match="w, w2 were one Parameter when the adapter was added"):
        kit.merge("a")


def test_a_weight_that_is_read_around_its_module_is_merged_if_the_parameter_is_adapted_and_the_inputs_are_known() -> None:
    ids = torch.randint(0, 11, (3, 5))
    model, config = ReadAround(lambda w: w.T), ak.LoRAConfig(targets=["embedding.weight"])
    kit = adapted(model, config=config)
    with pytest.raises(ak.CompatibilityError, match=r"around it.*'embedding.weight', by this name.*example_inputs=batch"):
        merge(model, state_of(model), "a", ids)
    kit.remove("a")
    kit = adapted(model, inputs=ids, config=config)
    before, expected = weights(model), model(ids)
    kit.merge("a")
    close(model(ids), expected)
    kit.unmerge("a")
    assert same(weights(model), before)


def test_a_tied_weight_is_not_merged_where_one_of_its_modules_is_changed_further() -> None:
    """W + B A in one module and W + B A + B' A' in the other cannot both be written into one W."""
    model = Bound("Parameter")
    both = ak.Union(ak.LoRAConfig(targets=["one.weight"]), ak.LoRAConfig(targets=["two"]))
    kit = adapted(model, inputs=rows(), config=both)
    before = weights(model)
    with pytest.raises(ak.CompatibilityError, match=r"weight is shared with 'two.weight'"):
        kit.merge("a")
    assert same(weights(model), before)
    model.two.bias = model.one.bias
    both = ak.Union(ak.BitFitConfig(targets=["one.bias"]), ak.LoRAConfig(targets=["three"], bias=True))
    model.three, model.forward = nn.Linear(6, 6), lambda x: model.three(model.two(model.one(x)))
    model.three.bias = model.one.bias
    kit.remove("a")
    kit = adapted(model, inputs=rows(), config=both)
    with pytest.raises(
        ak.CompatibilityError, match="'one' reads the same bias, which the adapter changes differently there"
    ):
        kit.merge("a")


def test_a_parameter_that_was_tied_after_it_was_adapted_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    kit = adapted(model, inputs=rows(), config=ak.LoRAConfig(targets=["0.weight"]))
    model[1].weight = model[0].weight
    with pytest.raises(ak.CompatibilityError, match=r"shared with '1.weight'"):
        kit.merge("a")


def test_a_bias_that_is_shared_matters_only_where_it_is_changed() -> None:
    for bias in (False, True):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].bias = model[0].bias
        kit = adapted(model, inputs=rows(), config=ak.LoRAConfig(targets=["0"], bias=bias))
        if bias:
            with pytest.raises(ak.CompatibilityError, match=r"its bias is shared with '1.bias'"):
                kit.merge("a")
        else:
            kit.merge("a")


@pytest.mark.parametrize("read", [lambda w: w.T, lambda w: torch.cat([w, w]).T, lambda w: w.data.T, lambda w: w.float().T])
def test_a_weight_that_the_model_also_reads_around_its_module_is_refused(read: Callable[[Tensor], Tensor]) -> None:
    ids = torch.randint(0, 11, (3, 5))
    model = ReadAround(read)
    kit = adapted(model, inputs=ids, config=ak.LoRAConfig(targets=["embedding"]))
    before = weights(model)
    with pytest.raises(ak.CompatibilityError, match=r"'embedding': 'ReadAround' reads its weight as well, around it"):
        kit.merge("a")
    assert same(weights(model), before)
    kit.remove("a")
    kit = adapted(model, config=ak.LoRAConfig(targets=["layer"]))
    expected = model(ids)
    kit.merge("a")
    close(model(ids), expected)


def test_reading_the_kind_of_a_weight_is_not_reading_it() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            w = self.layer.weight
            self.layer.to(w.dtype)  # as routers do that compute in single precision
            x = x.to(w).to(w.dtype).to(device=w.device).type_as(w)
            return self.layer(x) + w.new_zeros(w.shape[0]) + torch.zeros_like(w)[:, 0]

    kit = adapted(Looking(), inputs=rows(), config=ak.LoRAConfig(targets=["layer"]))
    kit.merge("a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_values_that_are_not_finite_leave_every_weight_as_it_was(dtype: torch.dtype, bad: float) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)
    kit = adapted(model, inputs=rows().to(dtype), config=ak.LoRAConfig(targets=["0", "2"]))
    list(kit.parameters("a"))[-1].data[0, 0] = bad
    before = weights(model)
    if bad == 1e6 and dtype == torch.float32:
        kit.merge("a")
        kit.unmerge("a")
    else:
        reason = "the adapter has values" if bad != 1e6 else "in torch.float16 the merged weight would have values"
        with pytest.raises(ak.CompatibilityError, match=f"into '2': {reason} that are not finite"):
            kit.merge("a")
    assert same(weights(model), before)


def test_a_product_that_overflows_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    kit = adapted(model, inputs=rows(), config=LAYER)
    for parameter in kit.parameters("a"):
        parameter.data.fill_(1e30)
    with pytest.raises(ak.CompatibilityError, match=r"in torch.float32 the merged weight would have values that are not"):
        kit.merge("a")


def test_quantised_and_offloaded_weights_are_refused() -> None:
    for change, reason in (
        (lambda w: nn.Parameter(w.to(torch.int32), requires_grad=False), r"int32 \(quantised"),
        (lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False), r"float8_e4m3fn \(quantised"),
        (lambda w: nn.Parameter(w.new_empty(0)), "is empty here"),
        (lambda w: nn.Parameter(w.to("meta")), "on the meta device"),
        (lambda w: nn.Parameter(w.to_sparse()), "not a dense tensor"),
    ):
        model = nn.Sequential(nn.Linear(6, 6))
        kit = adapted(model, config=LAYER)
        model[0].weight = change(model[0].weight.detach())
        with pytest.raises(ak.CompatibilityError, match=reason):
            kit.merge("a")


def test_a_host_that_was_replaced_is_refused(kit: ak.AdapterKit) -> None:
    kit.model.blocks[0].up = nn.Linear(8, 16)
    with pytest.raises(ak.CompatibilityError, match="was added at 6 modules, of which this Tiny has 5"):
        kit.merge("a")


def test_a_part_of_the_model_cannot_be_merged_alone(kit: ak.AdapterKit) -> None:
    with pytest.raises(ak.CompatibilityError, match="of which this PostNormBlock has 3: merge it in the whole model"):
        ak.wrap(kit.model.blocks[0]).merge("a")


def test_an_interrupted_write_is_undone(kit: ak.AdapterKit, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> None:
    from adapterkit.lifecycle.merging import merge as merging

    before, expected, write, written = weights(kit.model), kit.model(ids), merging._overwrite, []

    def interrupted(parameter: nn.Parameter, value: Tensor) -> None:
        written.append(parameter)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(parameter, value)

    monkeypatch.setattr(merging, "_overwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kit.merge("a")
    assert same(weights(kit.model), before)
    assert torch.equal(kit.model(ids), expected)


# --- inference mode -----------------------------------------------------------------------------------------------------


def test_in_inference_mode(kit: ak.AdapterKit, ids: Tensor) -> None:
    before, expected = weights(kit.model), kit.model(ids)
    with torch.inference_mode():
        kit.merge("a")
        close(kit.model(ids), expected)
    assert not any(original.is_inference() for original in originals_of(kit.model).values())
    twin = copy.deepcopy(kit.model)
    kit.unmerge("a")
    with torch.inference_mode():
        ak.wrap(twin).unmerge("a")
    assert same(weights(kit.model), before)
    assert same(weights(twin), before)
    kit.train_adapter("a")
    kit.model(ids).sum().backward()


def test_a_model_that_was_made_in_inference_mode(ids: Tensor) -> None:
    with torch.inference_mode():
        model = Tiny(PostNormBlock)
    kit = adapted(model, inputs=ids)
    before = weights(model)
    with torch.no_grad():
        expected = model(ids)
        kit.merge("a")
        close(model(ids), expected)
    kit.unmerge("a")
    assert same(weights(model), before)


# --- laws ---------------------------------------------------------------------------------------------------------------

STEPS = ["activate a", "activate b", "merge", "unmerge", "remove b", "add b", "save", "copy", "train"]


@given(st.lists(st.sampled_from(STEPS), max_size=12), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_in_any_order_of_steps_merging_changes_no_output_and_unmerging_restores_every_bit(
    steps: list[str], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model: nn.Module = Tiny(PreNormBlock).to(dtype).eval()
    ids = torch.randint(0, 11, (2, 3))
    kit = adapted(model, "a", "b", inputs=ids, config=ak.LoRAConfig(targets=["query", "mlp.0", "embedding"], alpha=3.0))
    before = weights(model)
    for step in steps:
        active, expected = ak.wrap(model)._state().activation.active, model(ids)
        merged = [row.name for row in kit.summary().adapters if row.is_merged]
        try:
            match step.split():
                case ["activate", name]:
                    kit.activate(name)
                case ["merge"]:
                    kit.merge(active or "a")
                case ["unmerge"]:
                    kit.unmerge(active or "a")
                case ["remove", name]:
                    kit.remove(name)
                case ["add", name]:
                    kit.add(name, LORA.override({"targets": ["value"]}))
                    randomise(kit, name)  # merging what is new would change no bit
                case ["copy"]:
                    model = copy.deepcopy(model)
                    kit = ak.wrap(model, ids)
                case ["train"]:
                    kit.train_adapter(active or "a")
        except (ak.ActivationError, ak.AdapterNameError):
            pass
        now = [row.name for row in kit.summary().adapters if row.is_merged]
        if kit._state().activation.active == active:
            atol = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.1}[dtype]
            torch.testing.assert_close(model(ids), expected, atol=atol, rtol=atol)
        assert now in ([], [active]) if merged or now else True
        assert same(weights(model), before) == (not now)
        assert all(not p.requires_grad for name in now for p in kit.parameters(name))
    kit.unwrap()
    assert same(weights(model), before)


@given(st.permutations(["a", "b", "c"]), st.permutations(["a", "b", "c"]), st.integers(0, 3))
def test_of_several_in_the_weights_any_can_be_taken_out(order: list[str], out: list[str], count: int) -> None:
    """Compositions are to come: what lies below them already keeps the rest, whatever the order."""
    from adapterkit.lifecycle.merging import merge as merging

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).double()
    for name, targets in {"a": ["0"], "b": ["1"], "c": ["0", "1"]}.items():
        kit = adapted(model, name, inputs=rows().double(), config=ak.LoRAConfig(targets=targets))
    before, state = weights(model), kit._state()

    def delta(name: str, path: str) -> Tensor | float:
        pair = [kit.state_dict(name).get(f"{path}._adapterkit.{name}.lora_{x}") for x in "BA"]
        return 0.0 if pair[0] is None else pair[0] @ pair[1]

    for name in order:
        merging._write(model, merged_weights(model, [*state.merged, name]))
        state.merged[name] = ()
    for name in out[:count]:
        kit.unmerge(name)
    rest = [name for name in order if name not in out[:count]]
    assert list(state.merged) == rest
    for path in "01":
        close(model.get_submodule(path).weight, before[f"{path}.weight"] + sum(delta(name, path) for name in rest))
    assert not any("changed since" in problem for problem in kit.verify().problems)
    kit.unwrap()
    assert same(weights(model), before)
