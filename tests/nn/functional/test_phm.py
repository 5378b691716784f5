from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapterkit.nn.functional.phm import phm_linear, phm_weight


def kronecker_sum(rule: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """W of y = x W + b, as the paper writes it. Shape: (input, output)."""
    blocks = left if right is None else left @ right
    return sum(torch.kron(p, block) for p, block in zip(rule, blocks, strict=True))  # type: ignore[return-value]  # not empty


def random_factors(n: int, a: int, b: int, rank: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    rule = torch.randn(n, n, n, dtype=torch.float64, requires_grad=True)
    shapes = [(n, a, b)] if rank is None else [(n, a, rank), (n, rank, b)]
    left, *right = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return rule, left, right[0] if right else None


# The last two are wide enough for the ways that never make W: down and up.
sizes = st.sampled_from([(1, 1), (2, 3), (5, 5), (24, 2), (2, 24)])
ranks = st.none() | st.integers(1, 4)


@given(st.integers(1, 4), sizes, ranks, st.integers(0, 3), st.integers(0, 3))
def test_the_map_is_the_sum_of_kronecker_products_at_any_size(
    n: int, ab: tuple[int, int], rank: int | None, less_in: int, less_out: int
) -> None:
    """Where n does not divide a size, surplus features read as zero and are not written."""
    rule, left, right = random_factors(n, *ab, rank)
    inputs, outputs = n * ab[0] - min(less_in, n - 1), n * ab[1] - min(less_out, n - 1)
    z, bias = torch.randn(2, 3, inputs, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)
    weight = kronecker_sum(rule, left, right)
    expected = z @ weight[:inputs, :outputs] + bias
    torch.testing.assert_close(phm_linear(z, rule, left, right, bias=bias), expected)
    torch.testing.assert_close(phm_weight(rule, left, right), weight.T)

    tensors = [tensor for tensor in (rule, left, right) if tensor is not None]
    out_grad = torch.randn_like(expected)
    got = torch.autograd.grad(phm_linear(z, rule, left, right, bias=bias), tensors, out_grad)
    torch.testing.assert_close(got, torch.autograd.grad(expected, tensors, out_grad))


@pytest.mark.parametrize("shape", [(7,), (0, 3, 7), (2, 1, 2, 7)])
@pytest.mark.parametrize("ab", [(2, 24), (4, 1)])
def test_any_leading_axes_will_do(shape: tuple[int, ...], ab: tuple[int, int]) -> None:
    n = -(-7 // ab[0])
    factors = random_factors(n, *ab, 1)
    z, bias = torch.randn(shape, dtype=torch.float64), torch.zeros(ab[1] * n, dtype=torch.float64)
    expected = z @ kronecker_sum(*factors)[:7]
    torch.testing.assert_close(phm_linear(z, *factors, bias=bias), expected)


@pytest.mark.parametrize("ab", [(24, 2), (2, 24)])
def test_thin_factors_are_never_multiplied_out(ab: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("W was made")

    monkeypatch.setattr("adapterkit.nn.functional.phm.phm_weight", refuse)
    factors = random_factors(4, *ab, 1)
    z, bias = torch.randn(3, 4 * ab[0], dtype=torch.float64), torch.zeros(4 * ab[1], dtype=torch.float64)
    phm_linear(z, *factors, bias=bias)
    with pytest.raises(AssertionError, match="W was made"):
        phm_linear(z, *random_factors(4, *ab, 2), bias=bias)
