"""Operations that no name tells of: what numbers show of them, and that nothing rests on the rest in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak

from ...hosts.blocks import HEADS, VOCAB, WIDTH, Model, Pre

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("unknown_tests::linear", mutates_args=())
def odd_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@torch.library.custom_op("unknown_tests::quantise", mutates_args=())
def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale


@torch.library.custom_op("unknown_tests::int8_mm", mutates_args=())
def int8_mm(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.float().mT * scale / 100


@torch.library.custom_op("unknown_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.library.custom_op("unknown_tests::norm", mutates_args=())
def odd_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), weight)


@torch.library.custom_op("unknown_tests::gelu", mutates_args=("out",))
def gelu_into(out: Tensor, x: Tensor) -> None:
    out.copy_(F.gelu(x))


@torch.library.custom_op("unknown_tests::scan", mutates_args=())
def scan(x: Tensor) -> Tensor:
    return x.cumsum(1).tanh()


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return odd_linear(x, self.weight, self.bias)


class Int8(nn.Module):
    """Rounds its input, and holds its weight where no Parameter shows it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.held = [torch.randint(-100, 100, (outputs, inputs), dtype=torch.int8)]

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = quantise(x)
        return int8_mm(rounded, scale, self.held[0])


class Kernels(nn.Module):
    """A block of kernels: its attention, its norm and its non-linearity are another package's."""

    def __init__(self, layer: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.q, self.k, self.v, self.o = (layer(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = layer(WIDTH, 2 * WIDTH), layer(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = odd_norm(x, self.weight)
        q, k, v = (part(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(attend(q, k, v).transpose(1, 2).flatten(2))
        hidden = self.up(F.rms_norm(x, (WIDTH,)))
        gelu_into(out := torch.empty_like(hidden), hidden)
        return x + self.down(out)


def places(model: nn.Module, config: str, **settings: Any) -> list[str]:
    return [site.path for site in ak.wrap(model, IDS).sites(config, **settings)]


@pytest.mark.parametrize("layer", [nn.Linear, Odd, Int8])
def test_layers_of_other_packages_have_the_places_of_plain_ones(layer: Callable[[int, int], nn.Module]) -> None:
    class Block(Kernels):
        def __init__(self) -> None:
            super().__init__(layer)

    torch.manual_seed(0)
    model = Model(Block)
    assert places(model, "houlsby") == ["blocks.0.o", "blocks.0.down", "blocks.1.o", "blocks.1.down"]
    assert places(model, "pfeiffer") == ["blocks.0", "blocks.1"]
    for part in "qkv":
        found = places(model, "houlsby", targets=[f"@attention.{part}"])
        assert found == [f"blocks.0.{part}", f"blocks.1.{part}"]


def test_a_layer_of_zeros_is_a_projection_still() -> None:
    model = Model(Kernels)
    for block in model.blocks:
        block.o = Odd(WIDTH, WIDTH)
        nn.init.zeros_(block.o.weight)
        nn.init.zeros_(block.o.bias)
    assert places(model, "houlsby") == ["blocks.0.o", "blocks.0.down", "blocks.1.o", "blocks.1.down"]


class Scanning(Pre):
    def __init__(self) -> None:
        super().__init__()
        self.scan = Scan()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.scan(x))


class Scan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scan(x)


@pytest.mark.parametrize(("config", "settings"), [("pfeiffer", {}), ("lora", {"targets": ["@attention.q"]})])
def test_what_stays_unknown_is_refused_with_the_operation_and_the_module(config: str, settings: dict[str, Any]) -> None:
    said = r"'blocks.0.scan' runs 'unknown_tests::scan', which is not understood \(it moves something between tokens"
    with pytest.raises(ak.TargetError, match=said):
        places(Model(Scanning), config, **settings)
    assert places(Model(Scanning), config, exclude=["scan"], **settings)


def test_an_unknown_operation_before_the_blocks_is_in_nobodys_way() -> None:
    class Stem(Model):
        def __init__(self) -> None:
            super().__init__(Pre)
            self.embedding = nn.Sequential(self.embedding, Scan())

    assert places(Stem(), "pfeiffer") == ["blocks.0", "blocks.1"]


def test_a_parameterless_module_that_holds_a_norm_and_more_is_no_norm() -> None:
    class Branch(nn.Sequential):
        pass

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.norm2, self.mlp = nn.Identity(), Branch(nn.LayerNorm(WIDTH), Int8(WIDTH, WIDTH))

    torch.manual_seed(0)
    assert places(Model(Block), "pfeiffer") == ["blocks.0", "blocks.1"]


def test_the_tree_says_what_is_unknown() -> None:
    text = str(ak.wrap(Model(Scanning), IDS).tree())
    assert "unknown: blocks.0.scan runs unknown_tests::scan" in text
