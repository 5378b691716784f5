"""The hand-written models of the zoo: what discovery finds in blocks whose sub-layers are known."""

from collections import Counter

import pytest

from adapterkit.structure.anatomy.discover import discover
from benchmarks.zoo.handwritten_models import KINDS, build, names


@pytest.mark.parametrize("name", names())
def test_every_sub_layer_of_a_hand_written_model_is_found(name: str) -> None:
    anatomy, _ = discover(*build(name))
    assert Counter(sublayer.kind for sublayer in anatomy.sublayers) == KINDS[name]
