from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.errors import ConfigError
from adapterkit.nn.functional.slices import SliceLayout, Slices

from ...hosts.layers import parts_of

QKV: Slices = (("q", ((0, 4),)), ("k", ((4, 8),)), ("v", ((8, 12),)))
# Two heads of 2 features each, [q k v] after one another in each head; k is left alone.
HEADS: Slices = (("q", ((0, 2), (6, 8))), ("v", ((4, 6), (10, 12))))


def rows_of(slices: Slices) -> list[list[int]]:
    return [sorted(chain.from_iterable(range(*r) for r in ranges)) for _, ranges in slices]


@given(parts_of(12) | st.sampled_from([QKV, HEADS, QKV[:1], QKV[2:]]))
def test_values_come_to_the_features_that_parts_cover(slices: Slices) -> None:
    layout, rows = SliceLayout(12, slices), rows_of(slices)
    covered = sorted(chain.from_iterable(rows))
    values = torch.randn(3, len(covered), 2)
    expected = torch.zeros(3, 12, 2)
    expected[:, covered] = values
    assert torch.equal(layout.spread(values, 1), expected)
    assert torch.equal(layout.spread(values.movedim(1, -1)), expected.movedim(1, -1))
    everything = torch.randn(3, 12, 2)
    assert torch.equal(layout.pick(everything, 1), everything[:, covered])
    assert torch.equal(layout.pick(everything.movedim(1, -1)), everything[:, covered].movedim(1, -1))

    blocks = torch.zeros(3, 12, 2 * len(slices))
    for index, own in enumerate(rows):
        blocks[:, own, 2 * index : 2 * index + 2] = expected[:, own]
    assert torch.equal(layout.blocks(values), blocks)

    whole = torch.randn(12, 5)
    assert torch.equal(layout.gather([whole[own] for own in rows]), whole[covered])
    for found, own in zip(layout.split(whole[covered]), rows, strict=True):
        assert torch.equal(found, whole[own])
    assert layout.sizes() == [len(own) for own in rows]
    assert layout.covered == len(covered)


def test_no_parts_are_the_whole() -> None:
    layout, values = SliceLayout(5), torch.randn(5, 2)
    assert (layout.count, layout.covered, layout.sizes()) == (1, 5, [5])
    assert layout.split(values)[0] is values
    assert all(
        v is values
        for v in (layout.pick(values, 0), layout.spread(values, 0), layout.blocks(values), layout.gather([values]))
    )


def test_heads_that_repeat_cost_as_much_as_one() -> None:
    wide = (("q", tuple((6 * n, 6 * n + 2) for n in range(64))), ("v", tuple((6 * n + 4, 6 * n + 6) for n in range(64))))
    assert len(SliceLayout(384, wide)._runs) == 3
    assert len(SliceLayout(12, HEADS)._runs) == 3


@pytest.mark.parametrize(
    ("slices", "found"),
    [
        ((("q", ((0, 13),)),), r"slice 'q' has the range \(0, 13\), which is not within 12"),
        ((("q", ((3, 3),)),), r"\(3, 3\), which is not within"),
        ((("q", ((0, 4),)), ("k", ((3, 6),))), r"slice 'k' has the range \(3, 6\), which overlaps"),
        ((("q", ()),), "slice 'q' has no range"),
    ],
)
def test_wrong_ranges_are_refused(slices: Slices, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        SliceLayout(12, slices)
