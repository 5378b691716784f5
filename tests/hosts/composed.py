"""Hosts of compositions: each with adapters of every method that it can hold, random ones, and inputs for a batch."""

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.methods import UNION_PRESETS, presets

from ..helpers import PRESETS
from .language_models import first, give_biases, gpt2, llama
from .tiny import Attention, Blocks, PostNormBlock, PreNormBlock, randomise

ROWS, TOKENS, WIDTH = 4, 6, 8


@dataclass(frozen=True)
class Host:
    """A kind of model.

    Attributes:
        build: Makes one.
        inputs: Of a batch of so many rows; keyword arguments.
        adapters: Configs by name, beside the presets.
        without: Presets that it has none of: at places where tokens lie otherwise, say.
        row_axis: The axis of rows of all inputs, and of the output.
        token_axis: The axis of tokens at all places; None if there are no sequences.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    adapters: Mapping[str, Any]
    with_presets: bool = True
    without: Collection[str] = ()
    row_axis: int = 0
    token_axis: int | None = 1


@dataclass(frozen=True)
class Built:
    """A host with its adapters.

    Attributes:
        bare: The model as it was before.
        names: Of the adapters.
        fusions: Over some of them.
    """

    host: Host
    kit: ak.AdapterKit
    bare: nn.Module
    names: tuple[str, ...]
    fusions: tuple[ak.Fuse, ...]

    def call(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return first(model(**inputs))


class Convs(nn.Module):
    """Convolutions of several kinds, with norms, and a layer for what they find."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.grouped = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, groups=2)
        self.group_norm = nn.GroupNorm(2, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.group_norm(self.grouped(x + self.depthwise(x))))
        return self.head(x.mean((-1, -2)))


class TokensFirstModel(nn.Module):
    """A model of the user's that takes (seq, batch) and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder, self.out = nn.Embedding(11, WIDTH), encoder(False), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.encoder(self.embedding(ids)))


class Recurrent(nn.Module):
    """An embedding, an LSTM and a layer for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(11, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(ids))[0])


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=batch_first)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)


class FlatBlock(PreNormBlock):
    """Its feed-forward takes the tokens of all rows on one axis, as that of OPT and of mixtures of experts."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))[0]
        flat = x.flatten(0, 1)
        return (flat + self.mlp(self.norm_2(flat))).view_as(x)


class Windows(Blocks):
    """Its blocks take the two halves of each row as if they were rows, as Swin does."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        windows = x.unflatten(1, (2, -1)).flatten(0, 1)
        for block in self.blocks:
            windows = block(windows)
        return windows.reshape(x.shape)


class TokensFirst(Attention):
    """Takes (seq, batch, hidden), and says so nowhere, as XLNet does."""

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(hidden_states).transpose(0, 1) for layer in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).transpose(0, 1)), weights


class TokensFirstBlock(PreNormBlock):
    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.attention = TokensFirst(hidden)


class TokensFirstInside(Blocks):
    """Turns its tensors after the embedding, and back at the end."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x.transpose(0, 1)


class TurnedFlatBlock(PreNormBlock):
    """Its feed-forward takes the first token of each row, then the second of each: (tokens * batch, hidden)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))[0]
        flat = x.transpose(0, 1).flatten(0, 1)
        return (flat + self.mlp(self.norm_2(flat))).unflatten(0, (x.shape[1], -1)).transpose(0, 1)


class ColumnAttention(Attention):
    """Takes (alignment, column, batch, hidden); columns attend to one another."""

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(hidden_states) for layer in (self.query, self.key, self.value))
        weights = torch.einsum("ricd,rjcd->rcij", q, k).softmax(-1)
        return self.out(torch.einsum("rcij,rjcd->ricd", weights, v)), weights


class AlignmentBlock(PreNormBlock):
    """Takes (alignment, column, batch, hidden), as ESM's MSA Transformer does; a row is an alignment of several sequences."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.attention = ColumnAttention(hidden)


class FlatAlignmentBlock(AlignmentBlock):
    """Has sequences and batch on one axis in its feed-forward, (column, alignment * batch, hidden)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))[0]
        flat = x.transpose(0, 1).flatten(1, 2)
        return (flat + self.mlp(self.norm_2(flat))).unflatten(1, (x.shape[0], -1)).transpose(0, 1)


