"""Methods that change weights: which Parameters targets name, and which are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

import adapterkit as ak

from ..hosts.parameters import Experts, Skips
from ..hosts.tiny import PreNormBlock, Tiny, randomise
from .helpers import places


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


def test_rank_and_alpha_may_differ_by_pattern_and_layer() -> None:
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
    assert not any(name.startswith("classifier") for name, _ in kit.named_parameters("a", heads=False))
    with pytest.raises(ak.TargetError, match=r"\['classifier'\] lie inside the head 'classifier'"):
        kit.add("b", "bitfit", heads=["classifier"], targets=["classifier.bias"])


def test_one_module_under_two_names_is_adapted_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "two": layer})
    kit = ak.wrap(model)
    assert places(kit, "lora", targets=["two"]) == [("one", ())]
    assert places(kit, "bitfit") == [("one", ("bias",))]


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
