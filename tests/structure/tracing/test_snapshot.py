"""A look at a model leaves nothing behind in its modules, nor in the random state."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.tracing.forward import forward, untouched

from ...hosts.blocks import VOCAB, WIDTH, Model, Pre, randomised

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


class Restless(Pre):
    """Changes everything that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.cache, self.shapes = 0, None, [(0, 0)]
        self.by_length, self.lengths = {"none": 0}, {0}
        self.register_parameter("late", None)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x if self.cache is None else torch.cat([self.cache, x], 1)
        self.shapes.append(x.shape)
        self.by_length[x.shape[1]] = self.by_length.pop("none", 0)
        self.lengths.add(x.shape[1])
        self.new_attribute = True
        self.late = nn.Parameter(torch.zeros(WIDTH))
        self.newer = nn.Parameter(torch.zeros(WIDTH))
        self.count += 1
        self.child = nn.Linear(1, 1)
        return super().forward(x)


def held(module: nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    inner = {name: list(value) for name, value in vars(module).items() if isinstance(value, dict)}
    return copy.deepcopy({**plain, "inner": inner, "count": float(module._buffers["count"])})  # type: ignore[arg-type]  # a buffer it has


def test_attributes_containers_children_and_buffers_are_as_before() -> None:
    model = randomised(Model(Restless))
    before = [held(block) for block in model.blocks]
    kit = ak.wrap(model, IDS)
    kit.sites("pfeiffer")
    assert [held(block) for block in model.blocks] == before
    kit.add("a", "pfeiffer")
    kit.activate("a")
    kit.verify()
    kit.unwrap()
    assert [held(block) for block in model.blocks] == before


def test_an_object_that_a_model_keeps_is_as_before() -> None:
    class Cache:
        def __init__(self) -> None:
            self.length, self.keys, self.by_layer = 0, None, {"first": []}

    class Cached(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.caches = [Cache()]

        def forward(self, x: Tensor) -> Tensor:
            cache = self.caches[0]
            cache.length += x.shape[1]
            cache.by_layer["first"].append(x)
            cache.new = True
            return super().forward(x)

    model = randomised(Model(Cached))
    ak.wrap(model, IDS).add("a", "pfeiffer")
    for block in model.blocks:
        assert vars(block.caches[0]) == {"length": 0, "keys": None, "by_layer": {"first": []}}


def test_what_another_packages_layer_moves_into_its_object_is_not_lost() -> None:
    """A layer of int8 (bitsandbytes): its first forward takes the codes from the weight, which nobody puts back."""

    class State:
        codes: Tensor | None = None

    class Int8(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.state = State()
            self.weight.codes = torch.ones(3)

        def forward(self, x: Tensor) -> Tensor:
            if self.weight.codes is not None:
                self.state.codes, self.weight.codes = self.weight.codes, None
            return super().forward(x)

    State.__module__ = Int8.__module__ = "elsewhere.layers"
    model = Model(Pre)
    model.blocks[0].mlp = layer = Int8()
    ak.wrap(randomised(model), IDS).sites("pfeiffer")
    assert layer.state.codes is not None


def test_hooks_that_a_forward_registers_go_with_the_attribute_that_remembers_them() -> None:
    class Capturing(Model):
        has_hooks = False
        seen = 0

        def forward(self, input_ids: Tensor) -> Tensor:
            if not self.has_hooks:
                self.has_hooks = True
                for block in self.blocks:
                    block.register_forward_hook(self.look)
            return super().forward(input_ids)

        def look(self, *_: object) -> None:
            type(self).seen += 1

    model = randomised(Capturing(Pre))
    ak.wrap(model, IDS).sites("pfeiffer")
    assert "has_hooks" not in vars(model)
    assert not any(block._forward_hooks for block in model.blocks)
    Capturing.seen = 0
    model(IDS)
    assert Capturing.seen == 2


def test_hooks_keep_their_order() -> None:
    class Moving(Pre):
        def forward(self, x: Tensor) -> Tensor:
            self._forward_hooks.move_to_end(next(iter(self._forward_hooks)))
            return super().forward(x)

    model = Model(Moving)
    for block in model.blocks:
        for _ in range(2):
            block.register_forward_hook(lambda *_: None)
    before = [list(block._forward_hooks) for block in model.blocks]
    forward(model, IDS)
    assert [list(block._forward_hooks) for block in model.blocks] == before


@pytest.mark.parametrize(
    "draw", [random.random, numpy.random.rand, lambda: float(torch.rand(()))], ids=["python", "numpy", "torch"]
)
def test_random_state_is_as_before(draw: Callable[[], float]) -> None:
    class Drawing(Pre):
        def forward(self, x: Tensor) -> Tensor:
            draw()
            return super().forward(x)

    model = Model(Drawing)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(3)
    first, second = draw(), draw()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(3)
    assert draw() == first
    forward(model, IDS)
    assert draw() == second


def test_lazy_layers_stay_what_the_first_forward_made_them() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    forward(model, torch.randn(2, 4))
    assert [type(layer) for layer in model] == [nn.Linear, nn.BatchNorm1d]
    assert model(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_layers_keep_their_buffers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.BatchNorm1d(4)))
    before = copy.deepcopy(model.state_dict())
    forward(model, torch.randn(3, 4), training=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_within_leaves_no_trace_either() -> None:
    model = Model(Restless)
    before = [held(block) for block in model.blocks]
    with pytest.raises(ValueError, match="halfway"), untouched(model):
        model(IDS)
        raise ValueError("halfway")
    assert [held(block) for block in model.blocks] == before
