"""Compositions as values."""

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterkit as ak
from adapterkit.composition.nodes import (
    Average,
    BatchSplit,
    Drop,
    Fuse,
    Parallel,
    Rows,
    Split,
    Stack,
    from_json,
    names_always,
    names_in,
    to_json,
)

from ..strategies import adapter_names

NAMESPACE = {kind.__name__: kind for kind in (Average, BatchSplit, Drop, Fuse, Parallel, Rows, Split, Stack)}


def _sized(kind: Any, children: Any) -> Any:
    def with_sizes(held: list[Any]) -> Any:
        sizes = st.none() | st.lists(st.integers(0, 5), min_size=len(held), max_size=len(held))
        return sizes.map(lambda given: kind(*held, sizes=given))

    return st.lists(children, min_size=1, max_size=3).flatmap(with_sizes)


def _averages(children: Any) -> Any:
    weights = st.floats(0.1, 4.0)
    pairs = st.lists(st.tuples(children, weights), min_size=1, max_size=3)
    return pairs.map(lambda held: Average(*(c for c, _ in held), weights=[w for _, w in held])) | st.lists(
        children, min_size=1, max_size=3
    ).map(lambda held: Average(*held))


def _stacks(children: Any) -> Any:
    return st.lists(children, min_size=1, max_size=3).map(lambda held: Stack(*held))


def _drops(children: Any) -> Any:
    layers = st.lists(st.integers(-4, 12), max_size=4) | st.integers(0, 6).map(range)
    return st.builds(lambda child, layers: Drop(child, layers=layers), children, layers)


names = st.sampled_from(["a", "b", "c"]) | adapter_names
fusable = st.recursive(names, lambda c: _stacks(c) | _averages(c) | _drops(c), max_leaves=4)
fuses = st.builds(
    lambda held, name: Fuse(*held, name=name), st.lists(fusable, min_size=2, max_size=3), st.none() | adapter_names
)
one_row = st.recursive(
    names | st.lists(names, min_size=2, max_size=3).map(lambda held: Fuse(*held)),
    lambda c: _stacks(c) | _averages(c) | _drops(c) | _sized(Split, c),
    max_leaves=5,
)
same_batch = st.recursive(
    one_row | st.lists(st.none() | one_row, min_size=1, max_size=4).map(Rows),
    lambda c: _stacks(c) | _averages(c) | _drops(c) | _sized(Split, c) | _sized(BatchSplit, c),
    max_leaves=6,
)
parallels = st.lists(same_batch, min_size=1, max_size=3).map(lambda held: Parallel(*held))
compositions = same_batch | fuses | parallels | _drops(parallels)


@given(compositions)
def test_a_composition_survives_repr_json_and_pickle(composition: Any) -> None:
    for again in (
        eval(repr(composition), NAMESPACE),  # noqa: S307  # what the law is about
        from_json(json.loads(json.dumps(to_json(composition)))),
        pickle.loads(pickle.dumps(composition)),
    ):
        assert again == composition
        assert hash(again) == hash(composition)
        assert list(names_in(again)) == list(names_in(composition))


def test_what_differs_is_not_equal() -> None:
    values = [
        Stack("a", "b"), Stack("b", "a"), Parallel("a", "b"), Average("a", "b"), Average("a", "b", weights=[2, 1]),
        BatchSplit("a", "b"), BatchSplit("a", "b", sizes=[1, 2]), Split("a", "b", sizes=[1, 2]), Fuse("a", "b"),
        Fuse("a", "b", name="f"), Rows(["a", "b"]), Rows(["a", None]), Stack("a", Stack("b")),
        Drop("a", layers=[0]), Drop("a", layers=[0, 1]), Drop("a", layers=()), Drop("b", layers=[0]), Drop("a", layers=[-1]),
    ]  # fmt: skip
    assert len(set(values)) == len(values)
    assert Stack("a", "b") == Stack("a", "b") != "a"


def test_they_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Stack("a").children = ("b",)
    sizes = [1, 2]
    split, drop = BatchSplit("a", "b", sizes=sizes), Drop("a", layers=sizes)
    sizes.append(3)
    assert split.sizes == drop.layers == (1, 2)


class _Index:
    """A whole number of another library."""

    def __index__(self) -> int:
        return 3


def test_layers_of_a_drop_are_sorted_and_each_is_there_once() -> None:
    same = [Drop("a", layers=layers) for layers in ([3, -1, 0, 3], (0, 3, -1), [_Index(), -1, 0])]
    assert {drop.layers for drop in same} == {(-1, 0, 3)}
    assert len(set(same)) == 1
    assert Drop("a", layers=range(5)).layers == (0, 1, 2, 3, 4)
    assert repr(Drop("a", layers=range(2))) == "Drop('a', layers=(0, 1))"


