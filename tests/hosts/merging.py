"""Hosts whose weights can be merged into, and hosts of which that is refused."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import adapterkit as ak


class Experts(nn.Module):
    """Two experts in one Parameter (expert, out, in), mixed by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.weights = nn.Parameter(torch.randn(2, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...e,eoi,...i->...o", self.gate(x).softmax(-1), self.weights, x)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        nn.init.normal_(self.mha.in_proj_bias)
        nn.init.normal_(self.mha.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class KeywordCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(input=x))


class TwoWeights(nn.Module):
    """Holds one Parameter under two names and reads it under both."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.w2 = self.w

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T) @ self.w2


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x)))


class Scaled(nn.Module):
    """What IA3 does: x * l at a host's input or output."""

    compute_dtype = torch.float32

    def __init__(self, width: int, at: str) -> None:
        super().__init__()
        self.at, self.l = at, nn.Parameter(torch.randn(width))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x * (self.l - 1)

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.at == "input":
            return {"weight": tensors["weight"] * self.l}
        return {"weight": tensors["weight"] * self.l[:, None], "bias": tensors["bias"] * self.l}


class ScalingConfig(ak.BottleneckConfig):
    method: str = "scaling"  # type: ignore[assignment]  # another method's
    where: str = "output"


class Scaling:
    name = "scaling"
    config_type = ScalingConfig
    presets: ClassVar[dict[str, Any]] = {}

    def placements(self, config: ScalingConfig) -> Any:
        from adapterkit.placement.rule import Placement

        return (Placement(at=config.where, level="projection", reads="site"),)

    def build(self, config: ScalingConfig, site: ak.SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> nn.Module:
        return Scaled(site.width, site.at)


class Bound(nn.Module):
    """Two layers with one weight, or with one memory."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        if how == "Parameter":
            self.two.weight = self.one.weight
        else:
            self.two.weight.data = self.one.weight.data.t() if how == "transposed" else self.one.weight.data[:]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class ScaledEmbedding(nn.Embedding):
    scale = 3.0

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * self.scale


class SameForward(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.linear(z, self.weight * 1.0, self.bias)


class Strange(nn.Linear):
    def forward(self, z: Tensor, factor: Tensor | None = None) -> Tensor:
        if factor is None:
            raise ValueError("no factor")
        return super().forward(z) * factor


class ReadAround(nn.Module):
    """A language model whose output layer is its embedding, by hand."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.embedding, self.layer = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.embedding(ids).to(self.embedding.weight))
        assert x.dtype == self.embedding.weight.dtype
        return x @ self.read(self.embedding.weight)


class MyTensor(Tensor):
    pass


def weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 4)))


def pruned() -> nn.Module:
    layer = nn.Linear(6, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer)


def expanded() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.randn(1, 6).expand(4, 6))
    return nn.Sequential(layer)


def subclassed() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.randn(4, 6).as_subclass(MyTensor))
    return nn.Sequential(layer)
