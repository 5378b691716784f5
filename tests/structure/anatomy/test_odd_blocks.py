"""Blocks that are built as no library builds them: which modules they are, and which module yields a branch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.anatomy.epsilon import epsilon_test

from ...hosts.blocks import VOCAB, WIDTH, Attention, FeedForward, Model, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


class Sum(nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


class GatedSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x * self.gate(residual).sigmoid() + residual


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.cell(x.flatten(0, 1), residual.flatten(0, 1)).view_as(x)


class Lists(nn.Module):
    """Layers as lists of a norm, a branch and the module that adds it."""

    def __init__(self, add: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        branches = (Attention(), FeedForward(), Attention(), FeedForward())
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(WIDTH), branch, add()]) for branch in branches)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for norm, branch, add in self.layers:
            x = add(branch(norm(x)), x)
        return x


def test_a_list_of_norm_branch_and_addition_is_a_block() -> None:
    for add in (Sum, GatedSum):
        model = randomised(Lists(add))
        anatomy, _ = discover(model, IDS)
        assert [(s.block, s.out and s.out.path) for s in anatomy.sublayers] == [
            (f"layers.{i}", f"layers.{i}.1") for i in range(4)
        ]
        assert all(moved.additions == 1 and moved.factor for moved in epsilon_test(model, IDS, anatomy).values())


def test_the_gates_of_a_recurrent_cell_are_no_sub_layers() -> None:
    anatomy, _ = discover(randomised(Lists(Recurrent)), IDS)
    assert (anatomy.sublayers, anatomy.others) == ((), ())


def test_modules_that_are_numbered_in_their_names_are_blocks() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.block1, self.block2 = nn.Embedding(VOCAB, WIDTH), Pre(), Pre()
            self.tower = nn.ModuleDict({"layer_0": Pre(), "layer_1": Pre()})

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.block2(self.block1(self.embedding(input_ids)))
            return self.tower["layer_1"](self.tower["layer_0"](x))

    anatomy, _ = discover(randomised(Named()), IDS)
    blocks = ["block1", "block2", "tower.layer_0", "tower.layer_1"]
    assert [s.block for s in anatomy.sublayers] == [block for block in blocks for _ in range(2)]


def test_an_attention_that_adds_its_queries_is_one_branch_of_a_block_that_pools_its_skip() -> None:
    class Pooled(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            q = F.max_pool1d(self.q(x).transpose(1, 2), 2).transpose(1, 2)
            return self.o(q + F.scaled_dot_product_attention(q, self.k(x), self.v(x)))

    class Pooling(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Pooled()

        def forward(self, x: Tensor) -> Tensor:
            skip = F.max_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
            x = skip + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    ids = torch.arange(16).view(2, 8) % VOCAB
    anatomy, _ = discover(randomised(Model(Pooling)), ids)
    outs = [(s.kind, s.out and s.out.path) for s in anatomy.sublayers]
    assert outs == [
        (kind, f"blocks.{i}.{name}") for i in (0, 1) for kind, name in (("attention", "attention"), ("feedforward", "mlp"))
    ]


def test_what_another_block_projected_is_no_skip() -> None:
    class Inner(Pre):
        def forward(self, pixels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # two streams
            pixels = pixels + self.mlp(self.norm2(pixels))
            x = x + self.attention.o(self.norm1(pixels))  # of another stream
            return pixels, x + self.attention(self.norm1(x))

    class TwoStreams(Model):
        def __init__(self) -> None:
            super().__init__(Inner)
            self.patch = nn.Linear(WIDTH, WIDTH)

        def forward(self, input_ids: Tensor) -> Tensor:
            pixels = self.embedding(input_ids)
            x = self.patch(pixels)
            for block in self.blocks:
                pixels, x = block(pixels, x)
            return x

    anatomy, _ = discover(randomised(TwoStreams()), IDS)
    assert [s.out and s.out.path for s in anatomy.sublayers] == [
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("mlp", "attention")
    ]


def test_branches_in_a_stack_that_is_summed_are_parallel() -> None:
    class Stacked(Pre):
        def forward(self, x: Tensor) -> Tensor:
            z = self.norm1(x)
            return x + torch.stack([self.attention(z), self.mlp(z)]).sum(0)

    model = randomised(Model(Stacked))
    anatomy, _ = discover(model, IDS)
    assert [(s.out and s.out.path, s.is_parallel) for s in anatomy.sublayers] == [
        (f"blocks.{i}.{name}", True) for i in (0, 1) for name in ("attention", "mlp")
    ]
    assert all(moved.is_exact for moved in epsilon_test(model, IDS, anatomy).values())


def test_a_branch_joined_from_parts_of_several_modules_is_no_single_ones() -> None:
    class Joined(Pre):
        def forward(self, x: Tensor) -> Tensor:
            z = self.norm1(x)
            return x + torch.cat([self.attention(z)[:, :2], self.mlp(z)[:, 2:]], 1)

    anatomy, _ = discover(randomised(Model(Joined)), IDS)
    assert [s.out for s in anatomy.sublayers] == [None, None]


def test_a_model_that_is_itself_a_sequence_and_adds_is_discovered() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    model = randomised(Residual(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)))
    anatomy, _ = discover(model, torch.randn(2, 3, WIDTH))
    assert len((*anatomy.sublayers, *anatomy.others)) == 1


def test_what_less_the_stream_is_scaled_is_not_taken_for_a_step() -> None:
    class Interpolated(Pre):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.3 * (self.attention(self.norm1(x)) - x)
            return x + self.mlp(self.norm2(x))

    model = randomised(Model(Interpolated))
    anatomy, _ = discover(model, IDS)
    moved = epsilon_test(model, IDS, anatomy)
    assert not any(moved[s.out.path].agrees(s) for s in anatomy.sublayers if s.kind == "attention" and s.out)
    assert all(moved[s.out.path].is_exact for s in anatomy.sublayers if s.kind == "feedforward" and s.out)


def test_what_gates_between_the_steps_of_a_block_in_a_stage_is_no_loose_end() -> None:
    class Gate(nn.Module):
        """As squeeze and excitation."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.fc(x.mean(1, keepdim=True)).sigmoid()

    class Gated(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.se = Gate()

        def forward(self, x: Tensor) -> Tensor:
            x = self.se(x + self.attention(self.norm1(x)))
            return x + self.mlp(self.norm2(x))

    class Stage(nn.Module):
        """A step of its own before its blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.ffn, self.blocks = FeedForward(), nn.ModuleList([Gated(), Gated()])

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.ffn(x)
            for block in self.blocks:
                x = block(x)
            return x

    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Sequential(Stage(), Stage()))
    anatomy, _ = discover(randomised(model), IDS)
    assert anatomy.unexplained == ()
    assert len(anatomy.sublayers) == 10
