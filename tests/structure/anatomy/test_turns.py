"""Blocks are what repeats along a stream, whatever holds their modules and whatever these are called."""

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover

from ...hosts.blocks import WIDTH, Attention, FeedForward, Model, Pre, randomised

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """A norm and what reads it: a branch, which whoever calls it adds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "a": lambda: Normed(Attention()),
    "f": lambda: Normed(FeedForward()),
}


class Adding(nn.Module):
    """Adds branches to its stream in turn; subclasses say where the branches lie."""

    def branches(self) -> Iterable[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches():
            x = x + branch(x)
        return x


class Residual(Adding):
    """Adds what one module computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def branches(self) -> Iterable[nn.Module]:
        return [self.inner]


class Pairs(Adding):
    """[[attention, feed-forward], …]"""

    def __init__(self, depth: int, kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(MAKERS[kind]() for kind in kinds) for _ in range(depth))

    def branches(self) -> Iterable[nn.Module]:
        return (branch for layer in self.layers for branch in layer)  # type: ignore[attr-defined]  # lists


class Flat(Adding):
    """[attention, feed-forward, attention, …]"""

    def __init__(self, depth: int, kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MAKERS[kind]() for kind in kinds * depth)

    def branches(self) -> Iterable[nn.Module]:
        return iter(self.layers)


class Named(Adding):
    """Attributes without a number, and the order in a plain list."""

    def __init__(self, depth: int, kinds: str) -> None:
        super().__init__()
        self.order = []
        for n, kind in enumerate(kinds * depth):
            name = f"branch_{'abcdefghijklmnopqr'[n]}"
            self.add_module(name, MAKERS[kind]())
            self.order.append(name)

    def branches(self) -> Iterable[nn.Module]:
        return (getattr(self, name) for name in self.order)


class Kinds(Adding):
    """A dict for each kind of branch."""

    def __init__(self, depth: int, kinds: str) -> None:
        super().__init__()
        self.held = nn.ModuleDict({f"all_{kind}": nn.ModuleDict() for kind in kinds})
        self.order = [(f"all_{kind}", f"no{n}") for n, kind in enumerate(kinds * depth)]
        for (kind, name), letter in zip(self.order, kinds * depth, strict=True):
            self.held[kind][name] = MAKERS[letter]()  # type: ignore[index]  # dicts

    def branches(self) -> Iterable[nn.Module]:
        return (self.held[kind][name] for kind, name in self.order)  # type: ignore[index]  # dicts


