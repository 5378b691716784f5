"""See which Parameters a model reads around the modules that hold them.

`nn.MultiheadAttention` computes with `self.out_proj.weight`, and never calls `out_proj`. A tied output embedding may read
the weight of an `nn.Embedding`. An adapter at the module that holds such a weight would do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .forward import ExampleInputs, forward

__all__ = ["CallStack", "Holder", "reads_around"]

# Functions that look at a tensor's kind, not at its values.
_KIND_ONLY = frozenset(
    f"{what}_{how}" for what in ("zeros", "ones", "empty", "full", "rand", "randn", "randint") for how in ("like",)
) | {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "type_as", "view_as", "expand_as", "reshape_as"}

# The modules that run, each with its path, from the model to the innermost.
CallStack = tuple[tuple[str, nn.Module], ...]


@dataclass(frozen=True)
class Holder:
    """A module that holds a Parameter.

    Attributes:
        owner: The module.
        leaf: The Parameter's name in it.
        host: The module that carries the adapter: a read while it runs is as it should be.
    """

    owner: nn.Module
    leaf: str
    host: nn.Module


class _Reads(TorchFunctionMode):
    """Notes who computes with certain Parameters while none of the hosts runs that adapt them.

    Attributes:
        watched: Maps the `id` of each watched tensor to the numbers of the holders that it may have been read at.
        found: For each holder, the stacks of modules that ran at such a read.
    """

    def __init__(self, holders: Sequence[Holder], running: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self._holders, self._running = holders, running
        self.watched: dict[int, list[int]] = {}
        self.found: list[list[CallStack]] = [[] for _ in holders]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, having looked at what it is given. Shape: any."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        # The second argument of `x.to(other)` lends its dtype alone.
        values = args[:1] if name == "to" else (*args, *(kwargs or {}).values())
        if next(_tensors([result]), None) is not None and name not in _KIND_ONLY:
            for tensor in _tensors(values):
                if tensor is not result:  # a cast to the dtype that it has returns it: who goes on to use it is seen then
                    self._note(self.watched.get(id(tensor), ()))
        return result

    def _note(self, read_at: Sequence[int]) -> None:
        """Keep what runs now for these holders, unless the host of one of them is among it."""
        running = {id(module) for _, module in self._running}
        if any(id(self._holders[index].host) in running for index in read_at):
            return
        stack = tuple(self._running)
        for index in read_at:
            if stack not in self.found[index]:
                self.found[index].append(stack)


def reads_around(model: nn.Module, holders: Sequence[Holder], inputs: ExampleInputs) -> list[list[CallStack]]:
    """Run the model, and list for each holder what ran, each time that its Parameter was read while its host did not.

    Call it while no adapter runs: what adapters compute with their hosts' Parameters would count as reads.

    Raises:
        CompatibilityError: the model does not run on the inputs.
    """
    running: list[tuple[str, nn.Module]] = []
    reads = _Reads(holders, running)
    with ExitStack() as stack:
        for path, module in list(model.named_modules()):
            if isinstance(module, torch.jit.ScriptModule):  # calls no hooks
                continue

            def enter(module: nn.Module, _args: Any, path: str = path) -> None:
                running.append((path, module))

            def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
                running.pop()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        forward(model, inputs, within=_watching(reads, holders))
    return reads.found


@contextmanager
def _watching(reads: _Reads, holders: Sequence[Holder]) -> Iterator[None]:
    """Watch the Parameters of the holders within the block.

    A tied Parameter is one tensor in several holders, and a read of it would not tell where. So within the block each of
    its holders gives out a Parameter of its own, of the same memory.
    """
    holding: dict[int, dict[tuple[nn.Module, str], list[int]]] = {}
    for index, holder in enumerate(holders):
        parameter = holder.owner._parameters[holder.leaf]
        reads.watched.setdefault(id(parameter), []).append(index)
        holding.setdefault(id(parameter), {}).setdefault((holder.owner, holder.leaf), []).append(index)
    aliases: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for (owner, leaf), indices in [pair for held in holding.values() if len(held) > 1 for pair in held.items()]:
            parameter = owner._parameters[leaf]
            is_plain = type(parameter) is nn.Parameter and not parameter.is_inference()
            if parameter is not None and is_plain and leaf not in owner.__dict__:
                alias = nn.Parameter(parameter.detach(), parameter.requires_grad)
                aliases.append((owner, leaf, alias))
                reads.watched[id(alias)] = indices
                # An attribute of the object comes before `nn.Module.__getattr__`, which looks into `_parameters`.
                owner.__dict__[leaf] = alias
        with reads:
            yield
    finally:
        for owner, leaf, _ in aliases:
            owner.__dict__.pop(leaf, None)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
