"""Methods that change weights: which places targets name, and what a changed weight does there."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2Model, T5Config, T5ForConditionalGeneration

import adapterkit as ak
from adapterkit.runtime.lookup import sites_of

from ..hosts.tiny import PreNormBlock, Tiny, randomise


def places(kit: ak.AdapterKit, config: Any, **settings: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(site.path, site.parameters) for site in kit.sites(config, **settings)]


class Experts(nn.Module):
    """A mixture of experts that keeps its weights in one tensor, (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4, 6))
        self.register_parameter("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("...i,eoi->...eo", x, self.up).relu()
        return torch.einsum("...eo,eio->...i", hidden, self.down)


class ReadsAround(nn.Module):
    """Reads a child's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.proj.weight, self.proj.bias))


class Tied(nn.Module):
    """An embedding whose weight is that of the output layer, and a bias that two modules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.second = nn.Linear(7, 7)
        self.second.bias = self.head.bias

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.head(self.embed(ids)))


# --- which places -----------------------------------------------------------------------------------------------------


def test_multihead_attention_is_adapted_at_its_parameters() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    kit = ak.wrap(model, torch.randn(2, 3, 8))
    whole = places(kit, "lora", targets=["self_attn"])
    assert whole[:2] == [("layers.0.self_attn", ("in_proj_weight",)), ("layers.0.self_attn", ("out_proj.weight",))]
    assert places(kit, "lora", targets=["out_proj"]) == whole[1::2]
    assert places(kit, "lora", targets=["in_proj_weight"]) == whole[::2]
    assert places(kit, "lora", targets=["@attention.q", "@attention.v"]) == whole[::2]
    (first, _) = kit.sites("lora", targets=["@attention.v", "@attention.q"])
    assert first.slices == (("q", ((0, 8),)), ("v", ((16, 24),)))
    assert places(kit, "lora", targets=["self_attn"], exclude=["out_proj"]) == whole[::2]
    assert len(places(kit, "bitfit")) == 2 * 6
    assert ("layers.1.self_attn", ("out_proj.bias",)) in places(kit, "bitfit")


def test_multihead_attention_with_other_widths_for_keys_has_a_parameter_for_each_part() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)
    kit = ak.wrap(model)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert places(kit, "lora", targets=[""]) == [("", (name,)) for name in names]
    inputs = torch.randn(2, 3, 8), torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    base = model(*inputs)[0]
    kit.add("a", "lora", targets=[""])
    randomise(kit, "a")
    kit.activate("a")
    assert not torch.allclose(model(*inputs)[0], base)


def test_a_parameter_of_several_axes_has_a_pair_of_factors_for_each_index_of_the_first_ones() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Experts())
    kit = ak.wrap(model)
    assert places(kit, "lora", targets=["1.up", "1.down"]) == [("1", ("up",)), ("1", ("down",))]
    kit.add("a", "lora", targets=["1.up"], rank=2, alpha=6)
    randomise(kit, "a")
    kit.activate("a")
    (a, b), x = kit.parameters("a"), torch.randn(5, 4)
    assert (a.shape, b.shape) == ((3, 2, 4), (3, 6, 2))
    expected = Experts()
    expected.load_state_dict({"up": model[1].up + 3.0 * b @ a, "down": model[1].down})
    torch.testing.assert_close(model(x), expected(model[0](x)))


def test_a_tied_parameter_is_changed_for_all_that_read_it() -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["embed.weight"], rank=2)
    assert places(kit, "lora", targets=["embed.weight"]) == [("embed", ("weight",)), ("head", ("weight",))]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    weight = model.embed.weight + 4.0 * b @ a
    expected = model.second(F.linear(F.embedding(ids, weight), weight, model.head.bias))
    torch.testing.assert_close(model(ids), expected)
    assert places(kit, "bitfit") == [("head", ("bias",)), ("second", ("bias",))]
    assert (kit.summary().adapters[0].parameters, len(list(kit.parameters("a")))) == (2 * (4 + 7), 2), "trains once"


