"""Find the anatomy of a model by one tiny traced forward, and remember it for every model of the same structure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Generic, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from ...errors import CompatibilityError
from ..paths import modules_by_path
from ..tracing.flow import Flow
from ..tracing.forward import ExampleInputs
from ..tracing.graph import record_graph
from ..tracing.inputs import first_that_runs, moved_to
from ..tracing.key import structure_key
from .description import Anatomy
from .dissect import dissect

__all__ = ["Discovery", "Remembered", "discover"]

T = TypeVar("T")
_LIMIT = 32  # structures that are remembered; an anatomy is some kilobytes


class Remembered(Generic[T]):
    """What was found for the last models: maps the key of a structure to it."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, T] = OrderedDict()
        self._lock = Lock()

    def get(self, key: str, find: Callable[[], T]) -> T:
        """Return what was found for this structure; else what `find` returns, and keep it. Raises what `find` raises."""
        found = self._held.get(key)
        found = find() if found is None else found  # outside of the lock: it runs a model, and two may run at once
        with self._lock:
            self._held[key] = found
            self._held.move_to_end(key)
            while len(self._held) > _LIMIT:
                self._held.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._held.clear()


_REMEMBERED: Remembered[tuple[Anatomy, ExampleInputs]] = Remembered()


class Discovery:
    """The anatomy of a model and the inputs that showed it, found when they are first asked for.

    Args:
        model: Any module.
        example_inputs: Inputs that it runs on; tiny ones are made if there are none.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> None:
        self.model = model
        self._given = example_inputs
        self._found: tuple[Anatomy, ExampleInputs] | None = None

    @property
    def was_needed(self) -> bool:
        """Tell whether anyone has asked."""
        return self._found is not None

    @property
    def anatomy(self) -> Anatomy:
        """Return the anatomy. Raises CompatibilityError if the model runs on no inputs that could be made for it."""
        return self._both()[0]

    @property
    def inputs(self) -> ExampleInputs:
        """Return inputs that the model runs on: the given ones, else those made for it. Raises as `anatomy` does."""
        return self._both()[1] if self._given is None else self._given

    def _both(self) -> tuple[Anatomy, ExampleInputs]:
        if self._found is None:
            self._found = discover(self.model, self._given)
        return self._found


def discover(model: nn.Module, example_inputs: ExampleInputs | None = None) -> tuple[Anatomy, ExampleInputs]:
    """Return the anatomy of a model, and the inputs that showed it.

    Raises:
        CompatibilityError: the model does not run on its example inputs, or on any that could be made for it; or it has
            layers without shapes.
    """
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise CompatibilityError(
            f"{type(model).__name__} has lazy layers ({lazy[0]!r}), which have no shape yet; run it once"
        )

    def find() -> tuple[Anatomy, ExampleInputs]:
        if example_inputs is None:
            inputs, graph = first_that_runs(model, partial(record_graph, model))
        else:
            inputs, graph = (), record_graph(model, example_inputs)
        return dissect(Flow(graph), modules_by_path(model)), inputs

    anatomy, inputs = _REMEMBERED.get(structure_key(model, example_inputs), find)
    return anatomy, moved_to(inputs if example_inputs is None else example_inputs, model)