class Alignments(Blocks):
    """Takes (batch, alignment, column) ids; its blocks have the batch on the third axis."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).permute(1, 2, 0, 3)
        for block in self.blocks:
            x = block(x)
        return x.permute(2, 0, 1, 3)


SMALL = {"num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SMALL))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=10, patch_size=5))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=WIDTH, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=20, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def ids(rows: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 11, (rows, TOKENS))}


def input_ids(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 20, (rows, TOKENS))}


def padded(rows: int) -> dict[str, Tensor]:
    """Ids with a mask: rows of several lengths."""
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 3, 5, 2])[:rows, None]
    return {**input_ids(rows), "attention_mask": mask.long()}


def alignments(rows: int) -> dict[str, Tensor]:
    """Ids of alignments, of as many sequences as a batch has rows."""
    return {"ids": torch.randint(0, 11, (rows, ROWS, 3))}


B, L = ak.BottleneckConfig, ak.LoRAConfig
TINY = {
    "plain": B(targets=["blocks.*"], bottleneck_size=3),
    "plain 2": B(targets=["blocks.*"], bottleneck_size=3),
    "tanh": B(targets=["blocks.*"], bottleneck_size=3, non_linearity="tanh"),
    "one layer": B(targets=["blocks.*"], bottleneck_size=5, layers=[1]),
    "double": B(targets=["attention.out"], bottleneck_size=3, dtype="float64"),
    "half": B(targets=["blocks.*"], bottleneck_size=3, dtype="bfloat16"),
    "gated": B(targets=["attention"], output=0, bottleneck_size=2, gating=True, scaling="channel", layer_norm_before=True),
    "normed": B(targets=["attention"], output=0, bottleneck_size=2, layer_norm_after=True, residual_before_layer_norm=True),
    "before norm": B(targets=["norm_2"], at="input", bottleneck_size=2),
    "renormalised": B(targets=["norm_2"], at="renormalised", bottleneck_size=2),
    "beside": B(targets=["attention.out"], placement="parallel", bottleneck_size=2),
    "scaled": B(targets=["attention.out"], placement="parallel", bottleneck_size=2, scaling="learned"),
    "stream": B(targets=["attention"], output=0, placement="parallel", residual="@stream", bottleneck_size=2),
    "sum": B(targets=["attention.out"], residual="attention", bottleneck_size=2),
    "embedded": B(targets=["embedding"], bottleneck_size=2),
    "lora wide": L(targets=["query", "value"], rank=3, alpha=2),
    "lora gated": L(targets=["query", "value"], rank=3, gating=True),
    "lora bias": L(targets=["key", "out"], rank=2, bias=True),
    "lora dropped": L(targets=["query"], rank=2, dropout=0.3),
    "lora embedding": L(targets=["embedding"], rank=2),
    "lora embedding 2": L(targets=["embedding"], rank=2),
    "dora": L(targets=["value", "key"], rank=2, use_dora=True),
    "dora embedding": L(targets=["embedding"], rank=2, use_dora=True),
    "vera": ak.VeRAConfig(targets=["query", "out"], rank=3),
    "vera 2": ak.VeRAConfig(targets=["query", "out"], rank=3),
    "ia3": ak.IA3Config(targets=["key", "value"], feedforward_targets=()),
    "ia3 2": ak.IA3Config(targets=["key", "value"], feedforward_targets=()),
    "compacter": ak.CompacterConfig(targets=["blocks.*"], phm_dim=2, bottleneck_size=4),
    "compacter 2": ak.CompacterConfig(targets=["blocks.*"], phm_dim=2, bottleneck_size=4),
    "compacter own": ak.CompacterConfig(targets=["blocks.*"], phm_dim=2, bottleneck_size=4, shared_rule=False),
    "invertible": ak.InvertibleConfig(targets=["embedding"], output_targets=["blocks.1"]),
    "invertible tanh": ak.InvertibleConfig(targets=["embedding"], output_targets=["blocks.1"], non_linearity="tanh"),
    "glow": ak.InvertibleConfig(targets=["embedding"], output_targets=["blocks.1"], block="glow"),
    "bias": ak.BitFitConfig(targets=["attention.query", "attention.out"]),
    "norms": ak.NormTuningConfig(targets=["norm_1"]),
    "union": ak.Union(B(targets=["attention.out"], bottleneck_size=2), L(targets=["query"], rank=2), ak.IA3Config(targets=["key"])),
    "unipelt": ak.Union(B(targets=["blocks.*"], bottleneck_size=2, gating=True), L(targets=["query", "value"], rank=2, gating=True)),
    "union of two at one": ak.Union(L(targets=["out"], rank=2), B(targets=["attention.out"], bottleneck_size=2)),
}  # fmt: skip
ENCODER = {
    "plain": B(targets=["linear2"], bottleneck_size=3),
    "plain 2": B(targets=["linear2"], bottleneck_size=3),
    "at the end": B(targets=["norm"], bottleneck_size=2),
    "at the end 2": B(targets=["norm"], bottleneck_size=2),
    "before the end": B(targets=["norm"], at="input", bottleneck_size=2),
    "at the root": B(targets=[""], bottleneck_size=2),
    "attention": B(targets=["self_attn"], bottleneck_size=2),
    "l": L(targets=["linear1", "linear2"], rank=2),
    "m": L(targets=["linear1", "linear2"], rank=2),
    "in attention": L(targets=["self_attn.in_proj_weight"], rank=2),
    "attention's q": L(targets=["@attention.q"], rank=2),
    "ia3": ak.IA3Config(targets=["linear1"], feedforward_targets=["linear2"]),
}
AROUND = {
    **{name: config for name, config in ENCODER.items() if name not in ("at the root", "before the end")},
    "embedded": B(targets=["embedding"], bottleneck_size=2),
    "lora embedding": L(targets=["embedding", "out"], rank=2),
    "out": B(targets=["out"], bottleneck_size=2),
}
CONVS = {
    "stem": L(targets=["stem"], rank=2),
    "stem 2": L(targets=["stem"], rank=2),
    "stem wide": L(targets=["stem", "head"], rank=3, bias=True),
    "stem gated": L(targets=["stem"], rank=2, gating=True),
    "dora": L(targets=["stem", "grouped"], rank=2, use_dora=True),
    "dora 2": L(targets=["stem", "grouped"], rank=2, use_dora=True),
    "grouped": L(targets=["grouped", "depthwise"], rank=2),
    "grouped 2": L(targets=["grouped", "depthwise"], rank=2),
    "bottleneck": B(targets=["stem"], bottleneck_size=2),
    "bottleneck 2": B(targets=["stem"], bottleneck_size=2),
    "before norm": B(targets=["norm"], at="input", bottleneck_size=2),
    "renormalised": B(targets=["group_norm"], at="renormalised", bottleneck_size=2),
    "beside": B(targets=["depthwise"], placement="parallel", bottleneck_size=2),
    "ia3": ak.IA3Config(targets=["stem"], feedforward_targets=["grouped"]),
    "ia3 2": ak.IA3Config(targets=["stem"], feedforward_targets=["grouped"]),
    "head": B(targets=["head"], bottleneck_size=2),
    "norms": ak.NormTuningConfig(targets=["norm"]),
}
RECURRENT = {
    "embedded": B(targets=["embedding"], bottleneck_size=2),
    "after": B(targets=["lstm"], bottleneck_size=2),
    "after 2": B(targets=["lstm"], bottleneck_size=2),
    "weights": L(targets=["lstm.weight_ih_l0"], rank=2),
    "out": L(targets=["out"], rank=2),
    "bias": ak.BitFitConfig(targets=["lstm"]),
}

OUTSIDE = ("embedd", "invertible", "glow")  # at the embedding
INSIDE = {name: config for name, config in TINY.items() if not any(word in name for word in OUTSIDE)}
AT_THE_EMBEDDING = ("invertible", "madx", "seq_bn_inv")
# A gate takes the first axis for that of rows unless it is told otherwise; in bfloat16, what a product of matrices that are
# turned is rounded to depends on their number of rows.
TURNED = {name: config for name, config in INSIDE.items() if name not in ("gated", "lora gated", "unipelt", "half")}
TURNED["gated"] = B(targets=["attention"], output=0, bottleneck_size=2, gating=True, batch_axis=1)
ALIGNED = {name: config for name, config in TURNED.items() if name != "gated"}

HOSTS: dict[str, Host] = {
    "pre-norm": Host(lambda: Blocks(PreNormBlock), ids, TINY),
    "post-norm": Host(lambda: Blocks(PostNormBlock), ids, TINY),
    "flat tokens": Host(lambda: Blocks(FlatBlock), ids, TINY),
    "windows": Host(lambda: Windows(PreNormBlock), ids, INSIDE, without=AT_THE_EMBEDDING, token_axis=None),
    "tokens first inside": Host(
        lambda: TokensFirstInside(TokensFirstBlock), ids, TURNED, without=AT_THE_EMBEDDING, token_axis=0
    ),
    "square, tokens first inside": Host(
        lambda: TokensFirstInside(TokensFirstBlock),
        lambda rows: {"ids": torch.randint(0, 11, (rows, ROWS))},
        TURNED,
        without=AT_THE_EMBEDDING,
        token_axis=0,
    ),
    "flat tokens in turn": Host(lambda: Blocks(TurnedFlatBlock), ids, TINY),
    "alignments": Host(lambda: Alignments(AlignmentBlock), alignments, ALIGNED, without=AT_THE_EMBEDDING, token_axis=None),
    "flat alignments": Host(
        lambda: Alignments(FlatAlignmentBlock), alignments, ALIGNED, without=AT_THE_EMBEDDING, token_axis=None
    ),
    "encoder": Host(lambda: encoder(True), lambda rows: {"src": torch.randn(rows, TOKENS, WIDTH)}, ENCODER),
    "encoder, seq first": Host(
        lambda: encoder(False), lambda rows: {"src": torch.randn(TOKENS, rows, WIDTH)}, ENCODER, row_axis=1, token_axis=0
    ),
    "square encoder, seq first": Host(
        lambda: encoder(False), lambda rows: {"src": torch.randn(ROWS, rows, WIDTH)}, ENCODER, row_axis=1, token_axis=0
    ),
    "square, tokens first": Host(
        TokensFirstModel, lambda rows: {"ids": torch.randint(0, 11, (ROWS, rows))}, AROUND, row_axis=1, token_axis=0
    ),
    "convs": Host(Convs, lambda rows: {"x": torch.randn(rows, 3, 9, 9)}, CONVS, with_presets=False),
    "recurrent": Host(Recurrent, ids, RECURRENT, with_presets=False),
    "bert": Host(bert, padded, {}),
    "gpt2": Host(gpt2, input_ids, {"qkv": L(targets=["@attention.q", "@attention.v"], rank=2)}),
    "llama": Host(llama, input_ids, {}),
    "t5": Host(t5, lambda rows: {**input_ids(rows), "decoder_input_ids": torch.randint(0, 20, (rows, 4))}, {}),
    "vit": Host(vit, lambda rows: {"pixel_values": torch.randn(rows, 3, 10, 10)}, {}),
}


@functools.cache
def built(name: str, dtype: torch.dtype = torch.float32) -> Built:
    """The host with its adapters, made once."""
    host, state = HOSTS[name], torch.random.get_rng_state()
    torch.manual_seed(0)
    model = host.build().to(dtype).eval()
    give_biases(model)
    bare, kit, names = copy.deepcopy(model), ak.wrap(model, example(host, dtype)), []
    small = {"reduction_factor": 1.0}
    for adapter, config, settings in [
        *((adapter, config, {}) for adapter, config in host.adapters.items()),
        *(
            (f"preset {preset}{again}", preset, small if _has_factor(preset) else {})
            for preset in PRESETS * host.with_presets
            if preset not in host.without
            for again in ("", " again")
        ),
    ]:
        try:
            kit.add(adapter, config, **settings)
        except (ak.TargetError, ak.ConfigError):
            if not isinstance(config, str):
                raise
            continue  # no biases, say
        randomise(kit, adapter)
        names.append(adapter)
    fusions = tuple(_fusions(kit, names))
    torch.random.set_rng_state(state)
    return Built(host, kit, bare, tuple(names), fusions)


def _fusions(kit: ak.AdapterKit, names: Sequence[str]) -> Iterator[ak.Fuse]:
    """Some fusions of adapters that can be fused, over compositions as well."""
    for one, other in zip(names[::3], names[1::3], strict=False):
        nested = ak.Stack(other, one), ak.Drop(one, layers=[0]), ak.Average(one, other)
        for fuse in (ak.Fuse(one, other, name=f"f {one}"), ak.Fuse(*nested, name=f"g {one}")):
            try:
                kit.add_fusion(fuse)
            except ak.AdapterKitError:  # a child changes a Parameter, or another tensor
                continue
            randomise(kit, fuse.fusion)
            yield fuse


def example(host: Host, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of a batch, in the host's dtype."""
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in host.inputs(ROWS).items()}


def _has_factor(preset: str) -> bool:
    return preset in UNION_PRESETS or "reduction_factor" in presets()[preset][0].config_type.model_fields