def test_what_is_dropped_does_not_always_act() -> None:
    assert names_always(Stack("a", Drop("b", layers=[0]), Drop("c", layers=[]))) == {"a", "c"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Stack, r"Stack takes at least 1 children; found \[\]"),
        (lambda: Fuse("a"), r"Fuse takes at least 2 children; found \['a'\]"),
        (lambda: Stack("a", None), "non-empty string; found None"),
        (lambda: Stack(["a", "b"]), r"one by one, as in Stack\(\"a\", \"b\"\); found \['a', 'b'\]"),
        (lambda: BatchSplit("a", "b", [1, 2]), r"one by one, .* and sizes= by its name; found \[1, 2\] among them"),
        (
            lambda: Average("a", Parallel("b", "c")),
            r"Average cannot hold Parallel\('b', 'c'\): Parallel multiplies the batch",
        ),
        (lambda: Parallel("a", Stack(Parallel("b"))), "the batch can be multiplied once only"),
        (lambda: Average("c", Stack(Parallel("a", "b"))), "Parallel multiplies the batch"),
        (lambda: Rows([Stack(BatchSplit("a", "b")), None]), "a row is one row"),
        (lambda: Rows(["a", BatchSplit("b", "c")]), "a row is one row"),
        (lambda: Rows("ab"), "Rows takes one sequence with a name .* found 'ab'"),
        (lambda: Rows("a", "b"), r'as in ak.Rows\(\["a", "b", None\]\); found .a., .b.'),
        (lambda: Rows(["a"], None), r'as in ak.Rows\(\["a", "b", None\]\); found \[.a.\], None'),
        (lambda: Fuse("a", BatchSplit("b", "c")), "a fusion is trained over adapters that see the same tokens"),
        (lambda: BatchSplit("a", "b", sizes=[1]), r"one number for each of the 2 children; found \[1\]"),
        (lambda: Split("a", "b", sizes=[1, -2]), r"none negative; found \[1, -2\]"),
        (lambda: Split("a", "b", sizes=[1, 2.5]), r"whole numbers, none negative; found \[1, 2.5\]"),
        (lambda: Average("a", "b", weights=[1, -1]), r"their sum not zero; found \[1.0, -1.0\]"),
        (lambda: Average("a", "b", weights=["x", 1]), r"one number for each of the 2 children; found \['x', 1\]"),
        (lambda: Drop("a", "b", layers=[0]), r"Drop takes one child, as in .*range\(5\)\); found \['a', 'b'\]"),
        (lambda: Drop("a", range(5), layers=[0]), r"takes one child, .* found \['a', range\(0, 5\)\]"),
        (lambda: Drop(layers=[0]), r"Drop takes at least 1 children; found \[\]"),
        (lambda: Drop("a", layers=3), "layers is a list of whole numbers, or a range; found 3"),
        (lambda: Drop("a", layers="12"), "layers is a list of whole numbers, or a range; found '12'"),
        (lambda: Drop("a", layers=[True, 2]), r"whole numbers, or a range; found \[True, 2\]"),
        (lambda: Drop("a", layers=[1.0]), r"whole numbers, or a range; found \[1.0\]"),
        (lambda: Drop("a", layers=None), "whole numbers, or a range; found None"),
        (lambda: Rows([Drop(BatchSplit("a", "b"), layers=[0])]), "a row is one row"),
        (lambda: Average(Drop(Parallel("a", "b"), layers=[0]), "c"), "Parallel multiplies the batch"),
        (lambda: from_json({"type": "Drop", "children": ["a"]}), "and the settings of that type; found .*Drop"),
        (lambda: from_json({"type": "Drop", "children": ["a", "b"], "layers": [0]}), "takes one child"),
        (
            lambda: from_json({"type": "Parallel", "children": ["a"], "shared": 1}),
            "no Parallel can be made of .*'shared': 1",
        ),
        (lambda: from_json({"type": "Stak", "children": ["a"]}), "a 'type' of .* found .*Stak"),
        (lambda: from_json({"type": "Stack", "children": ["a"], "sizes": [1]}), "and the settings of that type"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_reason(build: Any, message: str) -> None:
    with pytest.raises(ak.AdapterKitError, match=message):
        build()


def test_a_parallel_is_held_by_a_stack_alone_and_only_once() -> None:
    assert Stack("a", Parallel("b", "c")).children[1] == Parallel("b", "c")
    with pytest.raises(ak.ConfigError, match="multiplied once only"):
        Stack(Parallel("a", "b"), Parallel("c", "d"))
