"""Mixtures of experts: what chooses experts is no projection of theirs, whatever it is called and however it chooses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.anatomy.routers import routers
from adapterkit.structure.tracing.flow import Flow
from adapterkit.structure.tracing.graph import record_graph

from ...hosts.blocks import VOCAB, WIDTH, Model, Pre, randomised
from ...hosts.experts import (
    EXPERTS,
    ROUTERS,
    Dispatched,
    Listed,
    Mixture,
    Shared,
    Sparse,
    Stacked,
    TwoLayerRouter,
    all_by_softmax,
    block_of,
    sigmoid_of_top1,
    top2,
)

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
HELD = [Listed, Sparse, Stacked, Dispatched, TwoLayerRouter, Shared]


def model_of(held: type[Mixture], weigh: Callable[[Tensor], Tensor]) -> nn.Module:
    return randomised(Model(block_of(lambda: held(weigh))))


def layers(held: type[Mixture], name: str) -> set[str]:
    """The experts' layers of this name in the first block, as the classes have them."""
    if issubclass(held, Stacked):
        return {"blocks.0.mlp"}
    shared = {f"blocks.0.mlp.shared.{name}"} if held is Shared else set()
    return {f"blocks.0.mlp.experts.{i}.{name}" for i in range(EXPERTS)} | shared


# Where all tokens go to all experts by matrix products, tokens may as well be mixed: that is no feed-forward.
MIXTURES = [(held, weigh) for held in HELD for weigh in ROUTERS if (held, weigh) != (Dispatched, all_by_softmax)]


@pytest.mark.parametrize(("held", "weigh"), MIXTURES)
def test_the_first_and_last_projections_are_the_experts(held: type[Mixture], weigh: Callable[[Tensor], Tensor]) -> None:
    anatomy, _ = discover(model_of(held, weigh), IDS)
    found = next(s for s in anatomy.sublayers if s.kind == "feedforward" and s.block == "blocks.0")
    assert ({*found.first}, {*found.last}, found.is_moe) == (layers(held, "up"), layers(held, "down"), True)


@pytest.mark.parametrize(("held", "weigh"), MIXTURES)
def test_all_linear_layers_are_the_attentions_and_the_experts(
    held: type[Mixture], weigh: Callable[[Tensor], Tensor]
) -> None:
    sites = ak.wrap(model_of(held, weigh), IDS).sites("lora", targets="all-linear", layers=[0])
    inside = {f"blocks.0.mlp.{name}" for name in ("up", "down")} if issubclass(held, Stacked) else set()
    experts = inside or layers(held, "up") | layers(held, "down")
    names = {f"{site.path}.{site.parameters[0]}" if site.parameters else site.path for site in sites}
    assert names == {f"blocks.0.attention.{letter}" for letter in "qkvo"} | experts


def test_a_router_that_multiplies_what_experts_take_is_found() -> None:
    class Before(Stacked):
        def mix(self, x: Tensor, weights: Tensor) -> Tensor:
            taken = x.repeat(EXPERTS, 1) * weights.t().reshape(-1, 1)
            return torch.bmm(F.silu(torch.bmm(taken.view(EXPERTS, -1, WIDTH), self.up)), self.down).sum(0)

    sites = ak.wrap(model_of(Before, sigmoid_of_top1), IDS).sites("lora", targets=["@feedforward.first"])
    assert [(site.path, site.parameters) for site in sites] == [(f"blocks.{i}.mlp", ("up",)) for i in (0, 1)]


@pytest.mark.parametrize(
    "branch",
    [
        lambda p, x: p[1](p[0](x).sigmoid() * x),  # a gate of as many features is a value
        lambda p, x: p[1](p[0](x).softmax(-1)),  # keys and values of a feed-forward read as a memory
        lambda p, x: p[0](x).sigmoid() * p[1](x),
        lambda p, x: p[1](F.silu(p[0](x))),
    ],
)
def test_a_gate_of_features_is_no_router(branch: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return branch(self.layers, x)

    flow = Flow(record_graph(Host(), torch.randn(2, 3, WIDTH)))
    end = len(flow.nodes) - 1
    assert routers(flow, (1 << end + 1) - 1, end) == 0


def test_experts_in_one_parameter_are_targets_of_methods_that_change_weights_alone() -> None:
    model = model_of(Stacked, top2)
    kit = ak.wrap(model, IDS)
    with pytest.raises(ak.TargetError, match=r"'@feedforward.first': \['blocks.0.mlp.up', .*have no layer of their own"):
        kit.sites(ak.BottleneckConfig(targets=["@feedforward.first"]))
    with pytest.raises(ak.TargetError, match=r"IA3 scales what 'blocks.0.mlp' computes from 'down'"):
        kit.add("a", "ia3")
    kit.add("a", "lora", targets=["@feedforward.first", "@feedforward.last"], rank=2)
    kit.train_adapter("a")
    for parameter in kit.parameters("a"):
        nn.init.normal_(parameter)
    model(IDS).square().sum().backward()
    assert [site.parameters for site in kit.sites("lora", targets=["@feedforward.last"])] == [("down",)] * 2
    assert all(p.grad is not None and p.grad.any() for p in kit.parameters("a"))


@pytest.mark.parametrize("held", HELD)
def test_a_parallel_adapter_beside_experts_computes_its_formula(held: type[Mixture]) -> None:
    model = model_of(held, top2).double()
    kit = ak.wrap(model, IDS)
    kit.add("a", "parallel", bottleneck_size=3, dtype="float64")
    kit.activate("a")
    for parameter in kit.parameters("a"):
        nn.init.normal_(parameter)
    adapted, own = model(IDS), list(kit.parameters("a"))
    with kit.base():
        x = model.embedding(IDS)
        for block, (down, down_bias, up, up_bias) in zip(model.blocks, (own[:4], own[4:]), strict=True):
            assert isinstance(block, Pre)
            x = x + block.attention(block.norm1(x))
            f = torch.relu(x @ down.T + down_bias) @ up.T + up_bias
            x = x + block.mlp(block.norm2(x)) + 4 * f
        assert torch.allclose(adapted, model.head(model.norm(x)), rtol=1e-9, atol=1e-9)
