"""Streams that are not one tensor with sums along it: two in one tensor, several mixed, trends, layers behind a projection."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.anatomy.epsilon import epsilon_test

from ...hosts.blocks import VOCAB, WIDTH, Attention, FeedForward, Model, Post, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


def paths(model: nn.Module, *targets: str, inputs: Tensor = IDS) -> list[str]:
    """The modules that these targets name, in the order of the alphabet."""
    sites = ak.wrap(randomised(model), inputs).sites(ak.BottleneckConfig(targets=list(targets), bottleneck_size=2))
    return sorted(site.path for site in sites)


def in_each(*names: str) -> list[str]:
    return [f"blocks.{i}.{name}" for i in (0, 1) for name in names]


def is_proven(model: nn.Module, inputs: Tensor = IDS) -> bool:
    """Whether the epsilon test agrees with all that was found."""
    anatomy, _ = discover(randomised(model), inputs)
    moved = epsilon_test(model, inputs, anatomy)
    return all(s.out is not None and moved[s.out.path].agrees(s) for s in anatomy.sublayers)


# --- two streams in one tensor ----------------------------------------------------------------------------------------

CUTS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "chunk": lambda x: x.chunk(2, -1),
    "split": lambda x: x.split(WIDTH, -1),
    "split by sizes": lambda x: x.split([WIDTH, WIDTH], -1),
    "slices": lambda x: (x[..., :WIDTH], x[..., WIDTH:]),
    "negative slices": lambda x: (x[..., :-WIDTH], x[..., -WIDTH:]),
}


class Reversible(Pre):
    """y1 = x1 + attention(x2), y2 = x2 + mlp(y1), both in one tensor."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.cut(x)
        y1 = x1 + self.attention(self.norm1(x2))
        return torch.cat([y1, x2 + self.mlp(self.norm2(y1))], -1)


class TwoStreams(Model):
    """Starts both streams from one embedding, or from the halves of a wider one."""

    def __init__(self, block: Callable[[], nn.Module], *, is_wide: bool = False, blocks: int = 2) -> None:
        super().__init__(block, blocks)
        self.embedding = nn.Embedding(VOCAB, 2 * WIDTH if is_wide else WIDTH)
        self.is_wide = is_wide

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x if self.is_wide else torch.cat([x, x], -1)
        for block in self.blocks:
            x = block(x)
        return x[..., :WIDTH] + x[..., WIDTH:]


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_reversible_streams_in_one_tensor_are_told_apart(
    cut: Callable[[Tensor], tuple[Tensor, ...]], is_wide: bool
) -> None:
    model = TwoStreams(lambda: Reversible(cut), is_wide=is_wide)
    assert paths(model, "@attention.out") == in_each("attention")
    assert paths(model, "@feedforward.out") == in_each("mlp")
    assert is_proven(model)


def test_streams_that_are_stacked_and_unbound_are_told_apart() -> None:
    class Stacked(Reversible):
        def forward(self, x: Tensor) -> Tensor:
            x1, x2 = x.unbind(0)
            y1 = x1 + self.attention(self.norm1(x2))
            return torch.stack([y1, x2 + self.mlp(self.norm2(y1))])

    class Model2(TwoStreams):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            x = torch.stack([x, x])
            for block in self.blocks:
                x = block(x)
            return x[0] + x[1]

    model = Model2(lambda: Stacked(lambda x: x.unbind(0)))
    assert paths(model, "@attention.out", "@feedforward.out") == in_each("attention", "mlp")


def test_a_lone_reversible_block_has_both_sub_layers() -> None:
    model = TwoStreams(lambda: Reversible(CUTS["chunk"]), blocks=1)
    assert paths(model, "@sublayer.out") == ["blocks.0.attention", "blocks.0.mlp"]


