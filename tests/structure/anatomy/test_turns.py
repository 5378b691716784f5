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
