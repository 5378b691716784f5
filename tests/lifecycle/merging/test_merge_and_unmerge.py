"""Merging changes the weights and not what the model computes; unmerging restores them to the bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.lifecycle.merging.merged_weights import merged_weights
from adapterkit.runtime.originals import originals_of

from ...hosts.layers import Conv1D
from ...hosts.merging import Attending, Experts, KeywordCalled, ScalingConfig, TwoNames
from ...hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise
from .helpers import LORA, adapted, close, image, rows, same, weights

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


def test_transposed_and_fused_layers_of_gpt2_compute_the_same_and_are_restored() -> None:
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


def test_merging_in_inference_mode_keeps_the_outputs_and_originals_that_can_be_restored_outside(
    kit: ak.AdapterKit, ids: Tensor
) -> None:
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


def test_a_model_that_was_made_in_inference_mode_is_merged_and_restored(ids: Tensor) -> None:
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
