"""`@linear`: every linear layer of the blocks, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import adapterkit as ak

from ..hosts.blocks import VOCAB, WIDTH, Attention, FeedForward, Model, Pre, randomised

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "intermediate_size": 12}
IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SMALL, **HEADS))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=32))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, num_key_value_heads=1))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2))


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(**SMALL, state_size=4))


def names(model: nn.Module, **settings: object) -> set[str]:
    sites = ak.wrap(model).sites("lora", **{"targets": "all-linear", **settings})
    return {f"{site.path}.{site.parameters[0]}" if site.parameters else site.path for site in sites}


@pytest.mark.parametrize("build", [bert, gpt2, llama, t5])
def test_it_names_every_linear_layer_that_lies_in_a_numbered_list(build: object) -> None:
    model = build()  # type: ignore[operator]  # a function
    linear = {p for p, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert names(model) == {path for path in linear if any(part.isdigit() for part in path.split("."))}


def test_a_layer_whose_weight_is_read_around_it_is_adapted_at_its_weight() -> None:
    found = {name.removeprefix("backbone.layers.0.mixer.") for name in names(mamba(), layers=[0])}
    assert found == {"in_proj", "x_proj", "dt_proj.weight", "out_proj"}


def test_the_parameters_of_torchs_attention_are_named() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    inside = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1", "linear2"}
    assert names(encoder) == {f"layers.0.{name}" for name in inside}


class Conditioned(Pre):
    """A block that is told what to do by a layer of its own, which is on no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shift, gate = self.condition(F.silu(x.mean(1, keepdim=True))).chunk(2, -1)
        x = x + gate * self.attention(self.norm1(x) + shift)
        return x + self.mlp(self.norm2(x))


def test_a_blocks_conditioning_is_named_and_an_exclusion_holds() -> None:
    model = randomised(Model(Conditioned))
    assert "blocks.0.condition" in names(model)
    assert names(model, exclude=["condition", "@attention.out", "attention.*"], layers=[0]) == {
        "blocks.0.mlp.up",
        "blocks.0.mlp.down",
    }


def test_a_layer_that_did_not_run_is_told_and_can_be_left_out() -> None:
    class Idle(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(WIDTH, WIDTH)

    model = randomised(Model(Idle))
    with pytest.raises(ak.TargetError, match=r"'blocks.0.other'.* linear layers of the blocks, but did not run .*exclude="):
        names(model)
    assert len(names(model, exclude=["other"])) == 12


def test_a_table_of_positions_that_queries_are_multiplied_by_is_no_linear_layer() -> None:
    class Relative(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(WIDTH, 6))

        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.o((q @ k.transpose(1, 2) + q @ self.table).softmax(-1) @ v)

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Relative()

    assert not any("table" in name for name in names(randomised(Model(Block))))


def test_it_works_with_other_methods_and_without_blocks_it_is_refused() -> None:
    model = randomised(Model(Pre))
    for config in (
        "vera",
        ak.IA3Config(targets="all-linear", feedforward_targets=()),
        ak.BottleneckConfig(targets=["@linear"]),
    ):
        assert len(ak.wrap(model).sites(config, targets="all-linear")) == 12
    assert ak.LoRAConfig(targets="all-linear") == ak.LoRAConfig(targets=["@linear"])
    with pytest.raises(ak.TargetError, match="speaks of transformer blocks"):
        ak.wrap(FeedForward(), torch.randn(2, WIDTH)).sites("lora", targets=["@linear"])


@pytest.mark.parametrize(
    "change",
    [
        lambda w, scale: scale * w,
        lambda w, scale: (scale * w)[:WIDTH],
        lambda w, scale: w / w.norm(dim=1, keepdim=True),
        lambda w, scale: F.layer_norm(w, w.shape[-1:]).to(w.dtype),
    ],
)
def test_a_parameter_that_is_changed_before_it_multiplies_is_named(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.up, self.down = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(x, change(self.up, self.scale))), change(self.down, self.scale))

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Own()  # type: ignore[assignment]  # takes and returns the same

    sites = ak.wrap(randomised(Model(Block)), IDS).sites("lora", targets="all-linear", layers=[0], rank=2)
    found = {(site.path, site.parameters) for site in sites if "attention" not in site.path}
    assert found == {("blocks.0.mlp", ("up",)), ("blocks.0.mlp", ("down",))}
