from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.nn.functional.low_rank import LowRank
from adapterkit.nn.functional.low_rank_sums import concatenated, factored, reduced, refitted, relative_error
from adapterkit.nn.functional.projections import Projection, parameter_projection
from adapterkit.nn.functional.slices import Slices

from ...hosts.layers import LAYERS, convs, geometry, layer, parts_of

QV: Slices = (("v", ((5, 9),)), ("q", ((0, 2), (3, 4))))
GEOMETRIES: dict[str, tuple[Projection, Slices]] = {
    **{name: (geometry(layer(name)), ()) for name in LAYERS},
    "linear, slices": (geometry(layer("linear")), QV),
    "Conv1D, slices": (geometry(layer("Conv1D")), QV),
    "parameter": (parameter_projection((9, 4)), ()),
    "parameter, slices": (parameter_projection((9, 4)), QV),
    "experts": (parameter_projection((2, 3, 9, 4)), ()),
    "experts, slices": (parameter_projection((2, 3, 9, 4)), QV),
}


def pair(low_rank: LowRank) -> tuple[Any, Any]:
    return torch.randn(low_rank.a_shape).double(), torch.randn(low_rank.b_shape).double()


def exact(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_concatenation_is_the_sum_and_a_factoring_with_enough_rank_exact(name: str) -> None:
    projection, slices = GEOMETRIES[name]
    ranks = [one * projection.groups for one in (1, 3, 2)]
    each = [LowRank(projection, rank, slices) for rank in ranks]
    pairs = [pair(low_rank) for low_rank in each]
    total = sum(low_rank.delta(a, b) for low_rank, (a, b) in zip(each, pairs, strict=True))
    whole = LowRank(projection, sum(ranks), slices)
    wide = concatenated(whole, pairs)
    for found in (wide, factored(whole, total), reduced(whole, *wide)):
        assert (found[0].shape, found[1].shape) == (whole.a_shape, whole.b_shape)
        exact(whole.delta(*found), total)
        assert relative_error(whole, found, wide) < 1e-12


@given(convs(), st.integers(1, 3))
def test_every_conv_can_be_combined(host: Any, rank: int) -> None:
    p = geometry(host)
    single, double = LowRank(p, rank * p.groups), LowRank(p, 2 * rank * p.groups)
    pairs = [pair(single), pair(single)]
    total = sum(single.delta(*one) for one in pairs)
    exact(double.delta(*concatenated(double, pairs)), total)
    exact(double.delta(*factored(double, total)), total)
    wide = concatenated(double, pairs)
    exact(double.delta(*reduced(double, *wide)), total)
    # With too low a rank, what is nearest may be found either way.
    nearest = single.delta(*factored(single, total))
    exact((single.delta(*reduced(single, *wide)) - total).norm(), (nearest - total).norm())
    exact(relative_error(single, reduced(single, *wide), wide) * total.norm(), (nearest - total).norm())


@given(parts_of(9), st.integers(1, 4))
def test_a_factoring_is_as_near_as_its_rank_allows(slices: Slices, rank: int) -> None:
    """Of each part, the squared error is the sum of the squares of the singular values left out."""
    low_rank, weight = LowRank(geometry(layer("linear")), rank, slices), torch.randn(9, 6).double()
    found = low_rank.delta(*factored(low_rank, weight))
    for _, ranges in slices:
        rows = sorted(row for r in ranges for row in range(*r))
        left_out = torch.linalg.svdvals(weight[rows])[rank:]
        exact((weight - found)[rows].square().sum(), left_out.square().sum())


WIDER: dict[str, Slices] = {"more parts": (("k", ((10, 13),)), *QV, ("rest", ((15, 16), (19, 20)))), "whole": ()}


@pytest.mark.parametrize("wider", WIDER)
@pytest.mark.parametrize(
    "projection",
    [
        geometry(torch.nn.Linear(6, 20)),
        geometry(torch.nn.Conv2d(4, 20, 3)),
        geometry(torch.nn.Embedding(11, 20)),
        parameter_projection((20, 4)),
        parameter_projection((2, 3, 20, 4)),
    ],
    ids=["linear", "conv", "embedding", "parameter", "experts"],
)
def test_a_pair_of_some_parts_is_one_of_more_parts_or_of_the_whole(projection: Projection, wider: str) -> None:
    low_rank = LowRank(projection, 2, QV)
    wanted = LowRank(projection, 2 if WIDER[wider] else 4, WIDER[wider])
    a, b = pair(low_rank)
    found = refitted(low_rank, wanted, a, b)
    assert (found[0].shape, found[1].shape) == (wanted.a_shape, wanted.b_shape)
    exact(wanted.delta(*found), low_rank.delta(a, b))
    assert refitted(low_rank, low_rank, a, b) == (a, b)


def test_a_relative_error_of_nothing_is_none_or_infinite() -> None:
    low_rank = LowRank(geometry(torch.nn.Linear(6, 9)), 2)
    a, b = pair(low_rank)
    assert relative_error(low_rank, (a, 0 * b), (a, 0 * b)) == 0
    assert relative_error(low_rank, (a, b), (a, 0 * b)) == float("inf")
    assert relative_error(low_rank, (a, 0 * b), (a, b)) == pytest.approx(1.0)
    nothing = concatenated(low_rank, [(a, b), (3 * a, -b / 3)])  # but for rounding
    assert relative_error(low_rank, (a, 0 * b), nothing) == 0
    assert relative_error(low_rank, (a, b), nothing) == float("inf")