def test_a_module_of_a_tied_weight_is_adapted_alone() -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["head"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    hidden = model.embed(ids)
    expected = model.second(F.linear(hidden, model.head.weight, model.head.bias) + 4.0 * hidden @ a.T @ b.T)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_read_around_its_module_is_adapted_by_its_name_alone() -> None:
    model, x = ReadsAround(), torch.randn(2, 4)
    kit = ak.wrap(model, x)
    with pytest.raises(ak.TargetError, match=r"'proj' never ran .* If '' reads it, name the Parameter \('proj.weight'"):
        kit.add("a", "lora", targets=["proj"])
    base = model(x)
    kit.add("a", "lora", targets=["proj.weight"])
    assert places(kit, "lora", targets=["proj.weight"]) == [("", ("proj.weight",))]
    randomise(kit, "a")
    kit.activate("a")
    assert not torch.allclose(model(x), base)
    kit.verify().require()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["nothing"]}, "'nothing' matches no module of Tiny, which has 28 modules and 35 Parameters"),
        (
            {"targets": ["query"], "exclude": ["kwery"]},
            "^exclude: 'kwery' matches no module of Tiny.* Nearest: 'key', 'query'",
        ),
        ({"targets": ["query"], "exclude": ["norm_1.wait"]}, "^exclude: 'norm_1.wait' .* Nearest: 'norm_1.weight'"),
        (
            {"targets": ["norm_1"]},
            r"'blocks.0.norm_1' \(LayerNorm\) applies no weight .* holds the Parameters .*norm_1.weight",
        ),
        ({"targets": ["norm_1.weight"]}, r"'weight' of 'blocks.0.norm_1' has shape \(8,\)"),
        ({"targets": ["mlp"]}, r"'blocks.0.mlp' \(Sequential\) applies no weight .* below it lie \['blocks.0.mlp.0'"),
        ({"targets": ["query"], "exclude": ["query"]}, "is excluded by exclude="),
        ({"targets": ["query"], "layers": [5]}, r"none of the 2 modules that match lies in \[5\]"),
        (
            {"targets": ["query"], "rank": {"default": 2, "qeury": 4}},
            r"rank has values for \['qeury'\], which fit none of the 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was(settings: dict[str, Any], message: str) -> None:
    model = Tiny(PreNormBlock)
    before = list(model.state_dict())
    with pytest.raises(ak.TargetError, match=message):
        ak.wrap(model).add("a", "lora", **settings)
    assert list(model.state_dict()) == before


def test_rank_and_alpha_by_pattern_and_layer() -> None:
    kit = ak.wrap(Tiny(PreNormBlock))
    ranks = {"default": 1, "value": 2, "blocks.1.**.value": 3, "0": 4}
    kit.add("a", "lora", targets=["query", "value"], rank=ranks, alpha={"default": 8, "value": 16})
    shapes = {name.split("._")[0]: p.shape[0] for name, p in kit.named_parameters("a") if name.endswith("lora_A")}
    assert shapes == {
        "blocks.0.attention.query": 4,
        "blocks.0.attention.value": 2,
        "blocks.1.attention.query": 1,
        "blocks.1.attention.value": 3,
    }
    scales = [m.scaling for m in kit.model.modules() if type(m).__name__ == "LoRA"]
    assert scales == [8 / 4, 16 / 2, 8 / 1, 16 / 3]


def test_bitfit_leaves_the_biases_of_a_head_to_the_head() -> None:
    kit = ak.wrap(Tiny(PreNormBlock))
    kit.add("a", "bitfit", heads=["classifier"])
    assert not any(name.startswith("classifier") for name, _ in kit.named_parameters("a"))
    with pytest.raises(ak.TargetError, match=r"\['classifier'\] lie inside the head 'classifier'"):
        kit.add("b", "bitfit", heads=["classifier"], targets=["classifier.bias"])


# --- what a changed weight does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_read_their_changed_weights(kind: type[nn.Module]) -> None:
    model, x = kind(4, 6, num_layers=2), torch.randn(3, 2, 4)
    base = model(x)[0]
    kit = ak.wrap(model)
    kit.add("a", ak.Union(ak.BitFitConfig(), ak.LoRAConfig(targets=["weight_hh_l1"], rank=2)))
    kit.train_adapter("a")
    assert torch.equal(model(x)[0], base)
    randomise(kit, "a")
    adapted = model(x)[0]
    expected = kind(4, 6, num_layers=2)
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "_adapterkit" not in k})
    with torch.no_grad():
        for entry, module in model._adapterkit.modules_of("a"):
            name = entry.spec.parameters[0]
            expected.get_parameter(name).copy_(module.adapted(model.get_parameter(name)))
    torch.testing.assert_close(adapted, expected(x)[0])
    adapted.sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))
    with kit.base():
        assert torch.equal(model(x)[0], base)


