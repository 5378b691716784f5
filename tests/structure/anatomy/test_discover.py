import copy

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.anatomy import discover as discovery
from adapterkit.structure.anatomy.description import Sublayer
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.anatomy.epsilon import epsilon_test

from ...hosts.blocks import (
    VOCAB,
    WIDTH,
    Convolution,
    EncoderDecoder,
    FeedForward,
    Functional,
    InPlace,
    Mixture,
    Model,
    Parallel,
    Post,
    Pre,
    Sandwich,
    Scaled,
    randomised,
)

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


def described(sublayer: Sublayer) -> tuple[str, str | None, str]:
    return sublayer.kind, sublayer.out and sublayer.out.path, sublayer.norm


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Pre, [("attention", "attention", "pre"), ("feedforward", "mlp", "pre")]),
        (InPlace, [("attention", "attention", "pre"), ("feedforward", "mlp", "pre")]),
        (Post, [("attention", "attention", "post"), ("feedforward", "mlp", "post")]),
        (Sandwich, [("attention", "end1", "sandwich"), ("feedforward", "end2", "sandwich")]),
        (Parallel, [("attention", "attention", "pre"), ("feedforward", "mlp", "pre")]),
        (Scaled, [("attention", "attention", "pre"), ("feedforward", "mlp", "pre")]),
        (Mixture, [("attention", "attention", "pre"), ("feedforward", "mlp", "pre")]),
        (Convolution, [("convolution", "attention", "pre"), ("feedforward", "mlp", "pre")]),
    ],
)
def test_each_build_of_a_block_is_understood(block: type[Pre], expected: list[tuple[str, str, str]]) -> None:
    anatomy, _ = discover(randomised(Model(block)), IDS)
    found = [described(sublayer) for sublayer in anatomy.sublayers]
    assert found == [(kind, f"blocks.{i}.{out}", norm) for i in (0, 1) for kind, out, norm in expected]
    assert [place.path for place in anatomy.embeddings] == ["embedding"]
    assert {sublayer.block for sublayer in anatomy.sublayers} == {"blocks.0", "blocks.1"}
    assert [place.path for place in anatomy.blocks] == (
        ["blocks.0.norm2", "blocks.1.norm2"] if block is Post else ["blocks.0", "blocks.1"]
    )


@pytest.mark.parametrize("block", [Pre, InPlace, Post, Sandwich, Parallel, Scaled, Mixture, Convolution])
def test_the_epsilon_test_proves_each_branch(block: type[Pre]) -> None:
    model = randomised(Model(block))
    anatomy, _ = discover(model, IDS)
    moved = epsilon_test(model, IDS, anatomy)
    for sublayer in anatomy.sublayers:
        assert sublayer.out is not None
        result = moved[sublayer.out.path]
        assert result.agrees(sublayer)
        assert result.is_exact == (block is not Scaled)
    if block is Scaled:
        gamma = model.blocks[0].gamma.detach()  # type: ignore[union-attr,index]  # a Model
        assert moved["blocks.0.mlp"].factor == pytest.approx((float(gamma.min()), float(gamma.max())), rel=1e-5)


def test_the_epsilon_test_finds_a_module_that_two_additions_take() -> None:
    class Twice(Pre):
        def forward(self, x: Tensor) -> Tensor:
            branch = self.mlp(self.norm2(x))
            return (x + branch) + branch

    model = randomised(Model(Twice))
    anatomy, _ = discover(model, IDS)
    result = epsilon_test(model, IDS, anatomy)["blocks.0.mlp"]
    assert result.additions == 2
    assert not result.is_exact


