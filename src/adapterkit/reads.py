"""Which Parameters a model reads around the modules that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .patterns import modules_by_path
from .record import silenced
from .structure.trace import ExampleInputs, forward

__all__ = ["reads_around"]

# Functions that look at a tensor's kind, not at its values.
_KIND_ONLY = frozenset(
    f"{what}_{how}" for what in ("zeros", "ones", "empty", "full", "rand", "randn", "randint") for how in ("like",)
) | {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "type_as", "view_as", "expand_as", "reshape_as"}


class _Reads(TorchFunctionMode):
    """Notes who computes with certain Parameters while the module that holds them does not run."""

    def __init__(self, hosts: Mapping[int, nn.Module], running: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self._hosts, self._running = hosts, running
        self.found: dict[int, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, having looked at what it is given. Shape: any."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        values = args[:1] if name == "to" else (*args, *(kwargs or {}).values())
        if next(_tensors([result]), None) is not None and name not in _KIND_ONLY:
            for tensor in _tensors(values):
                host = self._hosts.get(id(tensor))
                if tensor is result:  # of a cast to the dtype that it has: who goes on to use it is seen then
                    continue
                if host is not None and not any(module is host for _, module in self._running):
                    self.found.setdefault(id(tensor), self._running[-1][0] if self._running else "")
        return result


def reads_around(model: nn.Module, hosts: Mapping[int, nn.Module], inputs: ExampleInputs) -> dict[int, str]:
    """Of Parameters (by `id`, each with its host) those that the model reads while the host does not run, and where.

    Raises:
        CompatibilityError: the model does not run on the inputs.
    """
    running: list[tuple[str, nn.Module]] = []
    modules = {id(module): (path, module) for path, module in modules_by_path(model).items()}.values()
    with ExitStack() as stack, silenced():
        for path, module in modules:
            if isinstance(module, torch.jit.ScriptModule):  # calls no hooks
                continue

            def enter(module: nn.Module, _args: Any, path: str = path) -> None:
                running.append((path, module))

            def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
                running.pop()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        reads = _Reads(hosts, running)
        forward(model, inputs, within=reads)
    return reads.found


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
