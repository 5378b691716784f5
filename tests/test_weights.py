"""Methods that change weights: which places targets name, and what a changed weight does there."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2Model

import adapterkit as ak

from .conftest import PreNormBlock, Tiny, randomise


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
    assert first.parts == (("q", ((0, 8),)), ("v", ((16, 24),)))
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
    assert places(kit, "lora", targets=["embed.weight"]) == [("", ("embed.weight", "head.weight"))]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    weight = model.embed.weight + 4.0 * b @ a
    expected = model.second(F.linear(F.embedding(ids, weight), weight, model.head.bias))
    torch.testing.assert_close(model(ids), expected)
    assert places(kit, "bitfit") == [("", ("head.bias", "second.bias"))]


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
    assert [(site.path, site.parameters, site.parts) for site in sites] == [
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
    assert (site.path, site.parts) == ("h.0.attn.c_attn", (("q", ((0, 8),)), ("v", ((16, 24),))))
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
