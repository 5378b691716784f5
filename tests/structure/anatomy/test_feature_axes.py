"""On which axis the features lie, where a branch moves them."""

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover

from ...hosts.blocks import VOCAB, WIDTH, FeedForward, Model, Pre, randomised

LENGTH = 5
IDS = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


class Mixer(Pre):
    """A feed-forward over positions, which the block turns there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(LENGTH, 16), nn.GELU(), nn.Linear(16, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm2(x))


class Gating(Pre):
    """As in gMLP: one half of the features is multiplied with a projection of the other over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.down = FeedForward(), nn.Linear(WIDTH // 2, WIDTH)
        self.spatial = nn.Conv1d(LENGTH, LENGTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.attention(self.norm1(x)).chunk(2, -1)
        x = x + self.down(value * self.spatial(gate))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("block", [Mixer, Gating])
def test_a_projection_over_positions_mixes_them(block: type[Pre]) -> None:
    anatomy, _ = discover(randomised(Model(block)), IDS)
    assert [s.kind for s in anatomy.sublayers] == ["mixer", "feedforward"] * 2


def test_an_adapter_after_a_projection_over_positions_sees_features() -> None:
    model = randomised(Model(Mixer))
    anatomy, _ = discover(model, IDS)
    assert [s.out and s.out.axis for s in anatomy.sublayers] == [-2, -1] * 2
    kit = ak.wrap(model, example_inputs=IDS)
    assert {(site.width, site.axis) for site in kit.sites("houlsby", bottleneck_size=2)} == {(WIDTH, -2), (WIDTH, -1)}


def test_a_convolution_over_channels_to_gate_them_mixes_no_tokens() -> None:
    class Gate(nn.Module):
        """As efficient channel attention."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.conv(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), Gate())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    anatomy, _ = discover(randomised(nn.Sequential(Residual(), Residual())), torch.randn(2, 4, 6, 6))
    assert [s.kind for s in anatomy.sublayers] == ["convolution", "convolution"]