def test_a_layer_called_by_keyword_is_adapted() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    model, x = ByKeyword(), torch.randn(2, 4)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["inner"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x), model.inner.weight.matmul(x.T).T + model.inner.bias + 4.0 * x @ a.T @ b.T)


def test_one_module_under_two_names_is_adapted_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "two": layer})
    kit = ak.wrap(model)
    assert places(kit, "lora", targets=["two"]) == [("one", ())]
    assert places(kit, "bitfit") == [("one", ("bias",))]


def test_an_exception_in_the_host_takes_the_changed_weight_away() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    kit = ak.wrap(model)
    kit.add("a", "bitfit")
    randomise(kit, "a")
    kit.activate("a")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 5))
    assert "bias" not in vars(model[0])
    assert model[0].bias is model[0]._parameters["bias"]
    model(torch.randn(2, 4))


def test_parameters_stay_where_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    bias, seen = model[0].bias, []
    kit = ak.wrap(model)
    kit.add("a", "bitfit")
    kit.activate("a")
    model[0].register_forward_hook(lambda *_: seen.append(model[0].bias))
    model(torch.randn(2, 4))
    assert model[0].bias is bias
    assert dict(model.named_parameters())["0.bias"] is bias
    assert seen == [bias], "taken away before the hooks of others"


def test_threads_with_one_adapter_get_right_answers() -> None:
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    kit = ak.wrap(model)
    kit.add("a", ak.Union(ak.BitFitConfig(), ak.LoRAConfig(targets=["0.weight"], rank=2)))
    randomise(kit, "a")
    kit.train_adapter("a")
    inputs = [torch.randn(3, 16) for _ in range(4)]
    expected = [model(x).detach() for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(60):
            y = model(inputs[index])
            y.sum().backward()
            if not torch.equal(y.detach(), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_functional_call_and_vmap_see_the_change() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    kit = ak.wrap(model)
    kit.add("a", ak.Union(ak.BitFitConfig(), ak.LoRAConfig(targets=["weight"], rank=2)))
    randomise(kit, "a")
    kit.activate("a")
    torch.testing.assert_close(torch.vmap(model)(x), model(x))
    doubled = {"weight": 2 * model.weight, "bias": model.bias}
    torch.testing.assert_close(
        torch.func.functional_call(model, doubled, (x,)), model(x) + x @ model.weight.T, rtol=1e-4, atol=1e-5
    )


def test_the_members_of_a_union_act_in_order_at_one_host() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    kit = ak.wrap(model)
    bottleneck = ak.BottleneckConfig(targets=[""], bottleneck_size=2)
    kit.add(
        "a", ak.Union(ak.LoRAConfig(targets=[""], rank=2), bottleneck, ak.IA3Config(targets=[""], feedforward_targets=()))
    )
    randomise(kit, "a")
    kit.activate("a")
    lora, adapter, ia3 = (module for _, module in model._adapterkit.modules_of("a"))
    y = F.linear(x, model.weight + 4.0 * lora.lora_B @ lora.lora_A, model.bias)
    y = y + adapter(y, y)
    torch.testing.assert_close(model(x), y * ia3.ia3_l)
    summary = kit.summary().adapters[0]
    assert (summary.method, summary.sites) == ("union", 3)


def test_a_weight_normed_layer_is_adapted_at_its_output() -> None:
    model, x = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(5, 4)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=[""], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x), F.linear(x, model.weight + 4.0 * b @ a, model.bias))
    with pytest.raises(ak.TargetError, match=r"'weight' is no Parameter: WeightNorm of '' computes it.* the module '' "):
        kit.add("b", "lora", targets=["weight"])


def test_the_query_of_an_attention_with_other_widths_for_keys_is_a_parameter_of_its_own() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x, memory, memory)[0]
            return x

    kit = ak.wrap(Decoder(), (torch.randn(2, 3, 8), torch.randn(2, 4, 5)))
    sites = kit.sites("lora", targets=["@crossattention.q"])
    assert [(site.path, site.parameters, site.slices) for site in sites] == [
        (f"layers.{i}", ("q_proj_weight",), ()) for i in range(2)
    ]


