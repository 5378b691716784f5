"""The contract of a module that adds its delta itself, on a reference without a kernel."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.nn.bottleneck import BottleneckAdapter
from adapterkit.nn.fused import can_add


class AddsItself(nn.Module):
    """A bottleneck that starts its second product from x, as a kernel would: x is read once and written once."""

    def __init__(self, bottleneck: BottleneckAdapter) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.is_fused = not bottleneck.gating

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.bottleneck.compute_dtype

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.bottleneck(z, x)

    def added(self, z: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        p, dtype = self.bottleneck, self.compute_dtype
        h = p._activation(F.linear(z.to(dtype), p.down_weight, p.down_bias))
        start = x.to(dtype).reshape(-1, x.shape[-1]) + p.up_bias
        return torch.addmm(start, h.reshape(-1, h.shape[-1]), p.up_weight.t()).view(x.shape).to(x.dtype)


def adding(**options: object) -> AddsItself:
    module = AddsItself(BottleneckAdapter(6, 3, non_linearity="gelu", **options))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def line(module: AddsItself, z: Tensor, x: Tensor) -> Tensor:
    """What the contract says."""
    return x + module(z.to(module.compute_dtype), x).to(x.dtype)


def test_a_module_says_whether_it_adds_its_delta_itself() -> None:
    assert can_add(adding())
    assert not can_add(adding(gating=True))
    assert not can_add(BottleneckAdapter(6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (0, 6)])
@pytest.mark.parametrize("reads_itself", [True, False])
def test_what_it_returns_is_x_and_the_delta_in_the_dtype_of_x(
    dtype: torch.dtype, shape: tuple[int, ...], reads_itself: bool
) -> None:
    module, x = adding(), torch.randn(shape).to(dtype)
    z = x if reads_itself else torch.randn(shape).to(dtype)
    before = z.clone(), x.clone()
    found = module.added(z, x, nn.Identity())
    assert found.dtype == dtype
    assert found.shape == x.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, line(module, z, x), atol=tolerance, rtol=tolerance)
    assert torch.equal(z, before[0])
    assert torch.equal(x, before[1])


def test_its_gradients_are_those_of_the_line() -> None:
    module = adding()
    z, x = torch.randn(2, 5, 6, requires_grad=True), torch.randn(6, 5, 2).transpose(0, 2).requires_grad_()
    inputs = [z, x, *module.parameters()]
    found = torch.autograd.grad(module.added(z, x, nn.Identity()).square().sum(), inputs)
    expected = torch.autograd.grad(line(module, z, x).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
