"""Remember what a module holds, and put it back: attributes, hooks, children, buffers; not the values of parameters."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["Snapshot"]

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


class Snapshot:
    """The state of a module, without its children's, as it was when this was made.

    Kept are its attributes; what lies in containers among them (hooks, buffers and children, too); the values of buffers;
    and which parameters there are. Two things are not kept: what lies deeper, and which objects the parameters are. A
    sharded module (FSDP) exchanges those in its forward, and keeps book of it elsewhere.

    Of a lazy module only the mode is kept, for the first forward makes it another. Of a scripted one it is the mode and the
    values of buffers: its attributes live in C++.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._training = module.training
        self._attributes: dict[str, Any] = {}
        self._parameters: dict[str, bool] = {}
        is_lazy = isinstance(module, LazyModuleMixin)
        if not is_lazy and not isinstance(module, torch.jit.ScriptModule):
            self._attributes = dict(module.__dict__)
            self._parameters = {name: parameter is not None for name, parameter in module._parameters.items()}
        self._contents = [
            (value, value.copy())
            for name, value in self._attributes.items()
            if type(value) in _CONTAINERS and name != "_parameters"
        ]
        buffers = [] if is_lazy else [b for b in module._buffers.values() if b is not None and not b.is_meta]
        self._values = [(buffer, buffer.detach().clone()) for buffer in buffers]

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
        with torch.no_grad():
            for buffer, value in self._values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


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
