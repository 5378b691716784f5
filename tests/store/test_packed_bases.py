"""An adapter that was trained on a base of packed weights fits the base that these stand for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.store import identity
from adapterkit.store.identity import shapes_around

from ..hosts.tiny import PostNormBlock, Tiny, randomise


class Packed(nn.Linear):
    """A layer whose weight lies in bytes, two numbers in each, as NF4's do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.bias = layer.bias
        packed = torch.randint(0, 255, (layer.weight.numel() // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.cat([self.weight % 16, self.weight // 16]).float() / 16 - 0.5
        return F.linear(x, halves.view(self.out_features, self.in_features), self.bias)


def packed() -> nn.Module:
    model = plain()
    for block in model.blocks:
        block.down = Packed(block.down)
    return model


def plain(hidden: int = 8) -> Tiny:
    torch.manual_seed(0)
    return Tiny(PostNormBlock, hidden=hidden)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    kit = ak.wrap(packed())
    kit.add("a", "lora", targets=["down"], rank=2)
    randomise(kit, "a")
    return kit.save("a", tmp_path / "adapter")


def test_it_loads_on_the_float_base_and_nowhere_else(saved: Path) -> None:
    ak.wrap(plain()).load(saved, any_base=True)
    with pytest.raises(ak.CompatibilityError, match="saved: Linear of 16 -> 8 features, here: Linear of 16 -> 4 features"):
        ak.wrap(plain(hidden=4)).load(saved, any_base=True)


def test_a_file_that_holds_packed_shapes_loads_on_the_packed_base_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = ak.wrap(packed())
    kit.add("a", "lora", targets=["down"], rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(identity, "shapes_around", lambda model, path: shapes_around(model, path, as_stored=True))
        folder = kit.save("a", tmp_path / "adapter")
    ak.wrap(packed()).load(folder, any_base=True)
    with pytest.raises(ak.CompatibilityError, match="another type or shape"):
        ak.wrap(plain()).load(folder, any_base=True)
