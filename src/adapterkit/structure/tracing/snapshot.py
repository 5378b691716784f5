"""Remember what a module holds, and put it back: attributes, hooks, children, buffers; not the values of parameters."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .surroundings import generator_state
from .tensors import is_plain, memory_of

__all__ = ["Snapshot"]

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


class Snapshot:
    """The state of a module, without its children's, as it was when this was made.

    Kept are its attributes; what lies in containers among them (hooks, buffers and children, too), in objects of the
    model's own package (a cache, a counter), and in those in turn; the state of random generators; buffers and their
    values; gradients; and which parameters there are. Two things are not kept: what lies in other objects, and which
    objects the parameters are. A sharded module (FSDP) exchanges those in its forward, and keeps book of it elsewhere; a
    layer of int8 (bitsandbytes) moves what its weight holds into an object of its own.

    Of a lazy module only the mode is kept, for the first forward makes it another. Of a scripted one it is the mode and the
    values of buffers: its attributes live in C++.

    Args:
        model: The model that the module is in.
    """

    def __init__(self, module: nn.Module, model: nn.Module) -> None:
        self._module = module
        self._training = module.training
        self._attributes: dict[str, Any] = {}
        self._parameters: dict[str, bool] = {}
        is_lazy = isinstance(module, LazyModuleMixin)
        if not is_lazy and not isinstance(module, torch.jit.ScriptModule):
            self._attributes = dict(module.__dict__)
            self._parameters = {name: parameter is not None for name, parameter in module._parameters.items()}
        attributes = [value for name, value in self._attributes.items() if name != "_parameters"]
        self._contents = [(value, value.copy()) for value in _containers(attributes, _package(model))]
        self._generators = [restore for restore in map(generator_state, attributes) if restore is not None]
        held = module._parameters.values() if self._attributes else ()
        self._gradients = [(p, p.grad) for p in held if p is not None and p.is_leaf]
        buffers = [] if is_lazy else [b for b in module._buffers.values() if b is not None and not b.is_meta]
        self._buffers = [_Buffer(buffer) for buffer in buffers]

    def restore(self) -> None:
        """Put everything back, and touch nothing that did not change."""
        self._module.training = self._training
        if self._attributes:
            _refill(self._module.__dict__, self._attributes)
            held = self._module._parameters
            # Names that were None, or not there: a forward may have filled them (`register_parameter`).
            for name in [name for name in held if not self._parameters.get(name)]:
                if name in self._parameters:
                    held[name] = None
                else:
                    del held[name]
        for container, content in self._contents:
            _refill(container, content)
        for restore in self._generators:
            restore()
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        with torch.no_grad():
            for buffer in self._buffers:
                buffer.restore()


class _Buffer:
    """A buffer as it was: its values, and the memory that it lay in."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._memory, self._value = buffer, buffer.detach(), buffer.detach().clone()
        # Sparse tensors and others cannot be compared; whether one was written to, its version tells.
        self._version = None if is_plain(buffer) or buffer.is_inference() else buffer._version

    def restore(self) -> None:
        """Put its values back, and its memory, if a forward has resized it or given it other data."""
        if self._version is not None:
            if self._buffer._version != self._version:
                self._buffer.copy_(self._value)
            return
        if is_plain(self._buffer) and memory_of(self._buffer) != memory_of(self._memory):
            self._buffer.data = self._memory
        if not torch.equal(self._buffer, self._value):
            self._buffer.copy_(self._value)


def _containers(values: Iterable[Any], package: str) -> Iterator[Any]:
    """Yield each container among values, and in those, once; of an object, the dict of its attributes.

    Args:
        package: Objects of this one are gone into, and no others; none if it is empty.
    """
    seen, todo = set[int](), [*values]  # containers may lead back to one another
    while todo:
        value = todo.pop()
        inside = _inside(value, package)
        if inside is None or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is not tuple:
            yield inside
        if type(value) is not set:  # its entries are hashable, so none is a container
            todo.extend(inside.values() if isinstance(inside, dict) else inside)


def _inside(value: Any, package: str) -> Any:
    """Return what a forward may change in a value: a container is that itself; None if it is not gone into."""
    if type(value) in _CONTAINERS or type(value) is tuple:
        return value
    is_own = package and package == _package(value) and not isinstance(value, (nn.Module, Tensor, type))
    return vars(value) if is_own and hasattr(value, "__dict__") else None


def _package(value: object) -> str:
    """Return the package of an object's class; torch's own and ours have none, for a look may set them up."""
    name = type(value).__module__.partition(".")[0]
    return "" if name in ("torch", "builtins", "collections", __package__.partition(".")[0]) else name


def _refill(container: Any, content: Any) -> None:
    """Give a container the content that it had, in the order that it had.

    What did not change is not written: another thread may be reading, and a compiler may guard on it.
    """
    if not container and not content:  # as most are
        return
    if isinstance(container, dict):
        _refill_dict(container, content)
    elif isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
    elif len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
        container.clear()
        container.extend(content)


def _refill_dict(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    """Give a dict the content that it had, in the order that it had."""
    for key in [key for key in container if key not in content]:
        del container[key]
    if list(container) != list(content):  # hooks run in the order in which they lie here
        container.clear()
    for key, value in content.items():
        if key not in container or container[key] is not value:
            container[key] = value
