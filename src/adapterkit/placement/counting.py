"""Count the blocks around a module as a user would: 0, 1, 2, … through all stages, in the order in which they run.

Where one list alone holds a module, the list counts. Where lists lie in lists (stages that hold blocks, blocks that hold
experts), names do not tell which of them are blocks, and a trace does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import nn

from ..errors import CompatibilityError, TargetError
from ..structure.anatomy.blocks import within
from ..structure.anatomy.discover import Discovery
from ..structure.tracing.forward import ExampleInputs
from .layers import Layer, stack_of

__all__ = ["Counting"]


class Counting:
    """Tells which block of its stack a module lies in.

    Args:
        modules: The model's modules by path.
        is_asked: Whether the config speaks of layers: then a module whose block cannot be known is an error.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], example_inputs: ExampleInputs | None, *, is_asked: bool
    ) -> None:
        # A discovery of its own: who asks for sites is not to run the model because lists lie in lists.
        self._modules, self._is_asked, self._discovery = modules, is_asked, Discovery(model, example_inputs)

    def layer_of(self, path: str) -> Layer | None:
        """Return (index, count) of the block that holds a module; None if none does, or if that cannot be known.

        Raises:
            TargetError: it cannot be known, and the config asks for it.
        """
        found = stack_of(path, self._modules)
        if found is not None and not self._is_nested(path, found[0]):
            return found[1:]
        if found is None and not self._is_asked:
            return None
        try:
            blocks = self._blocks
        except CompatibilityError as error:
            if not self._is_asked:
                return None
            raise TargetError(
                f"which layer {path!r} lies in is told neither by one list of blocks around it nor by a trace, for the "
                f"model does not run: {error}. Wrap it with example inputs: ak.wrap(model, example_inputs=batch)"
            ) from error
        around = [block for block in blocks if within(path, block)]
        return blocks[max(around, key=len)] if around else found and found[1:]

    def _is_nested(self, path: str, stack: str) -> bool:
        """Tell whether a module lies in several lists whose items are of one class, and hold modules of their own."""
        parts = path.split(".")
        around = [".".join(parts[:n]) for n in range(len(parts))]
        return any(other != stack and self._is_stack(self._modules[other]) for other in around)

    def _is_stack(self, module: nn.Module) -> bool:
        """Tell whether a module is a list that may be one of blocks, or of stages."""
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            return False
        holding = [type(item) for item in module.children() if any(True for _ in item.children())]
        return bool(holding) and (len({*holding}) == 1 and (len(holding) > 1 or len(module) == 1))

    @cached_property
    def _blocks(self) -> dict[str, Layer]:
        """Map what holds a block → its index in its stack, and the stack's count."""
        found: dict[str, Layer] = {}
        anatomy = self._discovery.anatomy
        for stack in anatomy.stacks:
            whole = self._with_idle(stack, anatomy.idle)
            found |= {path: (index, len(whole)) for index, paths in enumerate(whole) for path in paths}
        return found

    def _with_idle(self, stack: tuple[tuple[str, ...], ...], idle: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return a stack with the blocks beside its own that did not run: they count, too."""
        whole = list(stack)
        for path in idle:
            holder, _, name = path.rpartition(".")
            names = list(self._modules[holder]._modules)
            before = {f"{holder}.{other}".lstrip(".") for other in names[: names.index(name)]}
            beside = [n for n, paths in enumerate(whole) if paths[0].rpartition(".")[0] == holder]
            if beside:
                whole.insert(max((n + 1 for n in beside if whole[n][0] in before), default=beside[0]), (path,))
        return whole
