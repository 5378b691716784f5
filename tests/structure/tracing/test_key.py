"""Models with the same key have the same anatomy; whatever may change it changes the key."""

import types
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.anatomy.discover import discover
from adapterkit.structure.tracing.key import structure_key

from ...hosts.blocks import VOCAB, WIDTH, Model, Post, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


def block(end: int, *, pre: bool = True) -> type[nn.Module]:
    """A class of the same name each time."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x) if pre else x
            return x.sum(-1) if end == -1 else x.sum(-2)

    return Block


def test_equal_models_have_equal_keys() -> None:
    assert structure_key(Model(Pre), IDS) == structure_key(randomised(Model(Pre)), IDS)
    assert structure_key(Model(Pre), IDS) != structure_key(Model(Post), IDS)


def test_what_is_shared_is_part_of_the_key() -> None:
    untied, modules_tied, weights_tied = Model(Pre), Model(Pre), Model(Pre)
    modules_tied.blocks[0].norm2 = modules_tied.blocks[0].norm1
    weights_tied.blocks[0].norm2.weight = weights_tied.blocks[0].norm1.weight
    assert len({structure_key(model, IDS) for model in (untied, modules_tied, weights_tied)}) == 3


def test_inputs_that_are_no_tensors_are_part_of_the_key() -> None:
    flags: list[object] = [True, False, None, "feedforward", [1, True], [1, False]]
    keys = {structure_key(Model(Pre), {"input_ids": IDS, "flag": flag}) for flag in flags}
    assert len(keys) == len(flags)


def test_another_flag_is_discovered_anew() -> None:
    class Flagged(Model):
        def forward(self, input_ids: Tensor, feedforward: bool = True) -> Tensor:
            x = self.embedding(input_ids)
            for inner in self.blocks:
                x = x + inner.attention(inner.norm1(x))
                x = x + inner.mlp(inner.norm2(x)) if feedforward else x
            return x

    model = Flagged(Pre)
    found = [len(discover(model, {"input_ids": IDS, "feedforward": flag})[0].sublayers) for flag in (False, True)]
    assert found == [2, 4]


def test_code_is_part_of_the_key_and_the_identity_of_a_class_is_not() -> None:
    assert structure_key(block(-1)(), None) == structure_key(block(-1)(), None)
    assert structure_key(block(-1)(), None) != structure_key(block(-2)(), None), "a value that it closes over"
    assert structure_key(block(-1)(), None) != structure_key(block(-1, pre=False)(), None)


def test_constants_that_hash_alike_are_told_apart() -> None:
    kinds: list[Callable[[nn.Module, Tensor], Tensor]] = [lambda _, x: x.sum(-1), lambda _, x: x.sum(-2)]
    models = [type("Same", (nn.Module,), {"forward": forward})() for forward in kinds]
    assert structure_key(models[0], None) != structure_key(models[1], None)


def test_a_class_patched_in_place_is_discovered_anew() -> None:
    patched = type("Patched", (Pre,), {})
    model = Model(patched)
    assert discover(model, IDS)[0].sublayers[1].norm == "pre"
    patched.forward = lambda self, x: self.norm2(self.mlp(y := self.norm1(self.attention(x) + x)) + y)  # type: ignore[attr-defined]  # a class made here
    assert discover(model, IDS)[0].sublayers[1].norm == "post"
    assert [site.path for site in ak.wrap(model, IDS).sites("pfeiffer")] == ["blocks.0.norm2", "blocks.1.norm2"]


def test_an_instance_whose_forward_is_patched_has_another_key() -> None:
    model = Model(Pre)
    keys = {structure_key(model, None)}
    for forward in (lambda _, x: x.sum(-1), lambda _, x: x.sum(-2)):
        model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]  # the patch is the point
        keys.add(structure_key(model, None))
        del model.forward
    assert len(keys) == 3


class Settings(Mapping[str, object]):
    """A mapping that is no dict, as configuration libraries have them."""

    def __init__(self, **held: object) -> None:
        self.held = held

    def __getitem__(self, key: str) -> object:
        return self.held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@pytest.mark.parametrize("hold", [lambda flag: Settings(pre=flag), lambda flag: Nested(Nested(Nested(flag)))])
def test_settings_are_part_of_the_key_however_deep_and_whatever_holds_them(hold: Callable[[bool], object]) -> None:
    models = [Model(Pre), Model(Pre), Model(Pre)]
    for model, flag in zip(models, (True, False, True), strict=True):
        model.config = hold(flag)
    one, other, same = (structure_key(model, IDS) for model in models)
    assert one == same != other


class Nested:
    def __init__(self, held: object) -> None:
        self.held = held


def step(x: Tensor, f: Tensor) -> Tensor:
    return x + f


class Calling(Pre):
    def forward(self, x: Tensor) -> Tensor:
        return step(x, self.mlp(self.norm2(x)))


def test_a_function_that_a_forward_calls_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Calling)
    before = structure_key(model, IDS)
    monkeypatch.setitem(globals(), "step", lambda x, f: x * f)
    assert structure_key(model, IDS) != before


def test_what_adapterkit_does_to_a_model_is_no_part_of_the_key() -> None:
    model = Model(Pre)
    before = structure_key(model, IDS)
    kit = ak.wrap(model)
    kit.add("a", "pfeiffer")
    kit.train_adapter("a")
    assert structure_key(model, IDS) == before


def test_functions_that_belong_to_no_module_have_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that `exec` makes."""
    monkeypatch.setattr(block, "__module__", None)

    class Calling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return block(1)()(x)

    assert structure_key(Calling(), torch.ones(1))


def test_which_of_two_functions_a_class_holds_again_is_part_of_the_key() -> None:
    def one(x: Tensor) -> Tensor:
        return x + 1

    def two(x: Tensor) -> Tensor:
        return x + 2

    kinds = [type("Block", (Pre,), {"first": one, "second": two, "third": last}) for last in (one, two)]
    assert structure_key(Model(kinds[0]), IDS) != structure_key(Model(kinds[1]), IDS)