def test_a_slice_of_a_fused_projection_is_adapted_alone() -> None:
    """GPT-2's: thirds of `c_attn`, and the change is that of B A in the query's and the value's columns of its weight."""
    model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8)).eval()
    ids = torch.randint(0, 20, (2, 5))
    kit = ak.wrap(model)
    kit.add("a", "lora", rank=2, alpha=6)
    randomise(kit, "a")
    (site,) = kit.sites("lora")
    assert (site.path, site.slices) == ("h.0.attn.c_attn", (("q", ((0, 8),)), ("v", ((16, 24),))))
    a, b = kit.parameters("a")
    delta = torch.zeros(24, 8)
    delta[:8], delta[16:] = 3.0 * b[:8] @ a[:2], 3.0 * b[8:] @ a[2:]
    weight = {"h.0.attn.c_attn.weight": model.h[0].attn.c_attn.weight + delta.T}
    expected = torch.func.functional_call(model, weight, (ids,))[0]
    kit.activate("a")
    torch.testing.assert_close(model(ids)[0], expected)


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's and BART's do."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4.0


class Plain(nn.Linear):
    """A linear layer that spells out what it does, as Falcon's does."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_dora_is_refused_where_the_output_is_not_the_product_with_the_weight() -> None:
    model = nn.Sequential(Scaled(7, 4), Plain(4, 4))
    kit = ak.wrap(model)
    with pytest.raises(ak.TargetError, match=r"'0' \(Scaled\) has a forward of its own .* use LoRA there"):
        kit.add("a", "dora", targets=["0"])
    kit.add("a", "dora", targets=["1"])
    kit.add("b", "lora", targets=["0"])


def test_dora_comes_first_among_the_members_of_a_union_at_one_host() -> None:
    kit = ak.wrap(nn.Linear(4, 4))
    lora, dora = ak.LoRAConfig(targets=[""]), ak.LoRAConfig(targets=[""], use_dora=True)
    with pytest.raises(ak.TargetError, match=r"members 0 and 1 of a union, and the latter \(DoRA\) must come first"):
        kit.add("a", ak.Union(lora, dora))
    kit.add("a", ak.Union(dora, lora))


class Skips(nn.Module):
    """Has a part that runs for some inputs only, as the vision tower of a language model does."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.vision = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
        return self.text(x if pixels is None else x + self.vision(pixels))


def test_parts_that_do_not_run_on_the_inputs_are_adapted_where_they_are_if_everything_is() -> None:
    model, x = Skips(), torch.randn(2, 4)
    kit = ak.wrap(model, x)
    assert places(kit, "bitfit") == [("text", ("bias",)), ("vision.0", ("bias",)), ("vision.1", ("bias",))]
    with pytest.raises(ak.TargetError, match=r"the Parameter 'bias' of 'vision.0' was never read on the example inputs"):
        kit.add("a", "bitfit", targets=["vision.0.bias"])
    with pytest.raises(ak.TargetError, match=r"'vision.0' never ran on the example inputs"):
        kit.add("a", "lora", targets=["vision.0"])


def test_shared_tensors_load_whatever_the_order_of_the_targets(tmp_path: Path) -> None:
    """A config's sites are layers, then Parameters; those of a file are in the model's order."""
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval(), torch.randn(2, 3, 8)
    kit = ak.wrap(model, x)
    kit.add("a", "vera", targets=["linear2", "self_attn.in_proj_weight"], rank=4)
    randomise(kit, "a")
    kit.save("a", tmp_path)
    kit.load(tmp_path, "b")
    with kit.active("a"):
        expected = model(x)
    with kit.active("b"):
        assert torch.equal(model(x), expected)


