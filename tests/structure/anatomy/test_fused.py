"""Which features of a fused projection are an attention's queries, keys and values, whatever their order."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.structure.anatomy import discover as discovery
from adapterkit.structure.anatomy.description import Slices
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.anatomy.fused import fused_slices
from adapterkit.structure.tracing.replay import Replays

from ...hosts.blocks import HEADS, VOCAB, WIDTH, Model, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
HEAD = WIDTH // HEADS
THIRDS = (("q", ((0, WIDTH),)), ("k", ((WIDTH, 2 * WIDTH),)), ("v", ((2 * WIDTH, 3 * WIDTH),)))


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    discovery._REMEMBERED.clear()


def by_head(*parts: str) -> Slices:
    """The slices where each head has its features for these parts, one part after another."""
    starts = {part: [(head * len(parts) + i) * HEAD for head in range(HEADS)] for i, part in enumerate(parts)}
    return tuple((part, tuple((start, start + HEAD) for start in starts[part])) for part in "qkv")


# --- written by hand: how `qkv`, (batch, seq, features), becomes three of (batch, heads, seq, head_dim) ---

Split = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def nano_gpt(qkv: Tensor) -> Any:
    return map(heads, qkv.split(WIDTH, dim=-1))


def timm(qkv: Tensor) -> Any:
    return qkv.reshape(*qkv.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)


def megatron(qkv: Tensor) -> Any:
    return qkv.unflatten(-1, (HEADS, 3 * HEAD)).transpose(1, 2).chunk(3, dim=-1)


def values_first(qkv: Tensor) -> Any:
    v, q, k = qkv.unflatten(-1, (HEADS, 3, HEAD)).transpose(1, 2).unbind(-2)
    return q, k, v


def rotated(x: Tensor, *, in_place: bool = False) -> Tensor:
    """Rotary positions on the first half of each head."""
    angle = (torch.arange(x.shape[2], device=x.device)[:, None] * torch.ones(HEAD // 2, device=x.device)).to(x)
    half = x[..., : HEAD // 2]
    turned = half * angle.cos() + torch.cat([-half[..., 1:], half[..., :1]], -1) * angle.sin()
    if in_place:
        x[..., : HEAD // 2] = turned
        return x
    return torch.cat([turned, x[..., HEAD // 2 :]], -1)


def rotary_with_norms(qkv: Tensor) -> Any:
    q, k, v = nano_gpt(qkv)
    return rotated(F.rms_norm(q, (HEAD,))), rotated(F.rms_norm(k, (HEAD,))), v


def rotary_in_place(qkv: Tensor) -> Any:
    q, k, v = map(torch.clone, nano_gpt(qkv))
    return rotated(q, in_place=True), rotated(k, in_place=True), v


def clamped_in_place(qkv: Tensor) -> Any:
    return nano_gpt(qkv.clamp_(-8, 8))


def through_a_cache(qkv: Tensor) -> Any:
    q, k, v = nano_gpt(qkv)
    cache = torch.zeros(2, *k.shape[:2], 16, HEAD)
    cache[0, :, :, : k.shape[2]] = k
    cache[1, :, :, : k.shape[2]] = v
    return q, cache[0, :, :, : k.shape[2]], cache[1, :, :, : k.shape[2]]


def without_gradients(qkv: Tensor) -> Any:
    with torch.no_grad():
        return nano_gpt(qkv.detach())


class Fused(nn.Module):
    """An attention with one projection; `split` tells its output's features apart."""

    def __init__(self, split: Split, features: int = 3 * WIDTH, flash: bool = True) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, features), nn.Linear(WIDTH, WIDTH)
        self.split, self.flash = split, flash

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = (q @ k.transpose(-2, -1) / HEAD**0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def model_with(attention: Callable[[], nn.Module]) -> nn.Module:
    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.attention: Any = attention()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    return randomised(Model(Block))


def found(model: nn.Module, path: str, weight: str | None = None, inputs: Any = IDS) -> Slices:
    return fused_slices(discover(model, inputs)[0], path, weight)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (nano_gpt, THIRDS),
        (timm, THIRDS),
        (megatron, by_head("q", "k", "v")),
        (values_first, by_head("v", "q", "k")),
        (rotary_with_norms, THIRDS),
        (rotary_in_place, THIRDS),
        (clamped_in_place, THIRDS),
        (through_a_cache, THIRDS),
        (without_gradients, THIRDS),
    ],
)
def test_features_are_told_apart_in_any_layout(split: Split, expected: Slices, flash: bool) -> None:
    model = model_with(lambda: Fused(split, flash=flash))
    assert [found(model, f"blocks.{i}.attention.qkv") for i in (0, 1)] == [expected, expected]


