"""Norms as functions: where a block normalises is told by what is computed, however it is written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover

from ...hosts.blocks import VOCAB, WIDTH, Model, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
Function = Callable[[Tensor], Tensor]
NORMS: dict[str, Function] = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "rsqrt": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5),
    "power": lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** 0.5,
    "deviation": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5),
    "length": lambda x: F.normalize(x, dim=-1) * 2.8,
    "largest": lambda x: x / x.abs().amax(-1, keepdim=True),
}
OTHERS: dict[str, Function] = {
    "identity": lambda x: x,
    "tanh": lambda x: torch.tanh(0.5 * x),
    "scale": lambda x: 0.5 * x,
    "relu": torch.relu,
}


def block_of(forward: Callable[[Pre, Tensor], Tensor]) -> type[Pre]:
    class Block(Pre):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Block


def norms(forward: Callable[[Pre, Tensor], Tensor]) -> list[str]:
    return [s.norm for s in discover(randomised(Model(block_of(forward))), IDS)[0].sublayers]


def post(norm: Function) -> Callable[[Pre, Tensor], Tensor]:
    def forward(block: Pre, x: Tensor) -> Tensor:
        x = norm(x + block.attention(x))
        return norm(x + block.mlp(x))

    return forward


@pytest.mark.parametrize("name", NORMS)
def test_a_function_is_told_wherever_it_normalises(name: str) -> None:
    n = NORMS[name]
    assert norms(post(n)) == ["post"] * 4
    assert norms(lambda b, x: (y := x + b.attention(n(x))) + b.mlp(n(y))) == ["pre"] * 4
    assert norms(lambda b, x: (y := x + n(b.attention(x))) + n(b.mlp(y))) == ["end"] * 4
    assert norms(lambda b, x: (y := x + n(b.attention(n(x)))) + n(b.mlp(n(y)))) == ["sandwich"] * 4


@pytest.mark.parametrize("name", OTHERS)
def test_what_keeps_the_scale_is_no_norm(name: str) -> None:
    n = OTHERS[name]
    assert {*norms(post(n))} <= {"none"}
    assert norms(lambda b, x: (y := x + b.attention(n(x))) + b.mlp(n(y))) == ["none"] * 4


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("preset", ["pfeiffer", "adapter_plus"])
def test_an_adapter_at_the_norm_of_a_sum_is_refused_where_no_module_is_the_norm(preset: str, name: str) -> None:
    model = randomised(Model(block_of(post(NORMS[name]))))
    for layers in (None, [-1]):  # the last block, too, which nothing follows
        with pytest.raises(ak.TargetError, match=r"the norm after the feedforward in 'blocks.\d' is no module"):
            ak.wrap(model).sites(preset, layers=layers)
    assert len(ak.wrap(model).sites("houlsby")) == 4


def test_a_norm_that_the_model_itself_computes_between_blocks_is_refused() -> None:
    class Between(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = NORMS["power"](x + block.mlp(x))
            return x

    with pytest.raises(ak.TargetError, match="is no module"):
        ak.wrap(randomised(Between(Pre))).sites("pfeiffer")


class ByPower(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NORMS["power"](x)


def test_a_module_without_parameters_that_normalises_is_run_again() -> None:
    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = ByPower(), ByPower()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))

    model = randomised(Model(Block)).double()
    kit = ak.wrap(model)
    kit.add("a", "pfeiffer", bottleneck_size=3, dtype="float64")
    kit.activate("a")
    for parameter in kit.parameters("a"):
        nn.init.normal_(parameter)
    adapted, own = model(IDS), list(kit.parameters("a"))
    with kit.base():
        x = model.embedding(IDS)
        for block, (down, down_bias, up, up_bias) in zip(model.blocks, (own[:4], own[4:]), strict=True):
            assert isinstance(block, Block)
            x = block.norm1(x + block.attention(x))
            s = x + block.mlp(x)
            x = block.norm2(s + torch.relu(block.norm2(s) @ down.T + down_bias) @ up.T + up_bias)
        assert torch.allclose(adapted, model.head(model.norm(x)), rtol=1e-9, atol=1e-9)


def test_a_norm_that_takes_the_sum_clamped_is_the_blocks() -> None:
    def forward(block: Pre, x: Tensor) -> Tensor:
        x = block.norm1((x + block.attention(x)).clamp(-5e4, 5e4))
        return block.norm2((x + block.mlp(x)).clamp(-5e4, 5e4))

    sites = ak.wrap(randomised(Model(block_of(forward)))).sites("pfeiffer")
    assert [(site.path, site.at) for site in sites] == [(f"blocks.{i}.norm2", "input") for i in (0, 1)]


@pytest.mark.parametrize("name", NORMS)
def test_an_adapter_before_a_norm_at_the_end_of_its_branch_is_refused(name: str) -> None:
    n = NORMS[name]
    model = randomised(Model(block_of(lambda b, x: (y := x + n(b.attention(x))) + n(b.mlp(y)))))
    kit = ak.wrap(model, IDS)
    for targets in ("@attention.out", "@feedforward.out", "@sublayer.out"):
        with pytest.raises(
            ak.TargetError, match=r"normalised by a function before it is added|no module returns what is added"
        ):
            kit.sites(ak.BottleneckConfig(targets=[targets], bottleneck_size=2))
    assert len(kit.sites(ak.BottleneckConfig(targets=["blocks.*.mlp"], bottleneck_size=2))) == 2  # who names it, means it


@pytest.mark.parametrize("name", NORMS)
def test_behind_a_norm_at_the_end_of_a_branch_the_sum_is_adapted(name: str) -> None:
    """No module returns the branch, but the block returns the sum, which is what these presets adapt."""
    n = NORMS[name]
    model = randomised(Model(block_of(lambda b, x: (y := x + n(b.attention(x))) + n(b.mlp(y)))))
    assert [(site.path, site.at) for site in ak.wrap(model, IDS).sites("pfeiffer")] == [
        ("blocks.0", "output"),
        ("blocks.1", "output"),
    ]


@pytest.mark.parametrize("factor", [0.5**0.5, 2])
def test_the_norm_of_a_sum_times_a_constant_is_the_blocks(factor: float) -> None:
    def forward(block: Pre, x: Tensor) -> Tensor:
        x = block.norm1((x + block.attention(x)) * factor)
        return block.norm2((x + block.mlp(x)) * factor)

    model = randomised(Model(block_of(forward)))
    assert norms(forward) == ["post"] * 4
    sites = ak.wrap(model, IDS).sites("pfeiffer")
    assert [(site.path, site.at) for site in sites] == [(f"blocks.{i}.norm2", "input") for i in (0, 1)]


def test_the_norm_of_what_a_sum_was_put_together_with_is_the_next_branchs() -> None:
    """CoaT adds a convolution to all tokens but the first, and puts that back before the attention's norm."""

    def forward(block: Pre, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :1], x[:, 1:] + block.mlp(x[:, 1:])], 1)
        return x + block.attention(block.norm1(x))

    assert norms(forward) == ["none", "pre"] * 2


def test_a_block_that_normalises_before_its_branches_may_end_in_a_norm() -> None:
    """Conformer's last feed-forward is halved, so that only the norm behind the sum can be adapted."""

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            return self.last(x + 0.5 * self.mlp(self.norm2(x)))

    sites = ak.wrap(randomised(Model(Block)), IDS).sites("pfeiffer")
    assert [(site.path, site.reads) for site in sites] == [(f"blocks.{i}.last", "norm") for i in (0, 1)]
