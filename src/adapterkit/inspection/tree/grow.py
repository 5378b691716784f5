"""Make the tree of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...composition.nodes import names_in
from ...errors import CompatibilityError
from ...runtime.lookup import find_state
from ...runtime.site import AdapterSite, SiteEntry
from ...runtime.state import ACTIVATION_LOCK, without_adapters
from ...structure import pytree
from ...structure.anatomy.discover import Discovery
from ...structure.base_tensors import base_parameters
from ...structure.hosts import channel_axis, is_called, known_shape
from ...structure.paths import SITE, modules_by_path
from ...structure.tracing.forward import ExampleInputs, observe
from ..summary import summarise
from .fold import cut, folded
from .meaning import Meaning, meanings
from .nodes import Mark, TreeNode
from .tree import Tree

__all__ = ["tree_of"]

_PARAMETRISED = "parametrizations"


def tree_of(model: nn.Module, example_inputs: ExampleInputs | None = None, *, depth: int | None = None) -> Tree:
    """Return the tree of a model, which is traced for roles and widths. If it cannot be traced, the tree says why.

    Args:
        model: Any module, on any device, on `meta` too.
        example_inputs: Inputs that it runs on; tiny ones are made if there are none.
        depth: Levels to show below the root; all if None.
    """
    look = _look(model, example_inputs)
    root = _Grower(model, look).root()
    state = find_state(model)
    rows = summarise(model, state).adapters if state is not None else ()
    return Tree(cut(root, depth), rows, look.note, look.unknown)


@dataclass(frozen=True)
class _Look:
    """What a trace showed: what modules are, their (input, output) widths, what went wrong, what is not understood."""

    meanings: dict[str, Meaning]
    widths: dict[str, tuple[int | None, int | None]]
    note: str | None
    unknown: tuple[str, ...] = ()


def _look(model: nn.Module, example_inputs: ExampleInputs | None) -> _Look:
    """Trace the model without its adapters, and return what it showed, or why it cannot be traced."""
    discovery = Discovery(model, example_inputs)
    try:
        # The tree is of the base: adapters would change what the trace sees. The lock keeps activation as it is meanwhile.
        with ACTIVATION_LOCK, without_adapters():
            found = meanings(discovery.anatomy)
            widths = _widths(model, discovery.inputs)
    except CompatibilityError as error:
        return _Look({}, {}, f"roles unknown: {' '.join(str(error).split())}")
    note = None if found else "no roles: a trace shows no sub-layers that are added to a stream"
    unknown = tuple(f"{one.path} runs {one.operation}: {one.reason}" for one in discovery.anatomy.unknown)
    return _Look(found, widths, note, unknown)


def _widths(model: nn.Module, inputs: ExampleInputs) -> dict[str, tuple[int | None, int | None]]:
    """Map each module that runs on the inputs to its (input, output) widths."""

    def look(_path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[int | None, int | None]:
        return _features(module, (args, kwargs)), _features(module, output)

    paths = [path for path, module in model.named_modules() if SITE not in path.split(".")]
    # The first call speaks for all.
    return {path: calls[0] for path, calls in observe(model, inputs, paths, look).items() if calls}


def _features(module: nn.Module, value: Any) -> int | None:
    """Return the features of the first floating-point tensor in a value that a module took or returned; None if unknown."""
    path = pytree.find(value)
    tensor = None if path is None else pytree.get(value, path)
    if not isinstance(tensor, Tensor) or not tensor.dim():
        return None
    axis = channel_axis(module, tuple(tensor.shape))
    return None if axis is None else tensor.shape[axis]


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter; () while it has none, before a lazy module first runs."""
    return () if is_lazy(parameter) else tuple(parameter.shape)


