"""The anatomy of a model, from one tiny traced forward; remembered for every model of the same structure."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CompatibilityError
from ..patterns import modules_by_path
from ..values import tensors
from .anatomy import Anatomy
from .flow import Flow
from .graph import record
from .inputs import moved_to, tiny_inputs
from .sublayers import dissect
from .trace import ExampleInputs

__all__ = ["Discovery", "discover"]

_REMEMBERED: OrderedDict[str, tuple[Anatomy, ExampleInputs]] = OrderedDict()
_LIMIT = 32


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
    key = _structure(model, example_inputs)
    if key not in _REMEMBERED:
        inputs = tiny_inputs(model) if example_inputs is None else example_inputs
        anatomy = dissect(Flow(record(model, inputs)), modules_by_path(model))
        _REMEMBERED[key] = anatomy, (inputs if example_inputs is None else ())
        while len(_REMEMBERED) > _LIMIT:
            _REMEMBERED.popitem(last=False)
    _REMEMBERED.move_to_end(key)
    anatomy, inputs = _REMEMBERED[key]
    return anatomy, moved_to(inputs if example_inputs is None else example_inputs, model)


def _structure(model: nn.Module, inputs: ExampleInputs | None) -> str:
    """A hash over what decides which operations a forward runs: types, shapes, plain attributes, configs, inputs."""
    digest = hashlib.sha256()
    for path, module in modules_by_path(model).items():
        digest.update(f"\n{path} {type(module).__module__}.{type(module).__qualname__} {id(type(module))}".encode())
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                digest.update(f" {name} {tuple(tensor.shape)} {tensor.dtype} {tensor.is_meta}".encode())
        for line in _settings(module):
            digest.update(line.encode())
    for where, tensor in tensors(inputs):
        digest.update(f"\n{where} {tuple(tensor.shape)} {tensor.dtype}".encode())
    return digest.hexdigest()


def _settings(holder: Any, depth: int = 2) -> Iterator[str]:
    """The plain attributes of an object, and of objects in them (a config), as text."""
    for name, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
        if name in ("training", "_parameters", "_buffers", "_modules") or "hooks" in name:
            continue
        if isinstance(value, (bool, int, float, str, type(None), tuple, list, dict, set)):
            yield f" {name}={value!r}"[:10_000]
        elif callable(value):
            yield f" {name}:{getattr(value, '__qualname__', type(value).__qualname__)}:{id(value)}"
        elif depth and not isinstance(value, (Tensor, nn.Module, Mapping)):
            yield f" {name}:{type(value).__qualname__}"
            yield from _settings(value, depth - 1)