class Block(Adding):
    """A block that adds by itself."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(MAKERS[kind]() for kind in kinds)

    def branches(self) -> Iterable[nn.Module]:
        return iter(self.parts)


class Blocks(nn.Sequential):
    """A sequence of blocks."""

    def __init__(self, depth: int, kinds: str) -> None:
        super().__init__(*(Block(kinds) for _ in range(depth)))


HOLDERS: list[Callable[[int, str], nn.Module]] = [Pairs, Flat, Named, Kinds, Blocks]


def staged(holder: Callable[[int, str], nn.Module], depths: list[int], kinds: str, *, by_name: bool) -> nn.Module:
    model = nn.Sequential()
    for n, depth in enumerate(depths):
        model.add_module(f"stage_{'abc'[n]}" if by_name else str(2 * n), holder(depth, kinds))
        model.add_module(f"between_{'abc'[n]}" if by_name else str(2 * n + 1), nn.Linear(WIDTH, WIDTH))
    return randomised(model)


def order(model: nn.Module, kit: ak.AdapterKit, config: object) -> list[int]:
    """The sites of a config, by the number of the branch of the model at which each is."""
    branches = [name for name, module in model.named_modules() if isinstance(module, Normed)]
    ran: list[str] = []
    hooks = [model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name)) for name in branches]
    model(X)
    for hook in hooks:
        hook.remove()
    return [ran.index(path) for path in ran if path in {site.path for site in kit.sites(config)}]  # type: ignore[arg-type]  # a config


@settings(max_examples=15)
@given(
    st.sampled_from(HOLDERS),
    st.lists(st.integers(2, 3), min_size=1, max_size=2),
    st.sampled_from(["af", "aaf", "faf"]),
    st.booleans(),
)
def test_places_do_not_depend_on_what_holds_the_blocks(
    holder: Callable[[int, str], nn.Module], depths: list[int], kinds: str, by_name: bool
) -> None:
    model = staged(holder, depths, kinds, by_name=by_name)
    kit, count = ak.wrap(model, X), sum(depths) * len(kinds)
    last = ak.BottleneckConfig(targets=["@block.last"])
    every = ak.BottleneckConfig(targets=["@sublayer.out"])
    assert order(model, kit, last) == list(range(len(kinds) - 1, count, len(kinds)))
    assert order(model, kit, every) == list(range(count))
    assert len(discover(model, X)[0].stacks) == 1


@pytest.mark.parametrize("holder", [Pairs, Blocks])
@pytest.mark.parametrize("by_name", [False, True])
def test_layers_count_through_all_stages(holder: Callable[[int, str], nn.Module], by_name: bool) -> None:
    model = staged(holder, [2, 3], "af", by_name=by_name)
    kit = ak.wrap(model, X)
    for targets in (["@feedforward.out"], ["inner.down"]):
        assert [s.layer for s in kit.sites(ak.BottleneckConfig(targets=targets))] == [(i, 5) for i in range(5)]
        chosen = kit.sites(ak.BottleneckConfig(targets=targets, layers=[1, -1]))
        assert [s.layer for s in chosen] == [(1, 5), (4, 5)]


def test_a_target_in_no_layer_is_told_where_layers_are_named() -> None:
    kit = ak.wrap(randomised(Model(Pre)), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ak.TargetError, match=r"layers=\[0\]: \['head'\] match, but lie in no repeated block"):
        kit.sites(ak.LoRAConfig(targets=["q", "head"], layers=[0]))
    assert len(kit.sites(ak.LoRAConfig(targets=["q", "head"], layers=[0], exclude=["head"]))) == 1


def test_a_layer_that_there_is_not_in_a_map_of_settings_is_an_error() -> None:
    kit = ak.wrap(randomised(Model(Pre, 3)), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ak.TargetError, match=r"rank has values for \['9'\], .* they lie in layers \[0, 1, 2\]"):
        kit.sites(ak.LoRAConfig(targets=["q"], rank={"default": 8, "9": 2}))
    assert kit.sites(ak.LoRAConfig(targets=["q"], rank={"default": 8, "2": 2}))
    assert kit.sites(ak.LoRAConfig(targets=["q"], rank={"default": 8, "2": 2}, layers=[0]))


class Flagged(Pre):
    """Built as the others; told to, it adds its attention in a way that tracing does not know, or both branches."""

    odd = ""

    def forward(self, x: Tensor) -> Tensor:
        if not self.odd:
            return super().forward(x)
        attended = torch.lerp(x, self.attention(self.norm1(x)), 0.5)
        return attended + self.mlp(self.norm2(attended if self.odd == "attention" else x))


def flagged(odd: str) -> ak.AdapterKit:
    model = randomised(Model(Flagged, 3))
    model.blocks[1].odd = odd  # type: ignore[union-attr]  # set on one block
    return ak.wrap(model, torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("odd", ["attention", "both"])
@pytest.mark.parametrize("target", ["@sublayer.out", "@attention.out", "@attention.q"])
def test_blocks_that_are_built_alike_are_compared(target: str, odd: str) -> None:
    method = ak.LoRAConfig if target.endswith("q") else ak.BottleneckConfig
    with pytest.raises(ak.TargetError, match=r"'blocks.1' and 'blocks.0' are built alike, but"):
        flagged(odd).sites(method(targets=[target]))


def test_excluding_an_odd_block_goes_on_without_it() -> None:
    kit = flagged("attention")
    found = kit.sites(ak.BottleneckConfig(targets=["@attention.out"], exclude=["blocks.1"]))
    assert [site.path for site in found] == ["blocks.0.attention", "blocks.2.attention"]
    assert len(kit.sites(ak.BottleneckConfig(targets=["@feedforward.out"]))) == 3


def test_blocks_that_share_a_tied_attention_are_alike() -> None:
    model = randomised(Model(Pre, 3))
    for block in model.blocks:
        block.attention = model.blocks[0].attention  # type: ignore[union-attr]  # tied
    anatomy, _ = discover(model, torch.zeros(2, 5, dtype=torch.long))
    assert anatomy.unlike == ()
    assert [len(stack) for stack in anatomy.stacks] == [3]


class Resampled(Flat):
    """A flat list of layers, and at its end a feed-forward behind what is added to nothing."""

    def __init__(self, depth: int, kinds: str) -> None:
        super().__init__(depth, kinds)
        self.layers.append(nn.Linear(WIDTH, WIDTH))
        self.layers.append(MAKERS["f"]())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Linear) else x + layer(x)
        return x


def test_layers_in_a_stage_that_ends_in_a_feed_forward_are_blocks() -> None:
    model = randomised(nn.Sequential(Resampled(2, "af"), Resampled(2, "af"), Flat(2, "af")))
    kit = ak.wrap(model, X)
    assert order(model, kit, ak.BottleneckConfig(targets=["@block.last"])) == [1, 3, 4, 6, 8, 9, 11, 13]
    assert discover(model, X)[0].unlike == ()


class Convolved(nn.Module):
    """A branch that mixes tokens by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Mixing(nn.Module):
    """A block of an attention and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.conv = Normed(Attention()), Convolved()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.conv(x)


class Spoken(nn.Module):
    """Two stacks; between them a pitch and an energy, and behind them a smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.Sequential(Mixing(), Mixing()) for _ in range(2))
        self.pitch, self.energy, self.smooth = Convolved(), Convolved(), Convolved()

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        x = x + self.pitch(x)
        x = x + self.energy(x)
        x = self.decoder(x)
        return x + self.smooth(x)


