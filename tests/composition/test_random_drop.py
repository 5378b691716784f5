"""The depths that `random_drop` draws: how often, from what, and for which compositions."""

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

import adapterkit as ak

from ..hosts.deep import depth_of


def test_each_depth_comes_equally_often_and_drops_the_lowest_layers() -> None:
    drawn = [ak.random_drop("a", most=3, step=step) for step in range(4000)]
    assert set(drawn) == {"a", *(ak.Drop("a", layers=range(n)) for n in (1, 2, 3))}
    counts = Counter(drawn).values()
    assert all(900 < count < 1100 for count in counts)  # 3.6 standard deviations around 1000
    assert {depth_of(ak.random_drop("a", step=step)) for step in range(200)} == set(range(12))
    assert {ak.random_drop("a", most=0, step=step) for step in range(9)} == {"a"}


def test_a_depth_follows_from_seed_and_step_alone() -> None:
    depths = [depth_of(ak.random_drop("a", step=step, seed=7)) for step in range(20)]
    torch.manual_seed(1)
    code = (
        "import adapterkit as ak, torch; torch.rand(3); drops = [ak.random_drop('a', step=s, seed=7) for s in range(20)];"
        "print([0 if d == 'a' else len(d.layers) for d in drops])"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == str(depths)
    # As documented; the number is what `printf 7,0 | sha256sum` prints.
    assert depths[0] == 0x5BFD4B84B0BB22C2BBA9CD44F2EA4178BF7F8D907F2F6310D3B760746BF93C34 % 12
    assert depths != [depth_of(ak.random_drop("a", step=step, seed=8)) for step in range(20)]


def test_a_composition_is_dropped_as_a_whole() -> None:
    stack = ak.Stack("a", "b")
    assert {type(ak.random_drop(stack, most=1, step=step)) for step in range(30)} == {ak.Stack, ak.Drop}
    assert all(ak.random_drop(stack, most=1, step=step) in (stack, ak.Drop(stack, layers=[0])) for step in range(30))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 1.0}, "step is a whole number; found 1.0"),
        ({"step": True}, "step is a whole number; found True"),
        ({"step": 1, "seed": "x"}, "seed is a whole number; found 'x'"),
        ({"step": 1, "most": -1}, "0 or more; found -1"),
        ({"step": 1, "most": 2.5}, "most is a whole number; found 2.5"),
    ],
)
def test_what_is_no_whole_number_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        ak.random_drop("a", **settings)