class _Grower:
    """Grows the nodes of a model, each module once: under the first of its names."""

    def __init__(self, model: nn.Module, look: _Look) -> None:
        self.model, self.look = model, look
        # A tied Parameter is named once here, by its first name: its first holder owns it.
        self.owners = {id(parameter): name for name, parameter in base_parameters(model)}
        self.modules = modules_by_path(model)
        self.first: dict[int, str] = {}
        for path, module in self.modules.items():
            self.first.setdefault(id(module), path)
        state = find_state(model)
        self.active = set(names_in(state.activation.active)) if state is not None else set()

    def root(self) -> TreeNode:
        """Return the node of the whole model."""
        return self._node(type(self.model).__name__, "", self.model)

    def _node(self, label: str, path: str, module: nn.Module) -> TreeNode:
        """Return the node of a module, and of all that is in it."""
        own = list(self._own_parameters(module))
        counted = self._counted(path, own)
        # A module under a second name: what is in it was shown, and counted, under the first.
        # One without Parameters, such as a shared activation, is not called tied: that would earn it a line of its own.
        is_again = self.first[id(module)] != path and any(True for _ in module.parameters())
        children = () if is_again else folded(self._children(path, module))
        meaning = self.look.meanings.get(path, Meaning())
        input_width, width = self._width(path, module)
        return TreeNode(
            label=label,
            type=type(module).__name__,
            paths=(path,),
            roles=meaning.roles,
            notes=meaning.notes,
            width=width,
            input_width=input_width,
            shapes=tuple((name, _shape(p), str(p.dtype).removeprefix("torch.")) for name, p in own),
            # A child may stand for several modules (`count`), and its numbers are those of one.
            parameters=sum(p.numel() for p in counted) + sum(c.count * c.parameters for c in children),
            size_bytes=sum(p.numel() * p.element_size() for p in counted) + sum(c.count * c.size_bytes for c in children),
            trainable=sum(p.numel() for p in counted if p.requires_grad) + sum(c.count * c.trainable for c in children),
            tied_to=self.first[id(module)] if is_again else self._owner(path, [p for _, p in own]),
            adapters=tuple(self._adapters(module)),
            children=children,
        )

    def _counted(self, path: str, own: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
        """Return those of a module's own parameters that count here: a tied one counts where it comes first."""
        first = (p for name, p in own if self.owners.get(id(p)) == f"{path}.{name}".lstrip("."))
        return [p for p in first if not is_lazy(p)]

    def _children(self, path: str, module: nn.Module, prefix: str = "") -> Iterator[TreeNode]:
        """Yield the nodes in a module that are worth a line; in place of a list of modules, which never runs, its own."""
        for name, child in module._modules.items():
            inner = f"{path}.{name}".lstrip(".")
            # What adapters and parametrisations hold are no modules of the user's. None is a child that was assigned None.
            if child is None or name in (SITE, _PARAMETRISED):
                continue
            is_list = not is_called(child) and not child._parameters  # one with Parameters of its own is worth a line
            if is_list and self.first[id(child)] == inner:
                yield from self._children(inner, child, f"{prefix}{name}.")
                continue
            node = self._node(f"{prefix}{name}", inner, child)
            if node.is_shown:
                yield node

    def _own_parameters(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield a module's own parameters with their names. In place of one that is computed come those it is made of."""
        yield from ((name, p) for name, p in module._parameters.items() if p is not None)
        if _PARAMETRISED in module._modules:
            yield from module.get_submodule(_PARAMETRISED).named_parameters(prefix=_PARAMETRISED)

    def _owner(self, path: str, own: Iterable[nn.Parameter]) -> str | None:
        """Return the path of the module that owns the largest of a module's parameters; None if it does so itself."""
        # The largest speaks for all: an output embedding with a tied weight and a bias of its own is tied.
        largest = max((p for p in own if not is_lazy(p)), key=lambda p: p.numel(), default=None)
        owner = path if largest is None else self.owners.get(id(largest), path).rpartition(".")[0]
        # torch keeps the Parameters of a parametrised weight in a child module, which gets no node.
        inside = owner == path or owner.startswith(f"{path}.{_PARAMETRISED}".lstrip("."))
        return None if largest is None or inside else owner

    def _width(self, path: str, module: nn.Module) -> tuple[int | None, int | None]:
        """Return the (input, output) widths of a module: as its type tells, else as the trace shows."""
        known = known_shape(module)
        return self.look.widths.get(path, (None, None)) if known is None else (known.input_width, known.width)

    def _adapters(self, module: nn.Module) -> Iterator[Mark]:
        """Yield a mark for each module of an adapter at this one."""
        site = module._modules[SITE] if SITE in module._modules else None  # noqa: SIM401  # TorchScript's has no get
        for name, entries in site.entries.items() if isinstance(site, AdapterSite) else ():
            for entry in entries:
                yield Mark(name, entry.spec.at if isinstance(entry, SiteEntry) else "head", name in self.active)