def test_the_norm_before_a_reversible_feed_forward_is_that_of_the_stream_that_it_reads() -> None:
    anatomy, _ = discover(TwoStreams(lambda: Reversible(CUTS["chunk"])), IDS)
    assert [s.norm for s in anatomy.sublayers] == ["pre"] * 4
    assert [s.stream.path for s in anatomy.sublayers if s.stream] == in_each("norm1", "norm2")


# --- several streams, mixed -------------------------------------------------------------------------------------------


class HyperConnected(Pre):
    """Mixes three streams by a matrix, static or computed from them, before what a sub-layer computes is handed to each."""

    def __init__(self, *, is_static: bool) -> None:
        super().__init__()
        self.weigh = nn.ModuleList(nn.Linear(3 * WIDTH, 3 + 3 + 9) for _ in range(2))
        self.static = nn.Parameter(torch.rand(2, 15))
        self.is_static = is_static

    def step(self, at: int, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        weights = self.static[at].expand(*x.shape[:2], 15) if self.is_static else self.weigh[at](x.flatten(2)).sigmoid()
        take, give, mix = weights.split([3, 3, 9], -1)
        branch = sublayer((take.unsqueeze(-1) * x).sum(2))
        return give.unsqueeze(-1) * branch.unsqueeze(2) + mix.unflatten(-1, (3, 3)) @ x

    def forward(self, x: Tensor) -> Tensor:
        x = self.step(0, x, lambda z: self.attention(self.norm1(z)))
        return self.step(1, x, lambda z: self.mlp(self.norm2(z)))


class ThreeStreams(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).unsqueeze(2).repeat(1, 1, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.sum(2)


@pytest.mark.parametrize("is_static", [False, True])
def test_hyper_connections_have_their_sub_layers(is_static: bool) -> None:
    model = ThreeStreams(lambda: HyperConnected(is_static=is_static))
    assert paths(model, "@attention.out", "@feedforward.out") == in_each("attention", "mlp")
    assert paths(model, "@sublayer.out") == in_each("attention", "mlp")
    assert is_proven(model)


# --- branches of another size, or that are none -----------------------------------------------------------------------


def test_a_branch_of_one_token_may_be_added_to_all() -> None:
    class First(Pre):
        def forward(self, x: Tensor) -> Tensor:
            z = self.norm1(x)
            x = x + self.attention(z[:, :1], z)
            return x + self.mlp(self.norm2(x[:, :1]))

    assert paths(Model(First), "@sublayer.out") == in_each("attention", "mlp")
    assert is_proven(Model(First))


@pytest.mark.parametrize("how", ["average", "convolution"])
def test_trends_that_are_taken_off_the_stream_are_no_stream(how: str) -> None:
    class Decomposed(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

        def trend(self, x: Tensor) -> Tensor:
            return (F.avg_pool1d(x.mT, 3, 1, 1) if how == "average" else self.conv(x.mT)).mT

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x)
            first = self.trend(x)
            x = x - first
            x = x + self.mlp(x)
            second = self.trend(x)
            self.trends = first + second
            return x - second

    class Summed(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            x, total = self.embedding(input_ids), torch.zeros(())
            for block in self.blocks:
                x = block(x)
                total = total + block.trends
            return x + total

    assert paths(Summed(Decomposed), "@attention.out", "@feedforward.out") == in_each("attention", "mlp")


def test_scores_that_a_layer_adds_to_those_before_are_no_stream() -> None:
    class Talking(Pre):
        """Mixes its scores over heads by a layer, so that they end in a projection as a branch does."""

        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Linear(2, 2)
            self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def attend(self, x: Tensor) -> Tensor:
            q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
            scores = q @ k.mT
            scores = scores + self.heads(scores.movedim(1, -1)).movedim(-1, 1)
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    assert paths(Model(Talking), "@sublayer.out") == in_each("mlp", "o")


class Beside(nn.Module):
    """A layer with a low-rank branch beside it: a LoRA that someone built in."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.a, self.b = layer, nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.5 * self.b(self.a(x))


def with_sides(model: nn.Module) -> nn.Module:
    for holder in list(model.modules()):
        if isinstance(holder, (Attention, FeedForward)):
            for name, layer in list(holder.named_children()):
                setattr(holder, name, Beside(layer))
    return model


@pytest.mark.parametrize("block", [Pre, Post])
def test_a_low_rank_branch_beside_a_layer_changes_no_place(block: type[nn.Module]) -> None:
    for preset in ("houlsby", "pfeiffer"):
        plain, sided = (ak.wrap(m, IDS) for m in (Model(block), with_sides(Model(block))))
        assert [s.path for s in sided.sites(preset)] == [s.path for s in plain.sites(preset)]
    for role in ("@attention.q", "@attention.v", "@attention.last", "@feedforward.first", "@feedforward.last"):
        right = [f"{site.path}.layer" for site in plain.sites("lora", targets=[role])]
        assert [site.path for site in sided.sites("lora", targets=[role])] == right


# --- layers behind a projection ---------------------------------------------------------------------------------------


class Behind(nn.Module):
    """x + proj_out(layers(proj_in(norm(x)))): a transformer inside a U-Net."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Pre() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        z = self.proj_in(self.norm(x))
        for layer in self.layers:
            z = layer(z)
        return x + self.proj_out(z)


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_behind_a_projection_are_the_ones_adapted(layers: int) -> None:
    names = [f"layers.{i}.{name}" for i in range(layers) for name in ("attention", "mlp")]
    assert paths(Model(lambda: Behind(layers)), "@sublayer.out") == in_each(*names)


def test_layers_under_a_long_skip_are_the_ones_adapted() -> None:
    """A stage of SwinIR: x + projection(layers(x)). Its layers begin with the very stream that the skip hands on."""

    class Stage(Behind):
        def __init__(self) -> None:
            super().__init__(layers=2)
            self.proj_in, self.norm = nn.Identity(), nn.Identity()

    assert paths(Model(Stage), "@sublayer.out") == in_each(
        *(f"layers.{i}.{n}" for i in (0, 1) for n in ("attention", "mlp"))
    )
    assert {s.kind for s in discover(randomised(Model(Stage)), IDS)[0].sublayers} == {"attention", "feedforward"}


def test_a_transformer_that_computes_a_gate_is_part_of_the_branch_that_it_gates() -> None:
    class Gated(Behind):
        def __init__(self) -> None:
            super().__init__(layers=2)
            self.gate = nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.proj_in(self.norm(x))
            gate = z
            for layer in self.layers:
                gate = layer(gate)
            return x + self.proj_out(z * self.gate(gate))

    assert paths(Model(Gated), "@sublayer.out") == in_each("proj_out")


# --- tokens mixed by a convolution ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_skip_first", [False, True])
def test_features_stay_where_they_are_when_tokens_are_mixed(is_skip_first: bool) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.channels = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), FeedForward()
            self.tokens = nn.Sequential(nn.Conv1d(5, 10, 1), nn.GELU(), nn.Conv1d(10, 5, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.tokens(self.norm1(x))
            x = x + y if is_skip_first else y + x
            z = self.channels(self.norm2(x))
            return x + z if is_skip_first else z + x

    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    sites = ak.wrap(nn.Sequential(Mixer(), Mixer()), x).sites("houlsby", bottleneck_size=2)
    right = [(f"{i}.{name}", WIDTH, -1) for i in (0, 1) for name in ("channels", "tokens.2")]
    assert sorted((site.path, site.width, site.axis) for site in sites) == right


class Sided(Pre):
    """Looks at a memory, too; all its layers have low-rank branches."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = Attention()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.cross(x, memory)
        return x + self.mlp(self.norm2(x))


def test_a_low_rank_branch_beside_a_layer_that_reads_a_memory_is_no_step() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Sided() for _ in range(2))

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, memory)
            return x

    inputs = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    kit = ak.wrap(with_sides(randomised(Decoder())), inputs)
    assert sorted(site.path for site in kit.sites("houlsby", bottleneck_size=2)) == in_each("attention", "mlp")
    sites = kit.sites("lora", targets=["@crossattention.k"], rank=2)
    assert [site.path for site in sites] == in_each("cross.k.layer")


def test_values_that_a_layer_has_from_the_one_before_are_no_stream() -> None:
    class Mixed(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
            z = self.norm1(x)
            v = self.v(z) if values is None else values + self.v(z)
            q, k, held = (y.unsqueeze(1) for y in (self.q(z), self.k(z), v))
            x = x + self.o(F.scaled_dot_product_attention(q, k, held).squeeze(1))
            return x + self.mlp(self.norm2(x)), v

    class Handing(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            x, values = self.embedding(input_ids), None
            for block in self.blocks:
                x, values = block(x, values)
            return x

    assert paths(Handing(Mixed), "@feedforward.out") == in_each("mlp")
    assert paths(Handing(Mixed), "@attention.out") == in_each("o")


def test_layers_of_token_mixers_behind_a_projection_are_the_ones_adapted() -> None:
    class Tokens(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix(self.norm1(x).mT).mT
            return x + self.mlp(self.norm2(x))

    class BehindTokens(Behind):
        def __init__(self) -> None:
            super().__init__(2)
            self.layers = nn.ModuleList(Tokens() for _ in range(2))

    found = paths(Model(BehindTokens), "@feedforward.out")
    assert found == in_each("layers.0.mlp", "layers.1.mlp")


# --- two streams, each a tensor ---------------------------------------------------------------------------------------


def test_the_sums_of_two_streams_of_one_block_are_adapted_each() -> None:
    """The block returns both; as one adapter sits at one tensor of a module, each sits at its branch, and knows the sum."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.ModuleList(Attention() for _ in range(2))
            self.mlp = nn.ModuleList(FeedForward() for _ in range(2))
            self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            a, b = a + self.attention[0](self.norm[0](a)), b + self.attention[1](self.norm[1](b))
            return a + self.mlp[0](self.norm[2](a)), b + self.mlp[1](self.norm[3](b))

    class Two(Model):
        def __init__(self) -> None:
            super().__init__(Block)  # type: ignore[arg-type]  # blocks of two streams

        def states(self, input_ids: Tensor, adapt: Callable[[Tensor, int], Tensor]) -> Tensor:
            a, b = self.embedding(input_ids), self.embedding(input_ids.flip(1))
            for n, block in enumerate(self.blocks):
                a, b = block(a, b)
                a, b = adapt(a, 2 * n), adapt(b, 2 * n + 1)
            return self.head(self.norm(a + b))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.states(input_ids, lambda x, _: x)

    model = randomised(Two()).double()
    kit = ak.wrap(model, IDS)
    kit.add("a", "pfeiffer", bottleneck_size=3, dtype="float64")
    assert [site.path for site in kit.sites("pfeiffer", bottleneck_size=3)] == in_each("mlp.0", "mlp.1")
    for parameter in kit.parameters("a"):
        nn.init.normal_(parameter)
    own = list(kit.parameters("a"))

    def adapt(x: Tensor, n: int) -> Tensor:
        down, down_bias, up, up_bias = own[4 * n : 4 * n + 4]
        return x + torch.relu(x @ down.T + down_bias) @ up.T + up_bias

    with kit.active("a"):
        adapted = model(IDS)
    assert torch.allclose(adapted, model.states(IDS, adapt), rtol=1e-9, atol=1e-9)


def test_an_attention_and_a_feedforward_whose_sum_a_module_returns_are_two_branches() -> None:
    class Both(Pre):
        def forward(self, x: Tensor) -> Tensor:
            z = self.norm1(x)
            return self.attention(z) + self.mlp(z)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Both()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    assert paths(Model(Around), "@sublayer.out") == in_each("inner.attention", "inner.mlp")
    assert paths(Model(Around), "@feedforward.out") == in_each("inner.mlp")


@pytest.mark.parametrize("is_masked", [True, False])
def test_scores_that_are_mixed_and_added_are_no_stream(is_masked: bool) -> None:
    class Adding(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            q, k, v = (linear(x).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
            scores = q @ k.mT
            scores = scores + self.mix(scores)
            scores = scores.masked_fill(x[:, None, None, :, 0] > 1e3, -1e9) if is_masked else scores
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Adding()

    assert paths(Model(Block), "@sublayer.out") == in_each("attention", "mlp")


def test_a_parallel_adapter_reads_the_mixture_that_enters_a_hyper_connected_branch() -> None:
    class Streams(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.give, self.take = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            """Shape: (batch, tokens, 2, WIDTH)."""
            return self.states(x, lambda _: 0)

        def states(self, x: Tensor, beside: Callable[[Tensor], Tensor | int]) -> Tensor:
            for norm, layer, adapt in ((self.norm1, self.attention, lambda _: 0), (self.norm2, self.mlp, beside)):
                taken = torch.einsum("n,btnd->btd", self.take, x)
                out = layer(norm(taken)) + adapt(taken)
                x = torch.einsum("nm,btnd->btmd", self.mix, x) + self.give[:, None] * out[:, :, None]
            return x

    class Hyper(Model):
        def run(self, input_ids: Tensor, beside: Callable[[Tensor, int], Tensor | int]) -> Tensor:
            x = self.embedding(input_ids)[:, :, None].expand(-1, -1, 2, -1)
            for n, block in enumerate(self.blocks):
                assert isinstance(block, Streams)
                x = block.states(x, lambda taken, n=n: beside(taken, n))
            return self.head(self.norm(x.sum(2)))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)[:, :, None].expand(-1, -1, 2, -1)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x.sum(2)))

    model = randomised(Hyper(Streams)).double()
    kit = ak.wrap(model, IDS)
    kit.add("a", "parallel", bottleneck_size=3, dtype="float64")
    for parameter in kit.parameters("a"):
        nn.init.normal_(parameter)
    own = list(kit.parameters("a"))

    def beside(taken: Tensor, n: int) -> Tensor:
        down, down_bias, up, up_bias = own[4 * n : 4 * n + 4]
        return 4 * (torch.relu(taken @ down.T + down_bias) @ up.T + up_bias)

    with kit.active("a"):
        adapted = model(IDS)
    with kit.base():
        assert torch.allclose(adapted, model.run(IDS, beside), rtol=1e-9, atol=1e-9)


def test_what_one_stream_gives_to_another_that_it_looked_at_is_a_branch() -> None:
    """The outer product mean of AlphaFold's Evoformer: the pairs look at sequences whose attention looked at the pairs."""

    class Evoformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.rows, self.columns = nn.Linear(WIDTH, WIDTH), Attention(), Attention()
            self.transition, self.product, self.to_pairs, self.pairs = (
                FeedForward(),
                nn.Linear(WIDTH, 2),
                nn.Linear(4, WIDTH),
                FeedForward(),
            )

        def mean_of_products(self, x: Tensor) -> Tensor:
            a = self.product(x).flatten(1)
            products = (a[:, :, None] @ a[:, None]).view(len(x), x.shape[1], 2, x.shape[1], 2)
            return self.to_pairs(products.transpose(2, 3).flatten(3))

        def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            x = x + self.rows(x + self.bias(z).mean(2))
            x = x + self.columns(x)
            x = x + self.transition(x)
            z = z + self.mean_of_products(x)
            return x, z + self.pairs(z)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Evoformer() for _ in range(2))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            for block in self.blocks:
                x, z = block(x, z)
            return x.sum(1) + z.sum((1, 2))

    kit = ak.wrap(randomised(Stack()), (torch.randn(2, 5, WIDTH), torch.randn(2, 5, 5, WIDTH)))
    assert [s.path for s in kit.sites("houlsby")] == in_each("rows", "columns", "transition", "to_pairs", "pairs")