class Keywords(nn.Linear):
    """A layer with a second argument, which some call first."""

    def forward(self, input: Tensor, scale: Tensor | None = None) -> Tensor:  # noqa: A002  # torch's name
        return super().forward(input)


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Keywords(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(scale=torch.ones(6) * 9, input=x)


def test_the_input_is_told_by_its_keyword_whatever_the_order() -> None:
    model, x = Caller(), torch.randn(2, 6)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["layer"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x), F.linear(x, model.layer.weight + 4.0 * b @ a, model.layer.bias))


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it
def test_a_compiled_root_that_ran_the_base_first_runs_its_adapter_afterwards() -> None:
    model, x = OwnParameter(), torch.randn(2, 6)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["w"])
    randomise(kit, "a")
    kit.activate("a")
    adapted = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with kit.base():
        torch.testing.assert_close(compiled(x), x @ model.w)
    torch.testing.assert_close(compiled(x), adapted)


def test_dora_and_a_changed_bias_at_one_layer_follow_the_formula_and_merge() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6).double()
    kit = ak.wrap(model)
    kit.add("a", ak.Union(ak.LoRAConfig(targets=["0"], use_dora=True, rank=2), ak.BitFitConfig(targets=["0"])))
    randomise(kit, "a")
    kit.activate("a")
    dora, delta = (module for _, module in model[0]._adapterkit.modules_of("a"))
    v = model[0].weight + 4.0 * dora.lora_B @ dora.lora_A
    weight = dora.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)
    expected = F.linear(x, weight, model[0].bias + delta.delta)
    torch.testing.assert_close(model(x), expected)
    kit.merge("a")
    torch.testing.assert_close(model(x), expected)


def test_dora_measures_the_base_and_not_what_is_merged_into_it() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6)
    base, kit = model(x), ak.wrap(model)
    kit.add("a", "lora", targets=["0"])
    randomise(kit, "a")
    kit.activate("a")
    kit.merge("a")
    kit.add("d", "dora", targets=["0"])
    kit.unmerge("a")
    kit.activate("d")
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dora_is_refused_where_a_weight_cannot_be_measured_and_nothing_moves(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(6, 6)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kit = ak.wrap(model)
    with pytest.raises(ak.TargetError, match=r"computed before each forward.*use LoRA there"):
        kit.add("a", "dora", targets=["0"])
    kit.add("a", "lora", targets=["0"])
    kit.sites("ia3", targets=["0"], feedforward_targets=[])
    kit.unwrap()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_dora_can_be_built_on_the_meta_device_and_says_why_not_on_quantised_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6))
    ak.wrap(model).add("a", "dora", targets=["0"])
    assert model[0]._adapterkit.first_module("a").magnitude.shape == (6,)
    packed = nn.Sequential(nn.Linear(6, 6, bias=False))
    packed[0].weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ak.TargetError, match=r"is torch\.int8, quantised: it has no length"):
        ak.wrap(packed).add("a", "dora", targets=["0"])


# --- one Parameter in several places ------------------------------------------------------------------------------------


class SharedLayers(nn.Module):
    """Two blocks that hold one weight and bias, and may be checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):

            def block(x: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(x.sin()).tanh()

            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [ak.BitFitConfig(targets=["a.bias"]), ak.LoRAConfig(targets=["a.weight"], rank=2)])
def test_a_tied_parameter_has_the_same_gradients_in_checkpointed_blocks(config: Any, reentrant: bool) -> None:
    x, gradients = torch.randn(3, 6, dtype=torch.float64), []
    state = SharedLayers().double().state_dict()
    for model in (SharedLayers().double(), SharedLayers(reentrant).double()):
        model.load_state_dict(state)
        kit = ak.wrap(model)
        kit.add("a", config)
        torch.manual_seed(1)
        randomise(kit, "a")
        kit.train_adapter("a")
        model(x.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad for p in kit.parameters("a")])
    torch.testing.assert_close(gradients[1], gradients[0])


class AroundToo(nn.Module):
    """Calls an embedding, and reads its weight around it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.emb(ids).tanh() @ self.emb.weight.T


def test_a_parameter_is_adapted_in_its_module_and_around_it() -> None:
    model, ids = AroundToo().double(), torch.randint(0, 11, (2, 3))
    kit = ak.wrap(model, ids)
    kit.add("a", "lora", targets=["emb.weight"], rank=2, alpha=6)
    assert places(kit, "lora", targets=["emb.weight"]) == [("", ("emb.weight",))]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    weight = model.emb.weight + 3.0 * b @ a
    torch.testing.assert_close(model(ids), F.embedding(ids, weight).tanh() @ weight.T)
    kit.verify().require()


