"""Products of torch's own that few use: no name tells of them, numbers do."""

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

from ...hosts.blocks import VOCAB, WIDTH, Model, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


class Coded(nn.Module):
    """A layer whose weight is rounded to integers, with a scale for each feature."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-100, 100, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(outputs) / 100)


class Int8(Coded):
    """Rounds each token by its greatest feature, and multiplies integers."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        size = rows.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        codes = (rows / size).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(codes, self.weight.T).float() * size * self.scale).view(*x.shape[:-1], -1)


class Fixed(Coded):
    """Rounds by one scale for all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        codes = (x.flatten(0, -2) / 0.03).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(codes, self.weight.T).float() * 0.03 * self.scale).view(*x.shape[:-1], -1)


class Packed(Coded):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        return torch._weight_int8pack_mm(rows, self.weight, self.scale.bfloat16()).float().view(*x.shape[:-1], -1)


class Eight(nn.Module):
    """Multiplies numbers of eight bits."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(outputs, inputs).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones(())
        codes = x.flatten(0, -2).to(torch.float8_e4m3fn)
        return torch._scaled_mm(codes, self.weight.T, one, one, out_dtype=torch.float32).view(*x.shape[:-1], -1)


class Activated(nn.Linear):
    """Adds, multiplies and gates in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.T).view(*x.shape[:-1], -1)


def model_with(layer: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)

    class Block(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(layer(WIDTH, 2 * WIDTH), nn.ReLU(), layer(2 * WIDTH, WIDTH))

    return Model(Block)


def places(layer: type[nn.Module], config: str, **settings: object) -> list[str]:
    return [site.path for site in ak.wrap(model_with(layer), IDS).sites(config, **settings)]


@pytest.mark.parametrize("layer", [Int8, Fixed, Packed, Eight, Activated])
def test_rare_products_have_the_places_of_plain_ones(layer: type[nn.Module]) -> None:
    assert places(layer, "pfeiffer") == ["blocks.0", "blocks.1"]
    assert [p for p in places(layer, "houlsby") if "mlp" in p] == ["blocks.0.mlp.2", "blocks.1.mlp.2"]
    for part, at in (("first", 0), ("last", 2)):
        found = places(layer, "houlsby", targets=[f"@feedforward.{part}"])
        assert found == [f"blocks.0.mlp.{at}", f"blocks.1.mlp.{at}"]


def test_a_distance_to_the_entries_of_a_codebook_is_no_product() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.codes = Pre(), nn.Parameter(torch.randn(6, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            nearest = torch.cdist(self.block(x).flatten(0, 1), self.codes).argmin(-1)
            return self.block(self.codes[nearest].view_as(x))

    kit = ak.wrap(randomised(Quantised()), torch.randn(2, 5, WIDTH))
    assert [site.path for site in kit.sites("houlsby")] == ["block.attention", "block.mlp"]
