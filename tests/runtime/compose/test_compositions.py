"""Compositions at work, against an oracle that runs adapters one by one."""

import copy
import pickle
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition.nodes import Average, BatchSplit, CompositionNode, Drop, Rows, Split, Stack, names_in
from adapterkit.composition.rows import rows_of

from ...hosts.tiny import PostNormBlock, Tiny, randomise
from .helpers import CONFIGS, ROWS, hidden, names, same, with_every_method


@settings(max_examples=60)
@given(st.lists(st.none() | same, min_size=ROWS, max_size=ROWS))
def test_each_row_is_what_its_own_composition_gives_it(shared_kit: ak.AdapterKit, batch: Tensor, rows: list[Any]) -> None:
    with shared_kit.active(Rows(rows)):
        mixed = hidden(shared_kit, batch)
    for index, row in enumerate(rows):
        with shared_kit.base() if row is None else shared_kit.active(row):
            alone = hidden(shared_kit, batch[index : index + 1])
        torch.testing.assert_close(mixed[index : index + 1], alone, atol=1e-5, rtol=1e-5)


nested = st.recursive(
    same | st.lists(st.none() | names, min_size=2, max_size=2).map(Rows),
    lambda c: (
        st.lists(c, min_size=2, max_size=2).map(lambda held: BatchSplit(*held))
        | st.lists(c, min_size=1, max_size=2).map(lambda held: Stack(*held))
        | c.map(lambda held: Drop(held, layers=[0]))
    ),
    max_leaves=4,
)


