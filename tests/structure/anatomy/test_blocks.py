"""Which blocks a model has, and that none of them is left out in silence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover

from ...hosts.blocks import VOCAB, WIDTH, Attention, FeedForward, Model, Post, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


def places(model: nn.Module, preset: str = "pfeiffer", inputs: Any = IDS, **settings: Any) -> list[tuple[str, str, str]]:
    return [(s.path, s.at, s.reads) for s in ak.wrap(randomised(model), inputs).sites(preset, **settings)]


class Step(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def test_in_a_flat_list_of_sub_layers_a_block_ends_in_its_feed_forward() -> None:
    model = Model(Pre, 0)
    model.blocks = nn.ModuleList([Step(Attention()), Step(FeedForward()), Step(Attention()), Step(FeedForward())])
    assert [path for path, _, _ in places(model)] == ["blocks.1", "blocks.3"]
    assert [path for path, _, _ in places(model, "houlsby")] == [f"blocks.{i}.inner" for i in range(4)]


class Lists(nn.Module):
    """Its attentions, feed-forwards and norms are in lists of their own, and the model adds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.attentions = nn.ModuleList(Attention() for _ in range(2))
        self.mlps = nn.ModuleList(FeedForward() for _ in range(2))
        self.norms1, self.norms2 = (nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for attention, mlp, norm1, norm2 in zip(self.attentions, self.mlps, self.norms1, self.norms2, strict=True):
            x = norm1(x + attention(x))
            x = norm2(x + mlp(x))
        return x


def test_sub_layers_and_norms_may_lie_in_lists_of_their_own() -> None:
    assert places(Lists()) == [("norms2.0", "input", "norm"), ("norms2.1", "input", "norm")]


class Once(nn.Module):
    def __init__(self, block: nn.Module, times: int) -> None:
        super().__init__()
        self.embedding, self.block, self.times = nn.Embedding(VOCAB, WIDTH), block, times

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for _ in range(self.times):
            x = self.block(x)
        return x


@pytest.mark.parametrize("times", [1, 3])
def test_a_block_needs_no_number(times: int) -> None:
    assert places(Once(Pre(), times)) == [("block", "output", "site")]


def test_a_layer_of_torch_is_a_block_by_itself() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    assert places(layer, inputs=torch.randn(2, 5, WIDTH)) == [("norm2", "input", "norm")]


def test_blocks_may_be_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.first, self.second = nn.Embedding(VOCAB, WIDTH), Pre(), Pre()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.second(self.first(self.embedding(input_ids)))

    assert [path for path, _, _ in places(Named())] == ["first", "second"]


def test_a_block_beside_the_list_is_one_of_them() -> None:
    class Final(Model):
        def __init__(self) -> None:
            super().__init__(Pre)
            self.final = Pre()

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for block in (*self.blocks, self.final):
                x = block(x)
            return x

    assert [path for path, _, _ in places(Final())] == ["blocks.0", "blocks.1", "final"]


def test_one_activation_for_all_blocks_is_no_obstacle() -> None:
    class Activated(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp.down(self.activation(self.mlp.up(self.norm2(x))))

    activation = nn.GELU()
    assert [path for path, _, _ in places(Model(Activated, 3))] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_block_may_end_in_a_view() -> None:
    class Viewed(Pre):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(x.shape)

    found = [path for path, _, _ in places(Model(Viewed, 3), "houlsby")]
    assert found == [f"blocks.{i}.{name}" for i in range(3) for name in ("attention", "mlp")]


@pytest.mark.parametrize("how", ["addcmul", "sum"])
def test_a_step_may_be_another_operation_than_addition(how: str) -> None:
    class Other(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            f = self.mlp(self.norm2(x))
            return torch.addcmul(x, self.gate, f) if how == "addcmul" else sum([x, f])

    assert [path for path, _, _ in places(Model(Other))] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("how", ["lerp", "subtract"])
def test_a_block_whose_last_step_is_not_understood_is_refused(how: str) -> None:
    class Odd(Pre):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            f = self.mlp(self.norm2(x))
            if how == "lerp":
                return torch.lerp(x, f, 0.5)
            return x - f

    with pytest.raises(
        ak.TargetError, match=r"'blocks.0.mlp.\w+' comes after all that tracing understands of .*'blocks.0'"
    ):
        places(Model(Odd))


def test_a_block_that_did_not_run_is_told() -> None:
    class Skipping(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for i, block in enumerate(self.blocks):
                x = x if i == 1 and input_ids.shape[1] < 7 else block(x)
            return x

    model = Skipping(Pre, 3)
    with pytest.raises(ak.TargetError, match=r"\['blocks.1'\] are built as the blocks beside them, but did not run"):
        places(model)
    assert [path for path, _, _ in places(model, inputs=IDS.repeat(1, 2))] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [path for path, _, _ in places(model, exclude=["blocks.1"])] == ["blocks.0", "blocks.2"]


def test_what_is_excluded_may_be_the_host_that_sites_show() -> None:
    assert [path for path, _, _ in places(Model(Pre), exclude=["blocks.1"])] == ["blocks.0"]
    assert [path for path, _, _ in places(Model(Post), exclude=["blocks.0.norm2"])] == ["blocks.1.norm2"]
    with pytest.raises(ak.TargetError, match=r"every module that would be adapted .* is excluded"):
        places(Model(Pre), exclude=["blocks.*"])


def test_a_norm_whose_sum_something_else_reads_is_the_norm_after_all() -> None:
    class Watched(Post):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.attention(x) + x)
            total = self.mlp(x) + x
            self.seen = total.pow(2).mean()
            return self.norm2(total)

    assert places(Model(Watched)) == [("blocks.0.norm2", "input", "norm"), ("blocks.1.norm2", "input", "norm")]


@pytest.mark.parametrize("preset", ["pfeiffer", "adapter_plus"])
def test_a_norm_after_the_sum_that_is_a_function_is_refused(preset: str) -> None:
    class Function(Pre):
        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(x + self.attention(x), (WIDTH,))
            return F.layer_norm(x + self.mlp(x), (WIDTH,))

    with pytest.raises(
        ak.TargetError, match=r"the norm after the feedforward in 'blocks.0' is no module of that block, but a function"
    ):
        places(Model(Function), preset)


def test_an_embedding_of_a_model_with_a_number_in_front_is_found() -> None:
    anatomy, _ = discover(randomised(nn.Sequential(Model(Pre))), IDS)
    assert [place.path for place in anatomy.embeddings] == ["0.embedding"]
    assert list(dict.fromkeys(s.block for s in anatomy.sublayers)) == ["0.blocks.0", "0.blocks.1"]


class Joint(nn.Module):
    """Two streams; one module computes what is added to both."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp_x, self.mlp_y = Attention(), FeedForward(), FeedForward()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = self.attention(torch.cat([x, y], 1))
        x, y = x + both[:, : x.shape[1]], y + both[:, x.shape[1] :]
        return x + self.mlp_x(x), y + self.mlp_y(y)


class TwoStreams(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, y = block(x, y)
        return x, y


def test_each_stream_of_a_block_has_its_last_sub_layer() -> None:
    inputs = (torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH))
    config = ak.BottleneckConfig(targets=["@block.last"])
    found = [s.path for s in ak.wrap(randomised(TwoStreams(Joint)), inputs).sites(config)]
    assert found == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("mlp_x", "mlp_y")]


def test_a_module_that_yields_two_branches_is_told() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Attention(), Attention()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x, y), self.other(y, x)

    class Block(Joint):
        def __init__(self) -> None:
            super().__init__()
            self.attention: Any = Pair()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.attention(x, y)
            x, y = x + a, y + b
            return x + self.mlp_x(x), y + self.mlp_y(y)

    kit = ak.wrap(randomised(TwoStreams(Block)), (torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)))
    with pytest.raises(ak.TargetError, match=r"'blocks.0.attention' yields two branches, at \(0,\) and \(1,\)"):
        kit.sites(ak.BottleneckConfig(targets=["@crossattention.out"]))
    chosen = kit.sites(ak.BottleneckConfig(targets=["@crossattention.out"], output=1))
    assert [(site.path, site.output) for site in chosen] == [(f"blocks.{i}.attention", (1,)) for i in (0, 1)]


def test_a_model_without_blocks_says_that_presets_have_no_place() -> None:
    with pytest.raises(ak.TargetError, match=r"tracing finds no block that adds what it computes to a stream"):
        places(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), inputs=torch.randn(2, 3, 8, 8))
