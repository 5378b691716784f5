"""Compositions of adapters with heads: each row of a batch has its own, and one owner is chosen for it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.composition.nodes import Average, BatchSplit, Fuse, Parallel, Rows, Split, Stack
from adapterkit.heads.plan import head_owner

from .helpers import ADAPTER, CLASSES, batch, bert, kit_of, mixed_kit, row


@pytest.mark.parametrize(
    "rows",
    [
        ["a", "b", "a", "b"], ["a", "a", "b", "b"], ["b", "a", "tags", None], [None, "none", "a", "a"],
        [Stack("none", "a"), Stack("a", "none"), Stack("a", "b"), "a"], ["none", "none", None, "none"],
    ],
)  # fmt: skip
def test_each_row_has_its_own_head_and_is_what_it_is_alone(rows: list[Any]) -> None:
    kit, inputs = mixed_kit(), batch()
    with kit.active(Rows(rows)):
        mixed = kit.model(**inputs)
    for index, which in enumerate(rows):
        with kit.base() if which is None else kit.active(which):
            alone = kit.model(**row(inputs, index))
        if not isinstance(alone, ak.HeadOutput):
            whole = mixed.output if isinstance(mixed, ak.HeadOutput) else mixed
            assert not isinstance(mixed, ak.HeadOutput) or mixed.logits[index] is None
            torch.testing.assert_close(whole.last_hidden_state[index], alone.last_hidden_state[0], atol=1e-5, rtol=1e-5)
            continue
        torch.testing.assert_close(mixed.logits[index], alone.logits[0], atol=1e-5, rtol=1e-5)
        for name, logits in alone.heads.items():
            torch.testing.assert_close(mixed.heads[name][index], logits[0], atol=1e-5, rtol=1e-5)


def test_logits_of_one_shape_are_one_tensor_and_of_several_a_tuple_by_row() -> None:
    kit, inputs = mixed_kit(), batch()
    with kit.active(Rows(["a", "b", "b", "a"])):
        assert kit.model(**inputs).logits.shape == (4, 3)
    with kit.active(Rows(["a", "tags", None, "a"])):
        out = kit.model(**inputs)
    assert [None if logits is None else tuple(logits.shape) for logits in out.logits] == [(3,), (6, 2), None, (3,)]
    assert [logits is None for logits in out.heads["classification"]] == [False, True, True, False]
    assert [logits is None for logits in out.heads["regression"]] == [True, False, True, True]


@pytest.mark.parametrize(
    "composition", [Rows(["a", "b", "a", "b"]), BatchSplit("a", "b"), BatchSplit("b", "a", sizes=[1, 3])]
)
def test_gradients_and_losses_of_a_mixed_batch_are_those_of_the_separate_runs(composition: Any) -> None:
    kit, inputs, labels = mixed_kit(), batch(), torch.tensor([0, 1, 2, 1])
    kit.freeze()
    for name in ("a", "b"):
        kit.unfreeze(name)
    kit.activate(composition)
    out = kit.model(**inputs, labels=labels)
    out.loss.backward()
    mixed = {name: [p.grad.clone() for p in kit.parameters(name, heads=True)] for name in ("a", "b")}
    kit.model.zero_grad()
    from adapterkit.composition.rows import rows_of

    for name in ("a", "b"):
        where = [index for index, kind in enumerate(rows_of(composition, 4)) if kind == name]
        kit.activate(name)
        alone = kit.model(**{key: tensor[where] for key, tensor in inputs.items()}, labels=labels[where])
        torch.testing.assert_close(out.losses[name], alone.loss, atol=1e-5, rtol=1e-5)
        alone.loss.backward()
        for one, parameter in zip(mixed[name], kit.parameters(name, heads=True), strict=True):
            torch.testing.assert_close(one, parameter.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss, out.losses["a"] + out.losses["b"])


def test_labels_may_be_given_by_adapter() -> None:
    kit, inputs = mixed_kit(), batch()
    kit.activate(Rows(["a", "tags", "b", "a"]))
    tags, classes = torch.randint(0, 2, (1, 6)), torch.tensor([2, 0])
    out = kit.model(**inputs, labels={"a": classes, "tags": {"tagging": tags}})
    assert out.losses.keys() == {"a", "tags"}
    torch.testing.assert_close(out.losses["a"], F.cross_entropy(torch.stack([out.logits[0], out.logits[3]]), classes))
    torch.testing.assert_close(out.losses["tags"], F.cross_entropy(out.logits[1], tags[0]))
    whole = torch.tensor([2, -100, -100, 0])
    assert torch.equal(kit.model(**inputs, labels={"a": whole}).losses["a"], out.losses["a"]), "of all rows"
    with pytest.raises(
        ak.CompatibilityError, match=r"labels for the head 'classification' have 3 rows, .* 2 rows of a batch of 4"
    ):
        kit.model(**inputs, labels={"a": whole[:3]})


def test_parallel_has_a_head_and_a_loss_for_each_child() -> None:
    kit, inputs, labels = mixed_kit(), batch(), torch.tensor([0, 1, 2, 1])
    expected = {}
    for name in ("a", "b"):
        with kit.active(name):
            expected[name] = kit.model(**inputs, labels=labels)
    kit.activate(Parallel("a", "b"))
    out = kit.model(**inputs, labels=labels)
    torch.testing.assert_close(out.logits, torch.cat([expected["a"].logits, expected["b"].logits]), atol=1e-5, rtol=1e-5)
    for name in ("a", "b"):
        torch.testing.assert_close(out.losses[name], expected[name].loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, expected["a"].loss + expected["b"].loss, atol=1e-5, rtol=1e-5)
    by_name = kit.model(**inputs, labels={"b": labels})
    torch.testing.assert_close(by_name.loss, expected["b"].loss, atol=1e-5, rtol=1e-5)
    kit.activate(Stack("none", Parallel("a", "a")))
    same = kit.model(**inputs, labels=labels)
    with kit.active(Stack("none", "a")):
        torch.testing.assert_close(same.loss, kit.model(**inputs, labels=labels).loss, atol=1e-5, rtol=1e-5)


def test_choices_are_divided_by_whole_examples() -> None:
    kit = kit_of(bert(), {"a": ak.MultipleChoiceHead(2), "b": ak.MultipleChoiceHead(2, layers=2), "c": CLASSES})
    inputs = batch(8)
    kit.activate(BatchSplit("b", "a"))
    out = kit.model(**inputs, labels=torch.tensor([0, 1, 1, 0]))
    for name, part, which in (("b", slice(0, 4), slice(0, 2)), ("a", slice(4, 8), slice(2, 4))):
        with kit.active(name):
            alone = kit.model(
                **{key: tensor[part] for key, tensor in inputs.items()}, labels=torch.tensor([0, 1, 1, 0])[which]
            )
        torch.testing.assert_close(out.logits[which], alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.losses[name], alone.loss, atol=1e-5, rtol=1e-5)
    kit.activate(BatchSplit("a", "c"))
    out = kit.model(**inputs, labels={"c": torch.tensor([0, 1, 2, 1])})
    assert [tuple(logits.shape) for logits in out.logits] == [(2,)] * 2 + [(3,)] * 4
    with pytest.raises(ak.ConfigError, match="a MultipleChoiceHead takes several rows for one example"):
        kit.add("d", ADAPTER, heads=[ak.MultipleChoiceHead(2), CLASSES])


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, of hooks on what it compiles
@pytest.mark.parametrize("composition", [Rows(["a", "b", "tags", None]), Rows(["a", "b", "b", "a"]), BatchSplit("b", "a")])
def test_rows_with_heads_compile_without_a_graph_break(composition: Any) -> None:
    kit, inputs = mixed_kit(), batch()
    kit.activate(composition)
    labels = {"b": torch.tensor([1]) if composition.children[-1] is None else torch.tensor([1, 0])}
    expected = kit.model(**inputs, labels=labels)
    found = torch.compile(kit.model, backend="eager", fullgraph=True)(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)


def test_of_a_stack_the_last_owner_has_the_head_and_side_by_side_there_is_one() -> None:
    owners = {"a", "b", "a,b"}
    for composition, owner in [
        ("a", "a"), ("c", None), (None, None), (Stack("a", "b"), "b"), (Stack("a", "c"), "a"), (Stack("b", Stack("a", "c")), "a"),
        (Average("a", "c"), "a"), (Average("a", "a"), "a"), (Split("c", Stack("a", "c")), "a"), (Fuse("a", "b"), "a,b"),
        (Fuse("a", "c"), "a"), (Stack(Average("c", "c"), "b"), "b"), (Stack(Fuse("a", "b"), "c"), "a,b"),
    ]:  # fmt: skip
        assert head_owner(composition, owners) == owner
    for composition in (
        Average("a", "b"),
        Split("a", Stack("c", "b")),
        Fuse("a", "b", name="other"),
        Stack("c", Average("b", "a")),
    ):
        with pytest.raises(
            ak.CompatibilityError, match=r"cannot choose between the heads of .*, which act on the same rows"
        ):
            head_owner(composition, owners)


def test_what_cannot_choose_a_head_is_refused_when_it_is_activated() -> None:
    kit, inputs = mixed_kit(), batch()
    kit.activate("none")
    expected = kit.model(**inputs).last_hidden_state
    for composition in (Average("a", "b"), Rows(["none", Split("a", "b"), None, None])):
        with pytest.raises(ak.CompatibilityError, match="cannot choose between the heads"):
            kit.activate(composition)
        assert torch.equal(kit.model(**inputs).last_hidden_state, expected)
    with kit.active(Average("a", "none")):
        assert kit.model(**inputs).logits.shape == (4, 3)


def test_copies_and_pickles_run_their_own_heads() -> None:
    kit, inputs, labels = mixed_kit(), batch(), torch.tensor([0, 1, 2, 1])
    kit.activate(Rows(["a", "b", "a", "b"]))
    expected = kit.model(**inputs, labels=labels)
    for other in (copy.deepcopy(kit.model), pickle.loads(pickle.dumps(kit.model))):
        found = other(**inputs, labels=labels)
        assert torch.equal(found.loss, expected.loss)
        ak.wrap(other).deactivate()
        assert not isinstance(other(**inputs), ak.HeadOutput)
    assert torch.equal(kit.model(**inputs, labels=labels).loss, expected.loss)