@settings(max_examples=60)
@given(nested)
def test_nested_divisions_of_the_batch_are_the_rows_that_they_mean(
    shared_kit: ak.AdapterKit, batch: Tensor, composition: CompositionNode | str
) -> None:
    assume(list(names_in(composition)))
    try:
        rows = rows_of(composition, ROWS)
    except ak.CompatibilityError:
        with suppress(ak.CompatibilityError), shared_kit.active(composition):
            found = hidden(shared_kit, batch)  # where all that would be divided is dropped, nothing sees the rows
            with shared_kit.base():
                assert torch.equal(found, hidden(shared_kit, batch))
        return
    with shared_kit.active(composition):
        mixed = hidden(shared_kit, batch)
    with shared_kit.active(Rows(rows)):
        torch.testing.assert_close(mixed, hidden(shared_kit, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_stack_of_one_and_a_mean_of_copies_are_that_one(shared_kit: ak.AdapterKit, batch: Tensor, name: str) -> None:
    with shared_kit.active(name):
        alone = hidden(shared_kit, batch)
    for same_thing in (Stack(name), Average(name, name, weights=[3, 1]), Stack(Stack(Average(name))), Rows([name] * ROWS)):
        with shared_kit.active(same_thing):
            torch.testing.assert_close(hidden(shared_kit, batch), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("one", "other"), [("p", "q"), ("p", "wide"), ("l", "m"), ("l", "p"), ("compacter", "p")])
def test_a_split_gives_each_token_its_adapter(one: str, other: str) -> None:
    """Seen at the first host, which reads tokens that no attention has mixed yet."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    kit, x = ak.wrap(model), torch.randn(3, 5, 8)
    for name in (one, other):
        kit.add(name, CONFIGS[name].override({"targets": ["0"], "layers": None}))
        randomise(kit, name)
    with kit.active(Split(one, other, sizes=[2, 3])):
        mixed = model(x)
    for name, part in ((one, slice(0, 2)), (other, slice(2, 5))):
        with kit.active(name):
            torch.testing.assert_close(mixed[:, part], model(x)[:, part])
    with kit.active(Split(one, other, sizes=[2, 2])), pytest.raises(ak.CompatibilityError, match=r"has 5, .* which are 4"):
        model(x)


def test_gradients_of_a_mixed_batch_are_those_of_the_separate_runs() -> None:
    kit, ids = with_every_method()
    rows = ["p", "q", "l", "vera 2"]
    kit.freeze()
    for name in CONFIGS:
        kit.unfreeze(name)
    kit.activate(Rows(rows))
    hidden(kit, ids).pow(2).sum().backward()
    mixed = {name: [p.grad.clone() for p in kit.parameters(name)] for name in rows}
    kit.model.zero_grad()
    for index, name in enumerate(rows):
        kit.activate(name)
        hidden(kit, ids[index : index + 1]).pow(2).sum().backward()
    for name in rows:
        for one, other in zip(mixed[name], kit.parameters(name), strict=True):
            torch.testing.assert_close(one, other.grad, atol=1e-4, rtol=1e-4)
    kit.activate(Rows(["p", None, None, None]))
    kit.model.zero_grad()
    hidden(kit, ids).sum().backward()
    assert all(p.grad is None for name in ("q", "l") for p in kit.parameters(name))


@pytest.mark.parametrize(
    "composition", [Stack("p", "l"), Average("p", "l"), Rows(["p", "q", "l", None]), BatchSplit("l", "m")]
)
def test_compositions_compile_without_a_graph_break(composition: Any) -> None:
    kit, ids = with_every_method()
    kit.activate(composition)
    expected = kit.model(ids)
    compiled = torch.compile(kit.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected)


def test_what_cannot_be_is_refused_when_it_is_activated_and_nothing_changes() -> None:
    kit = ak.wrap(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 3, 3, padding=1)))
    kit.add("bias", "bitfit")
    kit.add("conv", "lora", targets=["1"])
    kit.activate("conv")
    for composition, message in [
        (Rows(["bias", None]), "changes the Parameter bias, which all rows and tokens share"),
        (Split("conv", "conv"), "divides the sequence, and '1' .* has its features on axis -2"),
        (BatchSplit(Rows(["conv"]), "conv", sizes=[2, 1]), "Rows names 1 rows, and the batch has 2"),
        (Stack("conv", "nothing"), "no adapter 'nothing'"),
    ]:
        with pytest.raises(ak.AdapterKitError, match=message):
            kit.activate(composition)
        assert kit.summary().adapters[1].is_active
        assert not kit.summary().adapters[0].is_active


def test_batches_of_another_size_are_refused_as_they_run(shared_kit: ak.AdapterKit, batch: Tensor) -> None:
    with (
        shared_kit.active(Rows(["p", "q"])),
        pytest.raises(ak.CompatibilityError, match="Rows names 2 rows, and the batch has 4"),
    ):
        shared_kit.model(batch)


def test_each_row_of_a_post_norm_model_is_what_its_adapter_gives_it_alone(batch: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval(), batch)
    for name, preset in (("a", "pfeiffer"), ("b", "houlsby"), ("c", "parallel"), ("d", "lora")):
        kit.add(name, preset)
        randomise(kit, name)
    with kit.active(Rows(["a", "b", "c", "d"])):
        mixed = hidden(kit, batch)
    for index, name in enumerate("abcd"):
        with kit.active(name):
            torch.testing.assert_close(mixed[index], hidden(kit, batch)[index], atol=1e-5, rtol=1e-5)


def test_merging_one_of_a_stack_keeps_the_rest() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(4, 6)
    kit = ak.wrap(model)
    for name in ("a", "b"):
        kit.add(name, "lora", targets=["0", "1"])
        randomise(kit, name)
    kit.add("i", ak.IA3Config(targets=["1"], feedforward_targets=()))
    kit.activate(Stack("a", "b"))
    expected, before = model(x), model[0].weight.clone()
    kit.merge("a")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model[0].weight, before)
    for other in ("b", Rows(["a"] * 4), Average("a", "b")):
        with pytest.raises(ak.ActivationError, match="'a' is merged into the weights"):
            kit.activate(other)
    kit.merge("b")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    kit.unmerge("a")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    kit.unmerge("b")
    assert torch.equal(model[0].weight, before)
    kit.activate(Stack("a", "i"))
    with pytest.raises(ak.CompatibilityError, match="'1', where 'i' acts as well and is not merged"):
        kit.merge("a")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("wrong", [None, ["a", "b"], 3])
def test_what_is_neither_a_name_nor_a_composition_is_refused(shared_kit: ak.AdapterKit, wrong: Any) -> None:
    with pytest.raises(ak.AdapterKitError):
        shared_kit.activate(wrong)


def test_a_composition_is_seen_in_the_summary_and_proven_by_verify() -> None:
    kit, ids = with_every_method()
    kit.activate(Stack("p", "i"))
    assert [row.name for row in kit.summary().adapters if row.is_active] == ["p", "i"]
    kit.verify(ids).require()
    kit.remove("i")
    assert not any(row.is_active for row in kit.summary().adapters)


def test_train_adapter_takes_one_adapter() -> None:
    kit, _ = with_every_method()
    with pytest.raises(ak.AdapterNameError, match=r"no adapter Stack\('p', 'q'\)"):
        kit.train_adapter(Stack("p", "q"))
    assert all(p.requires_grad for p in kit.parameters("p"))


def test_a_part_without_rows_changes_nothing(shared_kit: ak.AdapterKit, batch: Tensor) -> None:
    with shared_kit.active(BatchSplit("wide", "l", sizes=[0, ROWS])):
        divided = hidden(shared_kit, batch)
    with shared_kit.active("l"):
        torch.testing.assert_close(divided, hidden(shared_kit, batch))


def test_copies_and_pickles_run_the_composition_that_was_active() -> None:
    kit, ids = with_every_method()
    kit.activate(Rows(["p", Stack("q", "l"), "vera", None]))
    expected = kit.model(ids)
    for other in (copy.deepcopy(kit.model), pickle.loads(pickle.dumps(kit.model))):
        assert torch.equal(other(ids), expected)