def test_a_convolution_alone_is_beside_blocks_of_more() -> None:
    model = randomised(Spoken())
    anatomy, _ = discover(model, X)
    beside = {s.out.path.split(".")[0] for s in anatomy.others if s.out is not None}
    assert beside == {"pitch", "energy", "smooth"}
    stacks = [block for stack in anatomy.stacks for (block,) in stack]
    assert stacks == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]


class Gated(nn.Module):
    """What is no mixer of tokens, built otherwise than a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.gate(x).sigmoid())


class TwoBranches(nn.Module):
    """A layer that adds both of its branches itself."""

    def __init__(self, first: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = Normed(first()), Normed(FeedForward())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


@pytest.mark.parametrize("first", [Gated, Attention])
def test_stages_of_layers_behind_a_convolution(first: Callable[[], nn.Module]) -> None:
    class Stage(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.down, self.up = Convolved(), nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList(TwoBranches(first) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(x)
            for layer in self.layers:
                x = layer(x)
            return self.up(x)

    model = randomised(nn.Sequential(Residual(Convolved()), Stage(2), Stage(4), Stage(3)))
    kit = ak.wrap(model, X)
    config = ak.BottleneckConfig(targets=["@feedforward.out"])
    layers = [f"{n}.layers.{i}" for n, depth in ((1, 2), (2, 4), (3, 3)) for i in range(depth)]
    blocks = {s.block for s in discover(model, X)[0].sublayers}
    assert {*layers} <= blocks <= {*layers, "0"}
    assert {f"{layer}.second" for layer in layers} <= {site.path for site in kit.sites(config)}


def test_parallel_branches_in_lists_of_their_own_are_blocks_in_pairs() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = nn.ModuleList(Normed(Attention()) for _ in range(3))
            self.feedforwards = nn.ModuleList(Normed(FeedForward()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for attention, feedforward in zip(self.attentions, self.feedforwards, strict=True):
                x = x + attention(x) + feedforward(x)
            return x

    sites = ak.wrap(randomised(Columns()), X).sites("parallel", bottleneck_size=2)
    assert [site.path.split(".")[:2] for site in sites] == [["feedforwards", str(i)] for i in range(3)]


@pytest.mark.parametrize("tokens", ["attention", "convolution"])
def test_a_convolution_may_stand_for_a_feed_forward(tokens: str) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.firsts = nn.ModuleList(Normed(Attention() if tokens == "attention" else TokenMixer()) for _ in range(3))
            self.convs = nn.ModuleList(Convolved() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for first, conv in zip(self.firsts, self.convs, strict=True):
                x = x + first(x)
                x = x + conv(x)
            return x

    anatomy, _ = discover(randomised(Pairs()), X)
    assert [len(block) for stack in anatomy.stacks for block in stack] == [2, 2, 2]
    assert anatomy.transformer_blocks >= {f"convs.{i}" for i in range(3)}


def test_lists_that_stand_beside_one_another_are_looked_into() -> None:
    """A stage of Stable Diffusion's UNet: a convolution and a transformer behind projections, both from lists, in turn."""

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out_of = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList([Pre()])

        def forward(self, x: Tensor) -> Tensor:
            h = self.into(x)
            for block in self.blocks:
                h = block(h)
            return x + self.out_of(h)

    class Stage(nn.Module):
        def __init__(self, resnets: int, attentions: int) -> None:
            super().__init__()
            self.resnets = nn.ModuleList(Residual(Convolved()) for _ in range(resnets))
            self.attentions = nn.ModuleList(Transformer() for _ in range(attentions))

        def forward(self, x: Tensor) -> Tensor:
            for n, resnet in enumerate(self.resnets):
                x = resnet(x)
                x = self.attentions[n](x) if n < len(self.attentions) else x
            return x

    # Stages of one of each, in a list; beside it the stage in the middle, which also ends in a convolution.
    model = randomised(nn.Sequential(nn.Sequential(Stage(1, 1), Stage(1, 1), Stage(1, 0)), Stage(2, 1)))
    blocks = [f"{stage}.attentions.0.blocks.0" for stage in ("0.0", "0.1", "1")]
    kit = ak.wrap(model, X)
    assert [site.path for site in kit.sites("houlsby")] == [
        f"{b}.{inner}" for b in blocks for inner in ("attention", "mlp")
    ]
    assert [site.path for site in kit.sites("pfeiffer")] == blocks


