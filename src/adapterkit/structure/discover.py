"""The anatomy of a model, from one tiny traced forward; remembered for every model of the same structure."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from threading import Lock

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import CompatibilityError
from ..patterns import modules_by_path
from .anatomy import Anatomy
from .flow import Flow
from .graph import record
from .inputs import first_that_runs, moved_to
from .key import structure_key
from .sublayers import dissect
from .trace import ExampleInputs

__all__ = ["Discovery", "discover"]

_REMEMBERED: OrderedDict[str, tuple[Anatomy, ExampleInputs]] = OrderedDict()
_LIMIT = 32
_LOCK = Lock()


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
        """Whether anyone has asked."""
        return self._found is not None

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy. Raises CompatibilityError if the model runs on no inputs that could be made for it."""
        return self._both()[0]

    @property
    def inputs(self) -> ExampleInputs:
        """Inputs that the model runs on: the given ones, else those made for it. Raises as `anatomy` does."""
        return self._both()[1] if self._given is None else self._given

    def _both(self) -> tuple[Anatomy, ExampleInputs]:
        if self._found is None:
            self._found = discover(self.model, self._given)
        return self._found


def discover(model: nn.Module, example_inputs: ExampleInputs | None = None) -> tuple[Anatomy, ExampleInputs]:
    """The anatomy of a model and the inputs that showed it.

    Raises:
        CompatibilityError: the model does not run on its example inputs, or on any that could be made for it; or it has
            layers without shapes.
    """
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise CompatibilityError(
            f"{type(model).__name__} has lazy layers ({lazy[0]!r}), which have no shape yet; run it once"
        )
    key = structure_key(model, example_inputs)
    found = _REMEMBERED.get(key)
    if found is None:
        if example_inputs is None:
            inputs, graph = first_that_runs(model, partial(record, model))
        else:
            inputs, graph = (), record(model, example_inputs)
        found = dissect(Flow(graph), modules_by_path(model)), inputs
    with _LOCK:
        _REMEMBERED[key] = found
        _REMEMBERED.move_to_end(key)
        while len(_REMEMBERED) > _LIMIT:
            _REMEMBERED.popitem(last=False)
    anatomy, inputs = found
    return anatomy, moved_to(inputs if example_inputs is None else example_inputs, model)