@given(st.permutations("qkv" * WIDTH))
@settings(max_examples=25, deadline=None)
def test_features_in_any_order_are_found(order: list[str]) -> None:
    places = {part: [i for i, of in enumerate(order) if of == part] for part in "qkv"}

    def split(qkv: Tensor) -> Any:
        return (heads(qkv[..., places[part]]) for part in "qkv")

    slices = found(model_with(lambda: Fused(split)), "blocks.0.attention.qkv")
    assert {part: [i for start, stop in ranges for i in range(start, stop)] for part, ranges in slices} == places
    for _, ranges in slices:  # as few as can be
        assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))


class Rotary(Model):
    """Rotary angles are a product of positions, given or counted, with frequencies that the model holds."""

    def __init__(self) -> None:
        super().__init__(Turning)
        self.register_buffer("frequencies", torch.ones(1, HEAD // 2))

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        positions = torch.arange(ids.shape[1]) if positions is None else positions
        angles = positions[:, None].float() @ self.frequencies
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(x)


class Turning(Pre):
    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        a, z = self.attention, self.norm1(x)
        q, k = (
            torch.cat([h[..., : HEAD // 2] * angles.cos(), h[..., HEAD // 2 :]], -1) for h in map(heads, (a.q(z), a.k(z)))
        )
        y = F.scaled_dot_product_attention(q, k, heads(a.v(z)))
        x = x + a.o(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("inputs", [(IDS,), (IDS, torch.arange(5))])
def test_the_angles_of_rotary_positions_are_no_queries(inputs: tuple[Tensor, ...]) -> None:
    kit = ak.wrap(Rotary(), example_inputs=inputs)
    paths = [site.path for site in kit.sites("lora", targets=["@attention.q", "@attention.k"])]
    assert paths == [f"blocks.{i}.attention.{part}" for i in (0, 1) for part in "qk"]


def test_features_of_none_are_left_out() -> None:
    def gated(qkvg: Tensor) -> Any:
        q, _gate, k, v = map(heads, qkvg.split(WIDTH, dim=-1))
        return q, k, v

    slices = found(model_with(lambda: Fused(gated, 4 * WIDTH)), "blocks.0.attention.qkv")
    assert slices == (("q", ((0, 8),)), ("k", ((16, 24),)), ("v", ((24, 32),)))


@pytest.mark.parametrize("flash", [True, False])
def test_grouped_keys_and_values_have_fewer_features(flash: bool) -> None:
    def grouped(qkv: Tensor) -> Any:
        q, k, v = map(heads, qkv.split((WIDTH, HEAD, HEAD), dim=-1))
        return q, k.repeat_interleave(HEADS, 1), v.repeat_interleave(HEADS, 1)

    slices = found(model_with(lambda: Fused(grouped, WIDTH + 2 * HEAD, flash)), "blocks.0.attention.qkv")
    assert slices == (("q", ((0, 8),)), ("k", ((8, 12),)), ("v", ((12, 16),)))


def test_channels_of_a_convolution_are_told_apart() -> None:
    class Convolved(Fused):
        def __init__(self) -> None:
            super().__init__(nano_gpt)
            self.qkv: Any = nn.Conv1d(WIDTH, 3 * WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(self.qkv(x.transpose(1, 2)).transpose(1, 2))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    (first, _) = discover(model_with(Convolved), IDS)[0].sublayers[::2]
    assert [(fused.axis, fused.slices) for fused in first.fused] == [(-2, THIRDS)]


def test_features_that_lie_otherwise_in_memory_are_told_apart() -> None:
    class SequenceFirst(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    def split(qkv: Tensor) -> Any:
        first = qkv.transpose(0, 1)
        return nano_gpt(first.view(len(first), -1).view(first.shape).transpose(0, 1))

    def attention() -> nn.Module:
        fused = Fused(split)
        fused.qkv = SequenceFirst(WIDTH, 3 * WIDTH)
        return fused

    assert found(model_with(attention), "blocks.0.attention.qkv") == THIRDS


def test_separate_projections_have_no_slices() -> None:
    anatomy, _ = discover(randomised(Model(Pre)), IDS)
    assert all(sublayer.fused == () for sublayer in anatomy.sublayers)
    assert fused_slices(anatomy, "blocks.0.attention.q") == fused_slices(anatomy, "blocks.0.mlp.up") == ()


def test_a_bias_of_positions_is_not_the_keys() -> None:
    """A product of the queries with learned positions, added to the scores, and computed before them (SAM)."""

    class Biased(Fused):
        def __init__(self) -> None:
            super().__init__(nano_gpt)
            self.positions = nn.Parameter(torch.ones(16, HEAD))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(self.qkv(x))
            at = torch.arange(x.shape[1])
            near = self.positions[at - at[:, None]]  # (seq, seq, head_dim)
            bias = torch.einsum("bhqd,qkd->bhqk", q, near)
            y = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
            return self.o(y.transpose(1, 2).flatten(2))

    model = model_with(Biased)
    assert discover(model, IDS)[0].sublayers[0].key == ("blocks.0.attention.qkv",)
    assert found(model, "blocks.0.attention.qkv") == THIRDS


# --- what cannot be told ---


def test_features_that_are_queries_and_keys_at_once_are_refused() -> None:
    def shared(qv: Tensor) -> Any:
        q, v = map(heads, qv.chunk(2, dim=-1))
        return q, F.normalize(q, dim=-1), v

    with pytest.raises(
        ak.TargetError, match=r"'blocks.0.attention.qkv' .* features 0:8 make queries and keys both\. Target"
    ):
        found(model_with(lambda: Fused(shared, 2 * WIDTH)), "blocks.0.attention.qkv")


def test_features_without_a_derivative_are_refused() -> None:
    def rounded(qkv: Tensor) -> Any:
        q, k, v = nano_gpt(qkv)
        return q, k.round(), v

    with pytest.raises(ak.TargetError, match=r"its keys depend on none of them in a way that a derivative shows"):
        found(model_with(lambda: Fused(rounded)), "blocks.0.attention.qkv")


def test_calls_that_differ_are_refused() -> None:
    class Turning(Fused):
        def __init__(self) -> None:
            super().__init__(nano_gpt)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.split = nano_gpt if self.calls == 1 else values_first
            return super().forward(x)

    shared = Turning()
    with pytest.raises(ak.TargetError, match=r"cannot be told: they differ between its calls"):
        found(model_with(lambda: shared), "blocks.0.attention.qkv")


# --- parameters that a module projects with inside ---


class InProjection(nn.Module):
    """As open_clip's own attention; `turned` has the weight as (inputs, features)."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.in_proj_weight = nn.Parameter(torch.ones((WIDTH, 3 * WIDTH) if turned else (3 * WIDTH, WIDTH)))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = x @ self.in_proj_weight if self.turned else F.linear(x, self.in_proj_weight)
        q, k, v = nano_gpt(qkv)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("turned", [False, True])
def test_rows_or_columns_of_a_bare_parameter_are_told_apart(turned: bool) -> None:
    anatomy, _ = discover(model_with(lambda: InProjection(turned)), IDS)
    (fused,) = anatomy.sublayers[0].fused
    assert (fused.path, fused.weight, fused.axis) == ("blocks.0.attention", "in_proj_weight", int(turned))
    assert fused_slices(anatomy, "blocks.0.attention", "in_proj_weight") == THIRDS
    with pytest.raises(ak.TargetError, match=r"with \['blocks.0.attention.in_proj_weight'\], not with features of what it"):
        fused_slices(anatomy, "blocks.0.attention")


def test_a_parameter_that_every_block_shares_is_told_apart_in_each() -> None:
    shared = InProjection()
    assert found(model_with(lambda: shared), "blocks.0.attention", "in_proj_weight") == THIRDS


def test_rows_of_torchs_attention_are_thirds() -> None:
    decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerDecoder(decoder, 2).eval()
    x, memory = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)
    anatomy, _ = discover(model, (x, memory))
    for name in ("self_attn", "multihead_attn"):
        assert fused_slices(anatomy, f"layers.1.{name}", "in_proj_weight") == THIRDS


def test_each_parameter_of_torchs_attention_with_other_widths_is_one_whole_part() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=4, vdim=6, batch_first=True)
            self.k, self.v = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, self.k(x), self.v(x))[0]

    anatomy, _ = discover(nn.Sequential(Wide(), Wide()).eval(), torch.randn(2, 3, WIDTH))
    for part in "qkv":
        assert fused_slices(anatomy, "0.attention", f"{part}_proj_weight") == ((part, ((0, WIDTH),)),)


# --- whatever the model's state ---


def test_no_trace_is_left_and_no_random_number_drawn() -> None:
    model = model_with(lambda: Fused(rotary_in_place))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found(model, "blocks.0.attention.qkv")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def zeroed(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


@pytest.mark.parametrize(
    "change",
    [
        zeroed,
        lambda model: model.requires_grad_(False),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("meta"),
    ],
    ids=["all zeros", "frozen", "bfloat16", "meta"],
)
def test_fused_parts_are_found_whatever_the_parameters_are(change: Callable[[nn.Module], object]) -> None:
    model = model_with(lambda: Fused(rotary_with_norms))
    change(model)
    assert found(model, "blocks.1.attention.qkv", inputs=None) == THIRDS


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_fused_parts_are_found_in_whatever_mode_torch_is(context: Callable[[], Any]) -> None:
    model = model_with(lambda: Fused(rotary_with_norms))
    with context():
        assert found(model, "blocks.1.attention.qkv") == THIRDS


def test_an_adapted_projection_is_told_apart_as_before() -> None:
    model = model_with(lambda: Fused(megatron))
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["qkv"], bottleneck_size=2))
    kit.activate("a")
    assert found(model, "blocks.0.attention.qkv") == by_head("q", "k", "v")


def test_indices_without_values_are_refused() -> None:
    def indexed(qkv: Tensor) -> Any:
        q, k, v = nano_gpt(qkv)
        return q, k[:, torch.tensor([1, 0], device=k.device)], v

    model = model_with(lambda: Fused(indexed))
    assert found(model, "blocks.0.attention.qkv") == THIRDS
    with pytest.raises(ak.TargetError, match=r"depends on integers or masks, which have no values on the meta device"):
        found(model.to("meta"), "blocks.0.attention.qkv", inputs=IDS.to("meta"))


def test_blocks_that_do_the_same_are_told_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = Replays._run
    monkeypatch.setattr(Replays, "_run", lambda *args: runs.append(1) or run(*args))
    found(model_with(lambda: Fused(nano_gpt)), "blocks.1.attention.qkv")
    assert len(runs) == 3


# --- models of transformers ---

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 20, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
Q16K16V16 = (("q", ((0, 16),)), ("k", ((16, 32),)), ("v", ((32, 48),)))
EACH_HEAD = tuple((part, tuple((12 * h + 4 * i, 12 * h + 4 * i + 4) for h in range(4))) for i, part in enumerate("qkv"))
MODELS: dict[str, tuple[Callable[[], nn.Module], str, Slices]] = {
    "GPT-2": (lambda: T.GPT2Model(T.GPT2Config(**GPT)), "h.1.attn.c_attn", Q16K16V16),
    "GPT-2, keys and values of another stream": (
        lambda: T.EncoderDecoderModel(
            encoder=T.BertModel(T.BertConfig(**SMALL, intermediate_size=16)),
            decoder=T.GPT2LMHeadModel(T.GPT2Config(**GPT, add_cross_attention=True, is_decoder=True)),
        ),
        "decoder.transformer.h.0.crossattention.c_attn",
        (("k", ((0, 16),)), ("v", ((16, 32),))),
    ),
    "GPT-NeoX": (
        lambda: T.GPTNeoXModel(T.GPTNeoXConfig(**SMALL, **ENDS, intermediate_size=16)),
        "layers.1.attention.query_key_value",
        EACH_HEAD,
    ),
    "BLOOM": (
        lambda: T.BloomModel(T.BloomConfig(hidden_size=16, n_layer=2, n_head=4, vocab_size=20)),
        "h.0.self_attention.query_key_value",
        EACH_HEAD,
    ),
    "Falcon, multi-query": (
        lambda: T.FalconModel(T.FalconConfig(**SMALL, **ENDS, multi_query=True)),
        "h.0.self_attention.query_key_value",
        (("q", ((0, 16),)), ("k", ((16, 20),)), ("v", ((20, 24),))),
    ),
    "Falcon, ALiBi": (
        lambda: T.FalconModel(T.FalconConfig(**SMALL, **ENDS, multi_query=False, alibi=True, parallel_attn=False)),
        "h.0.self_attention.query_key_value",
        EACH_HEAD,
    ),
    "Falcon, grouped": (
        lambda: T.FalconModel(T.FalconConfig(**SMALL, **ENDS, new_decoder_architecture=True, num_kv_heads=2)),
        "h.0.self_attention.query_key_value",
        (("q", ((0, 8), (16, 24))), ("k", ((8, 12), (24, 28))), ("v", ((12, 16), (28, 32)))),
    ),
    "Phi-3": (
        lambda: T.Phi3Model(T.Phi3Config(**SMALL, **ENDS, intermediate_size=16, num_key_value_heads=2)),
        "layers.0.self_attn.qkv_proj",
        (("q", ((0, 16),)), ("k", ((16, 24),)), ("v", ((24, 32),))),
    ),
    "ModernBERT": (
        lambda: T.ModernBertModel(
            T.ModernBertConfig(**SMALL, **ENDS, cls_token_id=1, sep_token_id=2, intermediate_size=16)
        ),
        "layers.1.attn.Wqkv",
        Q16K16V16,
    ),
    "MPT": (
        lambda: T.MptModel(T.MptConfig(d_model=16, n_heads=4, n_layers=2, vocab_size=20, max_seq_len=32)),
        "blocks.0.attn.Wqkv",
        Q16K16V16,
    ),
    "DeepSeek-V3, keys and values from a latent": (
        lambda: T.DeepseekV3Model(
            T.DeepseekV3Config(
                **SMALL, **ENDS, intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
                qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=2, num_key_value_heads=4,
            )
        ),
        "layers.0.self_attn.kv_b_proj",
        tuple((part, tuple((8 * h + 4 * i, 8 * h + 4 * i + 4) for h in range(4))) for i, part in enumerate("kv")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["as it comes", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_are_told_apart(name: str, attention: str) -> None:
    make, path, expected = MODELS[name]
    model = make()
    for module in model.modules() if attention == "eager" else ():
        if isinstance(module, T.PreTrainedModel):
            module.config._attn_implementation = attention
    assert found(model, path, inputs=None) == expected