def test_what_stands_beside_blocks_in_a_list_is_one_block_if_it_is_a_whole_turn() -> None:
    """Perceiver's layers are lists [cross-attention, feed-forward, [[attention, feed-forward], …]]."""

    class Perceiver(nn.Module):
        def __init__(self, inner: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleList([MAKERS["a"](), MAKERS["f"](), Pairs(inner, "af").layers]) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            for first, mlp, pairs in self.layers:
                x = x + first(x)
                x = x + mlp(x)
                for pair in pairs:
                    for branch in pair:
                        x = x + branch(x)
            return x

    for inner in (1, 2):
        paths = [site.path for site in ak.wrap(randomised(Perceiver(inner)), X).sites("pfeiffer")]
        last = [[f"layers.{i}.1", *(f"layers.{i}.2.{n}.1" for n in range(inner))] for i in (0, 1)]
        assert paths == [*last[0], *last[1]]


@pytest.mark.parametrize("depth", [(1, 2), (2, 2), (3,)])
def test_turns_may_follow_on_a_convolution_in_one_item_of_a_list(depth: tuple[int, ...]) -> None:
    """MaxViT's layers are lists of a convolution and two blocks; the first convolution of a stage has no skip."""

    def layer(*, is_first: bool) -> nn.Module:
        blocks = [Residual(MAKERS[kind]()) for kind in "afaf"]
        return nn.Sequential(Convolved() if is_first else Residual(Convolved()), *blocks)

    model = randomised(nn.Sequential(*(layer(is_first=n == 0) for size in depth for n in range(size))))
    sites = ak.wrap(model, X).sites("pfeiffer")
    assert [site.path for site in sites] == [f"{n}.{last}" for n in range(sum(depth)) for last in (2, 4)]


def test_a_block_alone_in_its_stage_is_cut_as_those_of_its_class() -> None:
    """Microsoft's EfficientViT: blocks of two feed-forwards around one attention, of which the first stage has one."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(
                *(Residual(inner) for inner in (Convolved(), MAKERS["f"](), MAKERS["a"](), MAKERS["f"]()))
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.parts(x)

    model = randomised(nn.Sequential(nn.Sequential(Block()), nn.Sequential(Block(), Block())))
    assert [site.path for site in ak.wrap(model, X).sites("pfeiffer")] == ["0.0", "1.0", "1.1"]


class TokenMixer(nn.Module):
    """Mixes tokens by a Linear on the transposed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(X.shape[1], X.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.mT).mT


def test_a_list_in_which_less_is_found_than_in_one_that_is_built_alike_is_refused() -> None:
    """Its first layer goes on with half of the tokens, in a way that shows no addition to the stream that it took."""

    class Sampling(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            for n, (attention, mlp) in enumerate(self.layers):  # type: ignore[misc]  # lists
                branch = attention(x)
                x = branch[:, ::2] * x[:, ::2].sigmoid() if n == 0 else x + branch
                x = x + mlp(x)
            return x

    kit = ak.wrap(randomised(Sampling(3, "af")), X)
    for targets in ("@attention.q", "@sublayer.out"):
        with pytest.raises(ak.TargetError, match="are built alike, but tracing finds"):
            kit.sites(ak.LoRAConfig(targets=[targets]) if targets.endswith("q") else ak.BottleneckConfig(targets=[targets]))


def test_a_list_may_hold_nothing_in_a_place() -> None:
    """Lists of [norm, attention, None] have no norm behind."""

    class Sparse(Adding):
        def __init__(self) -> None:
            super().__init__()
            holders = ([nn.LayerNorm(WIDTH), MAKERS[kind](), None] for kind in "afaf")
            self.layers = nn.ModuleList(nn.ModuleList(holder) for holder in holders)

        def branches(self) -> Iterable[nn.Module]:
            return (layer[1] for layer in self.layers)  # type: ignore[index]  # lists

    sites = ak.wrap(randomised(Sparse()), X).sites("houlsby")
    assert [site.path for site in sites] == [f"layers.{i}.1" for i in range(4)]
    assert len(ak.wrap(randomised(Sparse()), X).sites("pfeiffer")) == 2
