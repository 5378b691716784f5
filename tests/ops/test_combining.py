from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.ops.combining import concatenated, factored
from adapterkit.ops.low_rank import LowRank
from adapterkit.ops.parts import Parts
from adapterkit.ops.projections import Projection, parameter_projection

from ..modules.hosts import LAYERS, convs, geometry, layer, parts_of

QV: Parts = (("v", ((5, 9),)), ("q", ((0, 2), (3, 4))))
GEOMETRIES: dict[str, tuple[Projection, Parts]] = {
    **{name: (geometry(layer(name)), ()) for name in LAYERS},
    "linear, parts": (geometry(layer("linear")), QV),
    "Conv1D, parts": (geometry(layer("Conv1D")), QV),
    "parameter": (parameter_projection((9, 4)), ()),
    "parameter, parts": (parameter_projection((9, 4)), QV),
    "experts": (parameter_projection((2, 3, 9, 4)), ()),
    "experts, parts": (parameter_projection((2, 3, 9, 4)), QV),
}


def pair(low_rank: LowRank) -> tuple[Any, Any]:
    return torch.randn(low_rank.a_shape).double(), torch.randn(low_rank.b_shape).double()


def exact(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_concatenation_is_the_sum_and_a_factoring_with_enough_rank_exact(name: str) -> None:
    projection, parts = GEOMETRIES[name]
    ranks = [one * projection.groups for one in (1, 3, 2)]
    each = [LowRank(projection, rank, parts) for rank in ranks]
    pairs = [pair(low_rank) for low_rank in each]
    total = sum(low_rank.delta(a, b) for low_rank, (a, b) in zip(each, pairs, strict=True))
    whole = LowRank(projection, sum(ranks), parts)
    for found in (concatenated(whole, pairs), factored(whole, total)):
        assert (found[0].shape, found[1].shape) == (whole.a_shape, whole.b_shape)
        exact(whole.delta(*found), total)


@given(convs(), st.integers(1, 3))
def test_every_conv_can_be_combined(host: Any, rank: int) -> None:
    p = geometry(host)
    single, double = LowRank(p, rank * p.groups), LowRank(p, 2 * rank * p.groups)
    pairs = [pair(single), pair(single)]
    total = sum(single.delta(*one) for one in pairs)
    exact(double.delta(*concatenated(double, pairs)), total)
    exact(double.delta(*factored(double, total)), total)


@given(parts_of(9), st.integers(1, 4))
def test_a_factoring_is_as_near_as_its_rank_allows(parts: Parts, rank: int) -> None:
    """Of each part, the squared error is the sum of the squares of the singular values left out."""
    low_rank, weight = LowRank(geometry(layer("linear")), rank, parts), torch.randn(9, 6).double()
    found = low_rank.delta(*factored(low_rank, weight))
    for _, ranges in parts:
        rows = sorted(row for r in ranges for row in range(*r))
        left_out = torch.linalg.svdvals(weight[rows])[rank:]
        exact((weight - found)[rows].square().sum(), left_out.square().sum())