def test_of_a_tied_parameter_only_the_holder_that_is_read_around_has_another_host() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = AroundToo(), nn.Linear(6, 11, bias=False)
            self.head.weight = self.inner.emb.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(ids)) @ self.head.weight.new_ones(11, 6))

    kit = ak.wrap(Both(), torch.randint(0, 11, (2, 3)))
    assert places(kit, "lora", targets=["emb.weight"]) == [("inner", ("emb.weight",)), ("head", ("weight",))]


def test_a_holder_that_does_not_run_on_the_inputs_is_adapted_for_others_that_run_it(tmp_path: Path) -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor, second: bool = False) -> Tensor:
            return (self.two if second else self.one)(x)

    model, x = Switch().double(), torch.randn(2, 4, dtype=torch.float64)
    kit = ak.wrap(model, x)
    kit.add("a", "lora", targets=["one.weight"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x, True), F.linear(x, model.one.weight + 4.0 * b @ a, model.two.bias))
    kit.verify().require()


def test_both_names_of_a_parameter_in_one_module_are_adapted() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.w2 = self.w

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w.T).tanh() @ self.w2

    model, x = TwoNames().double(), torch.randn(2, 4, dtype=torch.float64)
    kit = ak.wrap(model, x)
    kit.add("a", "lora", targets=["w"], rank=2)
    assert places(kit, "lora", targets=["w"]) == [("", ("w", "w2"))]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    w = model.w + 4.0 * b @ a
    torch.testing.assert_close(model(x), (x @ w.T).tanh() @ w)


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=1, vocab_size=20, decoder_start_token_id=0, eos_token_id=19
    )
    return T5ForConditionalGeneration(config).eval()


