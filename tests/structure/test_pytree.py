import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from transformers.modeling_outputs import BaseModelOutput

from adapterkit.structure import pytree

Pair = namedtuple("Pair", ["first", "second"])


@dataclass(frozen=True)
class Output:
    count: int
    hidden: Tensor


X, IDS, NEW = torch.ones(2, 3), torch.arange(3), torch.zeros(2, 3)
CASES: list[tuple[Any, pytree.Path]] = [
    (X, ()),
    ((X, None), (0,)),
    ((None, IDS, X), (2,)),
    ([IDS, X], (1,)),
    ({"ids": IDS, "hidden": X}, ("hidden",)),
    (OrderedDict(hidden=X), ("hidden",)),
    (Pair(IDS, X), ("second",)),
    (Output(3, X), ("hidden",)),
    (BaseModelOutput(last_hidden_state=X), ("last_hidden_state",)),
    ((IDS, {"deep": [None, Pair(IDS, X)]}), (1, "deep", 1, "second")),
    (torch.return_types.max((X, IDS)), (0,)),
    (pack_sequence([X, X]), ("data",)),
]


@pytest.mark.parametrize(("value", "path"), CASES)
def test_the_first_floating_tensor_is_found_in_any_container(value: Any, path: pytree.Path) -> None:
    assert pytree.find(value) == path
    assert pytree.get(value, path).is_floating_point()


@pytest.mark.parametrize(("value", "path"), CASES)
def test_putting_a_tensor_keeps_the_type_and_changes_nothing_else(value: Any, path: pytree.Path) -> None:
    before = copy.deepcopy(value)
    changed = pytree.put(value, path, NEW)
    assert type(changed) is type(value)
    assert pytree.get(changed, path) is NEW
    assert repr(value) == repr(before), "the value given must not change"
    assert repr(pytree.put(changed, path, pytree.get(value, path))) == repr(before)


@pytest.mark.parametrize("value", [None, IDS, (IDS, None), {}, "text", 3.0])
def test_there_may_be_no_floating_tensor(value: Any) -> None:
    assert pytree.find(value) is None


def test_a_part_may_be_named_by_its_position() -> None:
    for value in (Pair(X, IDS), BaseModelOutput(last_hidden_state=X), Output(3, X)):
        index = [isinstance(item, Tensor) and item.is_floating_point() for _, item in pytree._items(value)].index(True)
        assert pytree.get(value, (index,)) is X
        assert pytree.get(pytree.put(value, (index,), NEW), (index,)) is NEW


def test_a_field_that_init_does_not_take_is_kept() -> None:
    @dataclass
    class Counted:
        hidden: Tensor
        count: int = field(default=0, init=False)

    value = Counted(X)
    value.count = 7
    changed = pytree.put(value, ("hidden",), NEW)
    assert (changed.hidden is NEW, changed.count, value.hidden is X) == (True, 7, True)


def test_a_path_that_leads_nowhere_is_a_lookup_error() -> None:
    with pytest.raises(LookupError, match="hidden"):
        pytree.get({"x": X}, ("hidden",))


def test_a_model_output_keeps_attribute_and_item_in_step() -> None:
    changed = pytree.put(BaseModelOutput(last_hidden_state=X), ("last_hidden_state",), NEW)
    assert changed["last_hidden_state"] is changed.last_hidden_state is changed[0] is NEW
