"""Whose projections make queries, keys and values, in the ways that people write an attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.structure.anatomy.description import Anatomy
from adapterkit.structure.anatomy.discover import discover

WIDTH, HEADS = 8, 2


class Layer(nn.Module):
    """A block whose attention is written by `mix(q, k, v)`, with what stands beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.gate, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Conv2d(HEADS, HEADS, 1)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None, kept: dict[str, Tensor]) -> Tensor:
        z = self.norm(x)
        m = z if memory is None else memory
        x = x + self.o(self.mix(z, m, self.q(z), self.k(m), self.v(m), kept))
        return x + self.down(self.up(self.norm2(x)).relu())

    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


class TalkingHeads(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = self.before((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (self.after(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


class Einsum(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


class KeysFirst(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        return (k @ q.mT).softmax(-2).mT @ v


class KeptScores(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor]) -> Tensor:
        kept["scores"] = q @ k.mT + kept.get("scores", torch.zeros(()))
        return kept["scores"].softmax(-1) @ v


class ValueResidual(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor]) -> Tensor:
        first = kept.setdefault("v", v)
        return (q @ k.mT).softmax(-1) @ (0.5 * v + 0.5 * first)


class Lerped(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor]) -> Tensor:
        first = kept.setdefault("v", v)
        return (q @ k.mT).softmax(-1) @ v.lerp(first, self.gate(m)[..., :1].sigmoid())


class MixedByGates(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor]) -> Tensor:
        first, gate = kept.setdefault("v", v), self.gate(m)[..., :1].sigmoid()
        return (q @ k.mT).softmax(-1) @ (v * gate + first * (1 - gate))


class NormedHeads(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        weights = self.before((q @ k.mT).softmax(-1).permute(0, 2, 3, 1))
        return (F.layer_norm(weights, (HEADS,)).permute(0, 3, 1, 2) @ v).transpose(1, 2).flatten(2)


class GatedValues(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        return (q @ k.mT).softmax(-1) @ (v * 2 * self.gate(m).sigmoid())


class Sampled(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        top = (q @ k[:, ::2].mT).amax(-1).topk(2, dim=-1).indices
        rows = torch.arange(len(q))[:, None]
        context = v.mean(1, keepdim=True).expand(-1, q.shape[1], -1).clone()
        context[rows, top] = (q[rows, top] @ k.mT).softmax(-1) @ v
        return context


class ByHand(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        scores = (q[:, :, None] * k[:, None]).sum(-1)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return ((weights / weights.sum(-1, keepdim=True))[..., None] * v[:, None]).sum(2)


class ByLogsumexp(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        scores = q @ k.mT
        return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


class ByLogSoftmax(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        return (q @ k.mT).log_softmax(-1).exp() @ v


class Differential(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        one, other = ((a @ b.mT).softmax(-1) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True))
        return (one - 0.3 * other) @ v


class Linear(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        return q.relu() @ (k.relu().mT @ v)


class Sigmoid(Layer):
    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        return (q @ k.mT).sigmoid() @ v


class Stack(nn.Module):
    """Blocks, with a memory for each or none. The memory may be made of the model's own input."""

    def __init__(self, layer: type[Layer], memory: str) -> None:
        super().__init__()
        self.layers, self.memory, self.kind = nn.ModuleList(layer() for _ in range(2)), nn.Linear(WIDTH, WIDTH), memory

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        memory = {"none": None, "given": given, "own": self.memory(x)}[self.kind]
        kept: dict[str, Tensor] = {}
        for layer in self.layers:
            x = layer(x, memory, kept)
        return x


def look(layer: type[Layer], memory: str = "none", tokens: int = 5, keys: int = 3) -> Anatomy:
    torch.manual_seed(0)
    return discover(Stack(layer, memory).eval(), (torch.randn(2, tokens, WIDTH), torch.randn(2, keys, WIDTH)))[0]


ATTENTIONS = [
    TalkingHeads, Einsum, KeysFirst, KeptScores, ValueResidual, Lerped, MixedByGates, NormedHeads, GatedValues, Sampled, ByHand, ByLogsumexp,
    ByLogSoftmax, Differential,
]  # fmt: skip


def check(anatomy: Anatomy, kind: str) -> None:
    attentions = [s for s in anatomy.sublayers if s.kind == kind]
    assert [(s.query, s.key, s.value) for s in attentions] == [
        tuple((f"layers.{i}.{part}",) for part in "qkv") for i in range(2)
    ]


@pytest.mark.parametrize("layer", ATTENTIONS)
def test_each_layer_has_its_own_projections(layer: type[Layer]) -> None:
    check(look(layer), "attention")


@pytest.mark.parametrize("layer", [layer for layer in ATTENTIONS if layer is not Sampled])
def test_one_query_token_is_enough(layer: type[Layer]) -> None:
    check(look(layer, tokens=1), "attention")


@pytest.mark.parametrize("layer", ATTENTIONS)
@pytest.mark.parametrize("memory", ["given", "own"])
def test_keys_of_a_memory_make_it_a_crossattention(layer: type[Layer], memory: str) -> None:
    check(look(layer, memory), "crossattention")


@pytest.mark.parametrize("layer", [Einsum, KeysFirst, GatedValues])
def test_one_key_is_enough(layer: type[Layer]) -> None:
    check(look(layer, "given", keys=1), "crossattention")


class Compressed(Layer):
    """Keys and values are projected over tokens, too, as in Linformer."""

    def __init__(self) -> None:
        super().__init__()
        self.fewer = nn.Linear(5, 3)

    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        return (q @ self.fewer(k.mT)).softmax(-1) @ self.fewer(v.mT).mT


class Convolved(Layer):
    """Each feature of queries, keys and values is convolved with its neighbours, as in Primer."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) for _ in range(3))

    def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
        q, k, v = (near(t.mT).mT for near, t in zip(self.near, (q, k, v), strict=True))
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("layer", [Compressed, Convolved])
def test_what_mixes_no_features_makes_no_queries_keys_or_values(layer: type[Layer]) -> None:
    check(look(layer), "attention")


@pytest.mark.parametrize("layer", [Linear, Sigmoid])
def test_attention_without_a_softmax_mixes_tokens(layer: type[Layer]) -> None:
    assert [s.kind for s in look(layer).sublayers] == ["mixer", "feedforward"] * 2


@pytest.mark.parametrize(
    "step",
    [
        lambda w: w.float().type_as(w),
        lambda w: w.swapaxes(1, 2).swapaxes(1, 2),
        lambda w: w.expand_as(w).narrow(-1, 0, w.shape[-1]),
        lambda w: F.dropout(w, 0.1, training=False).multiply(2.0),
        lambda w: w.moveaxis(1, 2).mT,
        lambda w: w.tensor_split(1, 1)[0].reshape_as(w),
    ],
)
def test_a_forward_in_inference_mode_shows_the_same(step: Callable[[Tensor], Tensor]) -> None:
    """Composite operations arrive whole there. Llama's and DeepSeek's own code runs its forward that way."""

    class Stepping(Layer):
        def mix(self, z: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Any) -> Tensor:
            return step((q @ k.mT).softmax(-1)) @ v

    class Inferring(Stack):
        @torch.inference_mode()
        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            return super().forward(x, given)

    def anatomy(kind: type[Stack]) -> Anatomy:
        torch.manual_seed(0)
        return discover(kind(Stepping, "none").eval(), (torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)))[0]

    check(anatomy(Inferring), "attention")
    here, there = (
        [(s.kind, s.out, s.norm, s.first, s.last) for s in anatomy(kind).sublayers] for kind in (Inferring, Stack)
    )
    assert here == there


def test_weights_that_are_computed_early_in_a_block_make_no_crossattention() -> None:
    """Zipformer computes them once, of the stream as it enters, and applies them further on."""

    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(x)
            weights = (self.q(z) @ self.k(z).mT).softmax(-1)
            x = x + self.down(self.up(x).relu())
            return x + self.o(weights @ self.v(x))

    torch.manual_seed(0)
    anatomy, _ = discover(nn.Sequential(Early(), Early()).eval(), torch.randn(2, 5, WIDTH))
    assert [s.kind for s in anatomy.sublayers] == ["feedforward", "attention"] * 2
