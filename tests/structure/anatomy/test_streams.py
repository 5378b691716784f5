"""Which additions are steps of a residual stream, and which only look like one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.structure.anatomy.description import Anatomy
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.anatomy.epsilon import Moved, epsilon_test

from ...hosts.blocks import HEADS, VOCAB, WIDTH, Attention, FeedForward, Model, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


def found(model: nn.Module, *inputs: Tensor) -> tuple[Anatomy, dict[str, Moved]]:
    """The anatomy and the epsilon test, on token ids if nothing else is given."""
    anatomy, _ = discover(randomised(model), inputs or IDS)
    return anatomy, epsilon_test(model, inputs or IDS, anatomy)


def outs(anatomy: Anatomy) -> list[tuple[str, str]]:
    return [(s.kind, s.out.path if s.out else "") for s in anatomy.sublayers]


def pairs(first: str, second: str) -> list[tuple[str, str]]:
    kinds = [("attention", first), ("feedforward", second)]
    return [(kind, f"blocks.{i}.{name}") for i in (0, 1) for kind, name in kinds]


def test_a_skip_that_is_projected_to_another_width_is_a_skip() -> None:
    class Widening(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.skip = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm1(x)
            x = self.skip(z) + self.attention(z)
            return x + self.mlp(self.norm2(x))

    anatomy, moved = found(Model(Widening))
    assert outs(anatomy) == pairs("attention", "mlp")
    assert all(m.is_exact for m in moved.values())


def test_the_levels_of_a_pyramid_are_no_sub_layers() -> None:
    class Pyramid(Model):
        def __init__(self) -> None:
            super().__init__(Pre)
            self.laterals = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            levels = [self.embedding(input_ids)]
            for block in self.blocks:
                levels.append(block(levels[-1]))
            return self.laterals[1](levels[2]) + self.laterals[0](levels[1])

    assert outs(found(Pyramid())[0]) == pairs("attention", "mlp")


def test_a_straight_through_estimator_is_no_sub_layer() -> None:
    class Quantised(Pre):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            rounded = self.attention.o(x).round()
            return x + (rounded - x).detach()

    anatomy, _ = found(Model(Quantised))
    assert [s.kind for s in anatomy.sublayers] == ["attention", "feedforward"] * 2


def test_a_constant_added_to_a_branch_leaves_it_exact() -> None:
    class Offset(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = x + (self.attention(self.norm1(x)) + self.bias)
            return x + self.mlp(self.norm2(x))

    anatomy, moved = found(Model(Offset))
    assert outs(anatomy) == pairs("attention", "mlp")
    assert not any(s.scales for s in anatomy.sublayers)
    assert all(m.is_exact for m in moved.values())


def test_a_gate_for_each_token_is_a_factor() -> None:
    class Gated(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.sigmoid(self.gate(x)) * self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    anatomy, moved = found(Model(Gated))
    assert outs(anatomy) == pairs("attention", "mlp")
    assert [s.scales for s in anatomy.sublayers] == [("mul",), ()] * 2
    assert moved["blocks.0.attention"].agrees(anatomy.sublayers[0])
    assert not moved["blocks.0.attention"].is_exact


def test_a_branch_that_is_changed_on_its_way_does_not_agree() -> None:
    class Squashed(Pre):
        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.tanh(self.attention(self.norm1(x)))
            return x + self.mlp(self.norm2(x))

    anatomy, moved = found(Model(Squashed))
    assert [moved[s.out.path].agrees(s) for s in anatomy.sublayers if s.out] == [False, True] * 2


def test_parallel_branches_may_share_a_factor() -> None:
    class Halved(Pre):
        def forward(self, x: Tensor) -> Tensor:
            z = self.norm1(x)
            return x + 0.5 * (self.attention(z) + self.mlp(z))

    anatomy, moved = found(Model(Halved))
    assert outs(anatomy) == pairs("attention", "mlp")
    assert {(s.is_parallel, s.scales) for s in anatomy.sublayers} == {(True, ("mul",))}
    assert {m.factor for m in moved.values()} == {(0.5, 0.5)}


class Query(nn.Module):
    """A decoder of learned queries: their positions are added to them again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(3, WIDTH))
        self.layers = nn.ModuleList(QueryLayer() for _ in range(3))

    def forward(self, memory: Tensor) -> Tensor:
        positions = self.positions[None].repeat(len(memory), 1, 1)
        x = torch.zeros_like(positions)
        for layer in self.layers:
            x = layer(x, positions, memory)
        return x


class QueryLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.cross, self.mlp = Attention(), Attention(), FeedForward()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x + positions))
        x = self.norm2(x + self.cross(x + positions, memory))
        return self.norm3(x + self.mlp(x))


def test_positions_that_are_added_again_are_no_stream() -> None:
    anatomy, moved = found(Query(), torch.randn(2, 5, WIDTH))
    names = [("attention", "attention"), ("crossattention", "cross"), ("feedforward", "mlp")]
    assert outs(anatomy) == [(kind, f"layers.{i}.{name}") for i in range(3) for kind, name in names]
    assert all(m.is_exact for m in moved.values())


def test_sub_layers_that_are_numbered_are_of_one_block() -> None:
    class Residual(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(WIDTH), inner

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(self.norm(x))

    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(Residual(Attention()), Residual(FeedForward()))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    anatomy, _ = found(Model(Numbered))  # type: ignore[arg-type]  # a block
    assert [(s.kind, s.block) for s in anatomy.sublayers] == [
        (kind, f"blocks.{i}") for i in (0, 1) for kind in ("attention", "feedforward")
    ]


def test_blocks_in_stages_are_blocks() -> None:
    class Staged(Model):
        def __init__(self) -> None:
            super().__init__(Pre)
            self.blocks = nn.ModuleList(nn.Sequential(Pre(), Pre()) for _ in range(2))

    anatomy, _ = found(Staged())
    assert list(dict.fromkeys(s.block for s in anatomy.sublayers)) == [f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 1)]