def test_the_epsilon_test_sees_the_scale_of_a_single_position() -> None:
    class Pooled(nn.Module):
        """The class token alone goes through blocks with LayerScale."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.blocks = nn.Embedding(VOCAB, WIDTH), nn.ModuleList([FeedForward(), FeedForward()])
            self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)[:, :1]
            for block in self.blocks:
                x = x + self.gamma * block(x)
            return x

    model = randomised(Pooled())
    anatomy, _ = discover(model, IDS)
    moved = epsilon_test(model, IDS, anatomy)
    assert [moved[s.out.path].agrees(s) for s in anatomy.sublayers if s.out] == [True, True]


def test_projections_of_an_attention_are_told_apart() -> None:
    anatomy, _ = discover(randomised(Model(Pre)), IDS)
    attention, feedforward = anatomy.sublayers[:2]
    assert attention.query == ("blocks.0.attention.q",)
    assert attention.key == ("blocks.0.attention.k",)
    assert attention.value == ("blocks.0.attention.v",)
    assert attention.last == ("blocks.0.attention.o",)
    assert (feedforward.first, feedforward.last) == (("blocks.0.mlp.up",), ("blocks.0.mlp.down",))


def test_an_encoder_decoder_has_two_stacks_and_cross_attention() -> None:
    model = randomised(EncoderDecoder())
    anatomy, _ = discover(model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]})
    kinds = [(s.kind, s.block) for s in anatomy.sublayers]
    assert kinds[:4] == [(kind, f"encoder.{i}") for i in (0, 1) for kind in ("attention", "feedforward")]
    assert kinds[4:7] == [(kind, "decoder.0") for kind in ("attention", "crossattention", "feedforward")]
    assert len(kinds) == 10


def test_a_branch_of_functions_is_reported_without_a_module() -> None:
    anatomy, _ = discover(randomised(Model(Functional)), IDS)
    assert [sublayer.out for sublayer in anatomy.sublayers] == [None, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_discovery_works_in_any_precision(dtype: torch.dtype) -> None:
    model = randomised(Model(Pre)).to(dtype)
    anatomy, _ = discover(model)
    assert len(anatomy.sublayers) == 4
    assert all(moved.is_exact for moved in epsilon_test(model, IDS, anatomy).values())


def test_discovery_works_without_weights() -> None:
    with torch.device("meta"):
        model = Model(Post)
    anatomy, _ = discover(model)
    assert [described(s) for s in anatomy.sublayers] == [described(s) for s in discover(Model(Post), IDS)[0].sublayers]


def test_discovery_leaves_no_trace() -> None:
    class Counting(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Model(Counting).train()
    model.blocks[1].eval()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    discover(model, IDS)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [block.training for block in model.blocks] == [True, False]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_a_structure_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    record = discovery.record_graph
    monkeypatch.setattr(discovery, "record_graph", lambda *args: runs.append(1) or record(*args))
    discover(Model(Pre, layers=3), IDS)
    first = len(runs)
    anatomy, _ = discover(randomised(Model(Pre, layers=3)), IDS)
    assert (first, len(runs)) == (1, 1)
    discover(Model(Post, layers=3), IDS)
    assert len(runs) == 2, "another class of the same shapes is another structure"
    assert len(anatomy.sublayers) == 6


@pytest.mark.parametrize("inputs", [None, IDS], ids=["made", "given"])
def test_discovery_is_one_forward(inputs: Tensor | None) -> None:
    class Counted(Model):
        runs = 0

        def forward(self, input_ids: Tensor) -> Tensor:
            Counted.runs += 1
            return super().forward(input_ids)

    discover(Counted(Pre), inputs)
    assert Counted.runs == 1


def test_a_flag_that_changes_the_structure_is_part_of_it() -> None:
    def layer(norm_first: bool) -> nn.Module:
        return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=norm_first)

    x = torch.randn(2, 3, WIDTH)
    norms = [discover(nn.Sequential(layer(flag), layer(flag)), x)[0].sublayers[0].norm for flag in (False, True)]
    assert norms == ["post", "pre"]


@pytest.mark.parametrize(
    "model",
    [
        Model(Pre),
        EncoderDecoder(),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16), 2, enable_nested_tensor=False),
        nn.Transformer(WIDTH, 2, 2, 2, 16, batch_first=True),
    ],
    ids=lambda model: type(model).__name__,
)
def test_inputs_are_made_where_none_are_given(model: nn.Module) -> None:
    anatomy, inputs = discover(model)
    assert len(anatomy.sublayers) >= 4
    with torch.no_grad():
        model(**inputs)  # type: ignore[arg-type]  # made by name


def test_a_model_that_runs_on_nothing_says_so() -> None:
    class Picky(nn.Module):
        def forward(self, graph: object) -> None:
            raise ValueError("no such graph")

    with pytest.raises(ak.CompatibilityError, match=r"Picky .* made for it; .*example_inputs=batch.*Tried: nothing"):
        ak.wrap(Picky()).sites("pfeiffer")