def test_generation_of_an_encoder_decoder_reads_the_adapted_embedding_as_its_forward_does() -> None:
    """It calls the encoder on its own."""
    model, ids = t5(), torch.randint(1, 19, (2, 5))
    kit = ak.wrap(model, {"input_ids": ids, "decoder_input_ids": ids})
    kit.add("a", "lora", targets=["shared.weight"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    found = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with kit.base():
        base = model(input_ids=ids, decoder_input_ids=found.sequences[:, :1]).logits
    for step, logits in enumerate(found.logits, 1):
        expected = model(input_ids=ids, decoder_input_ids=found.sequences[:, :step]).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.logits[0], base[:, -1], atol=0.1)


@pytest.mark.parametrize("method", ["lora", "vera", "dora"])
def test_copies_files_and_merging_know_a_tied_parameter_once(method: str, tmp_path: Path) -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", method, targets=["head.weight"], rank=2)
    randomise(kit, "a")
    kit.train_adapter("a")
    expected = model(ids)
    expected.sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))
    kit.save("a", tmp_path)
    kit.load(tmp_path, "b")
    assert {k: v.shape for k, v in kit.state_dict("b").items()} == {
        k.replace(".a.", ".b."): v.shape for k, v in kit.state_dict("a").items()
    }
    with kit.active("b"):
        assert torch.equal(model(ids), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ak.wrap(twin).parameters("a"):
            parameter.zero_()
        assert not torch.allclose(twin(ids), expected), "trains its own"
    assert torch.equal(model(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), expected)
    before = model.embed.weight.clone()
    kit.merge("a")
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    kit.unmerge("a")
    assert torch.equal(model.embed.weight, before)
    kit.unwrap()
    assert not any("_adapterkit" in name for name, _ in model.named_modules())


def test_a_part_that_holds_a_twin_is_saved_with_what_it_stands_for(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    model[1][0].weight = model[0].weight
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["0.weight"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    part = ak.wrap(model[1])
    part.save("a", tmp_path)
    plain = nn.Sequential(nn.Linear(4, 4))
    plain.load_state_dict({k: v for k, v in model[1].state_dict().items() if "_adapterkit" not in k})
    loaded = ak.wrap(plain)
    loaded.activate(loaded.load(tmp_path))
    assert torch.equal(plain(x), model[1](x))


def test_a_tied_parameter_has_the_rank_that_a_pattern_gives_it_under_any_of_its_names() -> None:
    kit = ak.wrap(Tied())
    kit.add("a", "lora", targets=["embed.weight"], rank={"default": 1, "head": 3})
    assert [p.shape for p in kit.parameters("a")] == [(3, 4), (7, 3)]
    with pytest.raises(ak.TargetError, match=r"\['embed', 'head'\] hold one Parameter, which has one change"):
        kit.add("b", "lora", targets=["embed.weight"], rank={"default": 1, "head": 3, "embed": 2})


def test_a_tied_parameter_outside_of_a_head_is_adapted_there() -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["embed.weight"], rank=2, heads=["head"])
    assert [path for path, _, site in sites_of(model) for entry in site.entries["a"] if entry.spec] == ["embed"]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    hidden = F.embedding(ids, model.embed.weight + 4.0 * b @ a)
    torch.testing.assert_close(model(ids), model.second(F.linear(hidden, model.head.weight, model.head.bias)))


def test_a_compiled_model_adapts_a_tied_parameter() -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["embed.weight"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize("config", [ak.LoRAConfig(), ak.VeRAConfig(), ak.IA3Config()])
def test_a_role_in_what_is_no_transformer_says_which_modules_there_are(config: Any) -> None:
    kit = ak.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(
        ak.TargetError, match=r"tracing Sequential finds no such place.* name modules, e.g. targets=\['0', '2'\]"
    ):
        kit.sites(config)
    with pytest.raises(
        ak.TargetError, match=r"^exclude: '@block.in': .* name modules, e.g. \['0', '2'\]|^exclude: '@block.in'"
    ):
        kit.sites(config, targets=["0"], exclude=["@block.in"])


def test_a_parameter_of_multihead_attention_that_is_computed_is_refused() -> None:
    model = nn.utils.parametrizations.orthogonal(nn.MultiheadAttention(4, 2), "in_proj_weight")
    with pytest.raises(ak.TargetError, match="'in_proj_weight' is no Parameter: Orthogonal of '' computes it"):
        ak.wrap(model).sites("lora", targets=[""])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("computed", "sources", "way_out"),
    [
        (nn.utils.weight_norm, ["weight_g", "weight_v"], "remove_weight_norm"),
        (nn.utils.spectral_norm, ["weight_orig"], "remove_spectral_norm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), ["weight_orig"], "prune.remove"),
    ],
)
def test_what_a_hook_of_the_module_itself_computes_its_weight_from_is_refused(
    computed: Any, sources: list[str], way_out: str
) -> None:
    model, x = nn.Sequential(computed(nn.Linear(4, 3))).eval(), torch.randn(5, 4)
    model(x)
    kit = ak.wrap(model)
    for source in sources:
        with pytest.raises(ak.TargetError, match=rf"'0.{source}' would do nothing: .* Target the module '0' .*{way_out}"):
            kit.add("a", "lora", targets=[f"0.{source}"])
    with pytest.raises(ak.TargetError, match=rf"'0.weight' is no Parameter: .* Target the module '0' .*{way_out}"):
        kit.add("a", "lora", targets=["0.weight"])
    kit.add("a", "lora", targets=["0"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight + 4.0 * b @ a, model[0].bias))


def test_a_pruned_bias_is_refused() -> None:
    kit = ak.wrap(prune.l1_unstructured(nn.Linear(4, 3), "bias", 1))
    with pytest.raises(
        ak.TargetError, match=r"'bias_orig' would do nothing: .*\(L1Unstructured\).* Exclude it, or end that"
    ):
        kit.sites("bitfit")


def test_verify_says_who_reads_a_parameter_around_its_module() -> None:
    model, x = ReadsAround(), torch.randn(2, 4)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["proj.weight"])
    kit.activate("a")
    (problem,) = [p for p in kit.verify(x).problems if "never ran" in p]
    assert "'proj' never ran on the example inputs: ReadsAround reads its 'weight' around it" in problem
    assert "example_inputs=batch" in problem


def test_verify_says_that_nothing_reads_a_parameter() -> None:
    model = Skips()
    kit = ak.wrap(model)
    kit.add("a", "bitfit")
    kit.activate("a")
    problems = [p for p in kit.verify(torch.randn(2, 4)).problems if "never ran" in p]
    assert [p.partition(",")[0] for p in problems] == [
        "'vision.0' never ran on the example inputs",
        "'vision.1' never ran on the example inputs",
    ]
    assert all("nothing else read its 'bias'" in p and "verify with inputs that run it" in p for p in problems)
