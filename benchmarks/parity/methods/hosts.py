"""The models that methods are compared on: those of `families.py`, and small ones of plain torch, one for each geometry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ..explained import without_languages
from ..families import build, families, make_inputs, randomise_, tiny_config
from ..measure import in_dtype

__all__ = ["Host", "host", "hosts", "rows_of"]

# Their norms, and some rotations, are computed in float32 whatever the model's dtype is.
_IN_FLOAT32 = {"deberta", "llama", "mistral", "mt5", "t5"}
WIDTH, BATCH = 8, 3


@dataclass(frozen=True)
class Host:
    """A model in float64 and eval mode, every weight random, biases too; its inputs by keyword; what counts as equal."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    tolerance: float


class Dense(nn.Module):
    """Linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(WIDTH, 12), nn.LayerNorm(12)
        self.down, self.head = nn.Linear(12, WIDTH, bias=False), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.nn.functional.gelu(self.norm(self.up(x))))))


class Convolution(nn.Module):
    """One convolution between others."""

    def __init__(self, kind: type[nn.Module], **geometry: Any) -> None:
        super().__init__()
        self.stem = kind(3, WIDTH, 1)
        self.conv = kind(WIDTH, 12, **{"kernel_size": 3, **geometry})
        self.head = kind(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nn.functional.gelu(self.conv(torch.tanh(self.stem(x)))))


class Lookup(nn.Module):
    """An embedding and what reads it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, WIDTH, **settings), nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


class SelfAttention(nn.Module):
    """torch's own attention, whose projections are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Stacked experts: weights of three axes, (experts, out, in) or, `is_transposed`, (experts, in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = ((2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH))
        up, down = (nn.Parameter(torch.empty(3, *(shape[::-1] if is_transposed else shape))) for shape in shapes)
        self.up_proj, self.down_proj = up, down

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        equation = "bi,eio->ebo" if self.is_transposed else "bi,eoi->ebo"
        hidden = torch.tanh(torch.einsum(equation, x, self.up_proj))
        outputs = torch.einsum(equation.replace("bi", "ebi"), hidden, self.down_proj)
        return torch.einsum("ebo,be->bo", outputs, routing)


class Mixture(nn.Module):
    """A router and its experts."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), Experts(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x, self.router(x).softmax(-1))


def _image(_model: nn.Module, axes: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, 3, *(9, 8, 7)[:axes])}


def _vectors(_model: nn.Module) -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, WIDTH)}


def _sequences(_model: nn.Module) -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, 4, WIDTH)}


def _ids(_model: nn.Module) -> dict[str, Tensor]:
    return {"ids": torch.tensor([[1, 2, 3, 0], [10, 2, 2, 0], [4, 0, 5, 6]])}


def _conv(kind: type[nn.Module] = nn.Conv2d, axes: int = 2, **geometry: Any) -> tuple[Any, Any]:
    return partial(Convolution, kind, **geometry), partial(_image, axes=axes)


_PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Mapping[str, Any]]]] = {
    "dense": (Dense, _vectors),
    "conv1d": _conv(nn.Conv1d, 1, padding=1),
    "conv2d": _conv(stride=2, padding=1),
    "conv2d_1x1": _conv(kernel_size=1),
    "conv2d_same": _conv(padding="same"),
    "conv2d_bare": _conv(bias=False),
    "conv2d_dilation": _conv(padding=2, dilation=2),
    "conv2d_same_dilation": _conv(padding="same", dilation=2),
    "conv2d_circular": _conv(padding=1, padding_mode="circular"),
    "conv2d_reflect": _conv(padding=1, padding_mode="reflect"),
    "conv2d_replicate": _conv(padding=1, padding_mode="replicate"),
    "conv2d_groups": _conv(padding=1, groups=2),
    "conv3d": _conv(nn.Conv3d, 3, padding=1),
    "embedding": (Lookup, _ids),
    "embedding_padding": (partial(Lookup, padding_idx=0), _ids),
    "attention": (SelfAttention, _sequences),
    "experts": (Mixture, _vectors),
    "experts_transposed": (partial(Mixture, is_transposed=True), _vectors),
}
_HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert_masked_lm": lambda: BertForMaskedLM(tiny_config(BertConfig, tie_word_embeddings=False)),
    "gpt2_causal_lm": lambda: GPT2LMHeadModel(tiny_config(GPT2Config, tie_word_embeddings=False)),
}


def hosts() -> list[str]:
    """The names of all hosts."""
    return [*families(), *_HEADS, *_PLAIN]


def host(name: str) -> Host:
    """The host of this name, made anew; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in _PLAIN:
            make, inputs_of = _PLAIN[name]
            model = make()
        else:
            model, inputs_of = (_HEADS[name]() if name in _HEADS else build(name)), make_inputs
        if name not in families():
            randomise_(model, 0)
        if name == "xmod":  # whose language adapters that library deletes (see `explained.py`): they are to add nothing
            without_languages(model)
        inputs = in_dtype(inputs_of(model), torch.float64)
    tolerance = 1e-5 if name in _IN_FLOAT32 else 1e-9
    return Host(name, model.eval().double(), inputs, tolerance)


def rows_of(name: str, part: str, rows: int) -> Tensor:
    """The output features of a fused projection that are its queries, keys or values: thirds, or, in DeBERTa, by head."""
    index, thirds = torch.arange(rows), "qkv".index(part)
    per_head = rows // 3 // 4 if name == "deberta" else rows // 3  # 4 heads
    return index[(index // per_head) % 3 == thirds]
