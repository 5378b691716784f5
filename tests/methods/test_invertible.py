"""What is the invertible adapters' own; the laws of every method are in test_every_method."""

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import adapterkit as ak

from ..hosts.tiny import PostNormBlock, Tiny, randomise

IDS = torch.randint(2, 11, (3, 5), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def places(kit: ak.AdapterKit, config: Any = "invertible") -> list[tuple[str, str, str]]:
    return [(site.path, site.at, site.tag) for site in kit.sites(config)]


class Bare(nn.Module):
    """An embedding and its output embedding, with nothing in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.logits = nn.Embedding(11, width), nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.embedding(ids))


@pytest.mark.parametrize("block", ["nice", "glow"])
@pytest.mark.parametrize("width", [8, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_enters_the_output_embedding_is_what_left_the_embedding(block: str, width: int, dtype: torch.dtype) -> None:
    model = Bare(width).to(dtype)
    base = model(IDS)
    kit = ak.wrap(model)
    kit.add("a", ak.InvertibleConfig(targets=["embedding"], output_targets=["logits"], block=block))
    randomise(kit, "a")
    kit.activate("a")
    between: list[Tensor] = []
    model.logits.register_forward_pre_hook(lambda _, args: between.append(args[0]), prepend=True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(model(IDS), base, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(between[0], model.embedding.weight[IDS], atol=0.1)


def test_a_plain_masked_language_model_is_inverted_before_its_logits() -> None:
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    kit = ak.wrap(model, IDS)
    assert places(kit) == [
        ("bert.embeddings", "output", "forward"),
        ("cls.predictions.decoder", "input", "inverse"),
    ]
    kit.add("a", "invertible")
    randomise(kit, "a")
    kit.activate("a")
    coupling = next(m for m in model.modules() if type(m).__name__ == "Coupling")
    seen: list[Tensor] = []
    model.cls.predictions.transform.register_forward_hook(lambda *args: seen.append(args[-1]))
    logits = model(IDS).logits
    h = seen[0] + coupling(seen[0], inverse=True)
    torch.testing.assert_close(logits, h @ model.cls.predictions.decoder.weight.T + model.cls.predictions.decoder.bias)


def test_a_model_without_an_output_embedding_has_the_forward_alone() -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval(), IDS)
    assert places(kit) == [("embedding", "output", "forward")]


def test_both_stacks_of_an_encoder_decoder_share_one_coupling() -> None:
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    kit = ak.wrap(model, {"input_ids": IDS, "decoder_input_ids": IDS})
    assert places(kit) == [
        ("encoder.embed_tokens", "output", "forward"),
        ("decoder.embed_tokens", "output", "forward"),
        ("lm_head", "input", "inverse"),
    ]
    kit.add("a", "invertible")
    assert len(list(kit.parameters("a"))) == 8  # F and G, two layers each, weights and biases


def test_an_inverse_can_be_left_out() -> None:
    kit = ak.wrap(Bare(8))
    assert places(kit, ak.InvertibleConfig(targets=["embedding"], output_targets=())) == [
        ("embedding", "output", "forward")
    ]


def test_a_pattern_for_the_inverse_must_match() -> None:
    kit = ak.wrap(Bare(8))
    with pytest.raises(ak.TargetError, match="lm_head"):
        kit.add("a", ak.InvertibleConfig(targets=["embedding"], output_targets=["lm_head"]))
    assert not kit.adapters


def test_places_of_different_widths_are_refused_and_can_be_named() -> None:
    """ALBERT projects its embeddings to the hidden size, and the hidden states back."""
    model = AlbertForMaskedLM(AlbertConfig(**SMALL, embedding_size=8)).eval()
    kit = ak.wrap(model, IDS)
    with pytest.raises(
        ak.TargetError, match=r"one width at all of its places; found 16 at '.*mapping_in', 8 at '.*decoder'"
    ):
        kit.add("a", "invertible")
    assert not kit.adapters
    assert places(kit, ak.InvertibleConfig(targets=["albert.embeddings"])) == [
        ("albert.embeddings", "output", "forward"),
        ("predictions.decoder", "input", "inverse"),
    ]


def test_one_feature_is_refused_before_anything_changes() -> None:
    kit = ak.wrap(Bare(1))
    with pytest.raises(ak.ConfigError, match="found a width of 1"):
        kit.add("a", ak.InvertibleConfig(targets=["embedding"], output_targets=["logits"]))
    assert not kit.adapters


@pytest.mark.parametrize("preset", ["madx", "seq_bn_inv"])
def test_madx_is_an_invertible_adapter_and_pfeiffers(preset: str) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval(), IDS)
    assert places(kit, preset) == places(kit, "invertible") + places(kit, "pfeiffer")


def test_stacked_adapters_are_undone_last_first() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Identity(), nn.Linear(8, 20))
    ids = torch.randint(0, 20, (2, 5))
    kit = ak.wrap(model, ids)
    for name in ("de", "fr", "en"):
        kit.add(name, ak.InvertibleConfig(targets=["0"], output_targets=["2"]))
        with torch.no_grad():
            for parameter in kit.parameters(name):
                parameter.normal_(std=0.5)
    expected = model(ids)
    for composition in (
        ak.Stack("de", "fr", "en"),
        ak.Rows([ak.Stack("fr", ak.Stack("en", "de")), ak.Stack("de", ak.Drop("en", layers=()), "fr")]),
    ):
        with kit.active(composition):
            torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


# --- the config -------------------------------------------------------------------------------------------------------

configs = st.builds(
    lambda settings: ak.InvertibleConfig(**settings),
    st.fixed_dictionaries(
        {},
        optional={
            "block": st.sampled_from(["nice", "glow"]),
            "reduction_factor": st.sampled_from([0.5, 2, 3.5]),
            "non_linearity": st.sampled_from(["relu", "gelu"]),
            "targets": st.sampled_from(["wte", ("wte",), ["@embedding", "x"]]),
            "output_targets": st.sampled_from(["lm_head", (), ["@output_embedding"]]),
            "seed": st.none() | st.integers(0, 9),
        },
    ),
)


@given(configs)
def test_a_config_survives_json_pickle_and_repetition(config: ak.InvertibleConfig) -> None:
    again = ak.InvertibleConfig.model_validate_json(config.model_dump_json())
    assert again == config == pickle.loads(pickle.dumps(config))
    assert hash(again) == hash(config)


def test_defaults_are_the_papers() -> None:
    config = ak.InvertibleConfig()
    assert (config.block, config.reduction_factor, config.non_linearity) == ("nice", 2.0, "relu")
    assert (config.targets, config.output_targets) == (("@embedding",), ("@output_embedding",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": "affine"}, "block.*found 'affine'"),
        ({"reduction_factor": 0}, "reduction_factor.*found '0'"),
        ({"targets": []}, "targets.*at least 1"),
        ({"non_linearity": "rellu"}, "non_linearity.*found 'rellu'"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_found(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        ak.InvertibleConfig(**settings)