def test_a_reversible_block_has_two_steps() -> None:
    class Reversible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = Attention(), FeedForward()

        def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            one = x[0] + self.attention(x[1])
            return one, x[1] + self.mlp(one)

    class Two(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            x = (x, x)
            for block in self.blocks:
                x = block(x)
            return torch.cat(x, -1)

    anatomy, moved = found(Two(Reversible))  # type: ignore[arg-type]  # a block
    assert outs(anatomy) == pairs("attention", "mlp")
    assert all(m.is_exact for m in moved.values())


def test_another_stream_that_a_branch_looks_at_keeps_its_own_steps() -> None:
    class TwoWay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.to_image, self.mlp, self.to_tokens = Attention(), Attention(), FeedForward(), Attention()

        def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            tokens = tokens + self.attention(tokens)
            tokens = tokens + self.to_image(tokens, image)
            tokens = tokens + self.mlp(tokens)
            return tokens, image + self.to_tokens(image, tokens)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(TwoWay() for _ in range(2))

        def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            for layer in self.layers:
                tokens, image = layer(tokens, image)
            return tokens, image

    anatomy, _ = found(Decoder(), torch.randn(2, 3, WIDTH), torch.randn(2, 6, WIDTH))
    names = ["attention", "to_image", "mlp", "to_tokens"]
    assert [path for _, path in outs(anatomy)] == [f"layers.{i}.{name}" for i in (0, 1) for name in names]


def test_a_loop_over_positions_is_a_mixer() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            z, state = self.inner(x), torch.zeros(len(x), WIDTH)
            states = []
            for t in range(z.shape[1]):
                state = 0.5 * state + z[:, t]
                states.append(state)
            return self.out(torch.stack(states, 1))

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.attention: Any = Recurrent()

    anatomy, _ = found(Model(Block))
    assert outs(anatomy)[:2] == [("mixer", "blocks.0.attention"), ("feedforward", "blocks.0.mlp")]


@pytest.mark.parametrize("chooses", [True, False])
def test_convolutions_that_are_told_what_to_look_at_are_no_experts(chooses: bool) -> None:
    """TimesNet folds a series by its strongest frequencies, and convolves what it has folded."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.Sequential(
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
            )

        def forward(self, x: Tensor) -> Tensor:
            strength, _ = x.abs().mean(-1).topk(1) if chooses else (torch.ones(len(x), 1), None)
            y = self.convs(F.pad(x, (0, 0, 0, 1)).unflatten(1, (2, 3)).permute(0, 3, 1, 2))
            return y.permute(0, 2, 3, 1).flatten(1, 2)[:, :5] * strength[..., None].softmax(1)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.folded = nn.LayerNorm(WIDTH), Folded()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.folded(x))

    anatomy, _ = found(Model(Block))  # type: ignore[arg-type]  # a block of one branch
    assert outs(anatomy) == [("convolution", f"blocks.{i}.folded") for i in (0, 1)]


def test_a_layer_that_serves_two_streams_carries_one_adapter_for_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.down(torch.relu(self.up(x))), y + self.down(torch.relu(self.up(y)))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Shared() for _ in range(2))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            for layer in self.layers:
                x, y = layer(x, y)
            return x, y

    anatomy, moved = found(Both(), torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH))
    assert [path for _, path in outs(anatomy)] == ["layers.0.down", "layers.1.down"]
    assert all(m.is_exact for m in moved.values())


class Pictures(nn.Module):
    """Tokens of an image in (batch, channels, height, width), which pass a bare identity before they are added."""

    def __init__(self, *, rearranged: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PictureLayer(rearranged) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class PictureLayer(nn.Module):
    def __init__(self, rearranged: bool) -> None:
        super().__init__()
        self.rearranged, self.drop = rearranged, nn.Identity()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=HEADS)
        self.mlp = FeedForward() if rearranged else nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.mix(x)
        z = self.mlp(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.rearranged else self.mlp(z)
        return x + self.drop(z)


@pytest.mark.parametrize("rearranged", [True, False])
def test_the_features_of_a_module_that_has_none_of_its_own_are_found(rearranged: bool) -> None:
    """All axes are as wide as the features, so that no shape tells."""
    model = randomised(Pictures(rearranged=rearranged))
    config = ak.BottleneckConfig(targets=["@convolution.out"])
    sites = ak.wrap(model, torch.randn(WIDTH, WIDTH, WIDTH, WIDTH)).sites(config)
    assert [(site.path, site.axis) for site in sites] == [("layers.0.drop", -3), ("layers.1.drop", -3)]


def test_a_cnn_is_refused_by_presets_that_speak_of_transformer_blocks() -> None:
    kit = ak.wrap(randomised(Pictures(rearranged=False)), torch.randn(2, WIDTH, 5, 5))
    with pytest.raises(
        ak.TargetError, match=r"2 residual branches, which are convolutions all: this is a CNN. .*@convolution"
    ):
        kit.add("a", "pfeiffer")


def test_presets_leave_convolutions_before_a_transformer_alone() -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.model = Pictures(rearranged=False), Model(Pre)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            for block in self.model.blocks:
                x = block(x)
            return x

    kit = ak.wrap(randomised(Hybrid()), torch.randn(2, WIDTH, 3, 3))
    assert [site.path for site in kit.sites("pfeiffer")] == ["model.blocks.0", "model.blocks.1"]
    both = kit.sites(ak.BottleneckConfig(targets=["@convolution.out", "@block.last"]))
    assert [site.path for site in both][:2] == ["stem.layers.0.drop", "stem.layers.1.drop"]


def test_a_projection_along_the_tokens_is_a_mixer() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.attention: Any = Tokens()

    anatomy, _ = found(Model(Block))
    assert [kind for kind, _ in outs(anatomy)] == ["mixer", "feedforward"] * 2


def test_an_adapter_on_a_branch_of_tokens_works_on_the_features() -> None:
    class Mixer(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.attention: Any = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.mlp(self.norm2(x))

    sites = ak.wrap(randomised(Model(Mixer)), IDS).sites("houlsby")
    assert [(s.path, s.width, s.axis) for s in sites[:2]] == [
        ("blocks.0.attention.2", WIDTH, -2),
        ("blocks.0.mlp", WIDTH, -1),
    ]


def test_the_gates_of_a_gated_unit_are_no_branches() -> None:
    """GTrXL's gates take the stream and what the attention returns: x' = (1 - z) x + z tanh(W y + U r x)."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wz, self.uz, self.w, self.u = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
            self.bias = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = (self.wz(y) + self.uz(x) - self.bias).sigmoid()
            return (1 - z) * x + z * (self.w(y) + self.u(x)).tanh()

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ModuleList(Gate() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.gates[0](x, self.attention(self.norm1(x)))
            return self.gates[1](x, self.mlp(self.norm2(x)))

    model = randomised(Model(Block))
    with pytest.raises(ak.TargetError, match="no block that adds what it computes to a stream"):
        ak.wrap(model, torch.zeros(2, 5, dtype=torch.long)).sites("houlsby")


def test_an_attention_that_a_gated_unit_mixes_with_the_stream_is_not_left_out() -> None:
    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRUCell(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            attended = self.attention(self.norm1(x))
            x = self.gru(attended.flatten(0, 1), x.flatten(0, 1)).view_as(x)
            return x + self.mlp(self.norm2(x))

    kit = ak.wrap(randomised(Model(Block)), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ak.TargetError, match=r"attention that 'blocks.0.attention' computes .* is not added to the stream"):
        kit.sites("houlsby")
    assert len(kit.sites("pfeiffer")) == 2  # the last of each block is known
    assert len(kit.sites("houlsby", exclude=["blocks.*.attention"])) == 2
    with pytest.raises(ak.TargetError, match="is not added to the stream"):  # a block that is the whole model
        ak.wrap(randomised(Block()), torch.randn(2, 5, WIDTH)).sites("houlsby")


def test_a_stream_may_be_taken_apart_and_put_together_to_be_added_to() -> None:
    """The spatial attention of TimeSformer: what it computes for the class token is averaged over the frames."""

    class Block(Pre):
        def forward(self, x: Tensor) -> Tensor:
            first, rest = x[:, :1], x[:, 1:]
            frames = rest.reshape(2 * len(x), 2, WIDTH)
            branch = self.attention(self.norm1(torch.cat([first.repeat_interleave(2, 0), frames], 1)))
            of_first = branch[:, 0].reshape(len(x), 2, WIDTH).mean(1, keepdim=True)
            x = torch.cat([first, rest], 1) + torch.cat([of_first, branch[:, 1:].reshape(rest.shape)], 1)
            return x + self.mlp(self.norm2(x))

    anatomy, _ = found(Model(Block))
    assert [(s.kind, s.out is None) for s in anatomy.sublayers] == [("attention", True), ("feedforward", False)] * 2
    with pytest.raises(ak.TargetError, match=r"no module returns what is added in 'blocks\.0'"):
        ak.wrap(randomised(Model(Block)), IDS).sites("houlsby")


@pytest.mark.parametrize(("factor", "site"), [(1, "blocks.0"), (1.0, "blocks.0"), (2.0, "blocks.0.inner")])
def test_a_sum_that_is_divided_by_one_is_returned_as_it_is(factor: float, site: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.inner(x)) / factor

    assert ak.wrap(randomised(Model(Block)), IDS).sites("pfeiffer")[0].path == site
