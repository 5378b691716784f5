"""Kits with random adapters, copies of weights, and how near outputs must be."""

from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak

from ...hosts.tiny import randomise

LORA = ak.LoRAConfig(targets=["query", "up", "down"], rank=3, alpha=5.0)
LAYER = ak.LoRAConfig(targets=["0"])


def rows() -> Tensor:
    return torch.randn(3, 5, 6)


def image() -> Tensor:
    return torch.randn(2, 6, 9, 8)


def adapted(model: nn.Module, *names: str, inputs: Any = None, config: Any = LORA, **settings: Any) -> ak.AdapterKit:
    """With random adapters, in eval mode; the first is active."""
    kit = ak.wrap(model.eval(), inputs)
    for name in names or ("a",):
        kit.add(name, config, **settings)
        randomise(kit, name)
    kit.activate((names or ("a",))[0])
    return kit


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every base tensor."""
    return {k: v.detach().clone() for k, v in (*model.named_parameters(), *model.named_buffers()) if "_adapterkit" not in k}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
