"""Record one forward as a graph: every tensor operation, and which module call took and returned which tensor.

For `y = x + linear(x)` with two Parameters the graph has these nodes, in the order in which they came about:

    0 parameter (weight)   1 parameter (bias)   2 input (x)   3 addmm, reads 1 2 0   4 add, reads 2 3

A node is one tensor, and the operation that made it; everything else here speaks of nodes by their numbers. What a node
reads has a smaller number than the node itself, so going through the numbers is going through the forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import pytree
from ..hosts import product_names
from ..paths import modules_by_path
from .forward import ExampleInputs, forward
from .tensors import memory_of, shape_of, storage_of

__all__ = ["ADDITIONS", "Graph", "ModuleCall", "Operation", "record_graph"]

ADDITIONS = ("add", "add_", "addcmul", "addcmul_")
_TORCHS = ("aten", "prims", "prim")  # the namespaces of torch's own operators


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
        path: The module's first name in the model; None for one that the model does not hold.
        parent: The call that it was made in; None for the model's own.
        inputs: Each tensor among its arguments: where it lies in `(args, kwargs)`, and its node.
        outputs: Each tensor that it returned: where it lies in the output, and its node.
        start: The number of nodes before it: nodes from `start` up to `end` were made inside.
        end: The number of nodes when it returned; None if it did not return.
    """

    path: str | None
    module: nn.Module
    parent: ModuleCall | None
    start: int
    inputs: list[tuple[pytree.Path, int]]
    outputs: list[tuple[pytree.Path, int]] = field(default_factory=list)
    end: int | None = None

    def around(self) -> Iterator[ModuleCall]:
        """Yield this call and those that it was made in, innermost first."""
        call: ModuleCall | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(eq=False)
class Operation:
    """One tensor operation, or a tensor that came from outside (`op` is "parameter" or "input").

    Attributes:
        op: Its name, such as "addmm"; with its namespace if it is not torch's ("mylib::gelu"), but "linear" for every
            product that a package's `HostType` names; "item" for one of the tensors that an operation returned as a list
            (`chunk`), its place in `numbers`.
        inputs: The nodes that it reads, in the order of its arguments; after them, nodes that have since written in place
            into memory that an argument shares (`x[:, 0] = y` changes x, which later operations read as the same tensor).
        numbers: The integers among its arguments, such as the axes of a permutation.
        call: The innermost module call that it ran in.
        operation: The operation and its arguments, as `(function, args, kwargs)`; None for what came from outside.
        taken: The tensors among its arguments: those of the first `len(taken)` nodes in `inputs`.
        made: The tensors that it returned, or the one that came from outside.
        addends: For an addition or a stack, copies of its operands, where `keep_addends` asked for them.
    """

    index: int
    op: str
    inputs: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    is_floating: bool = False
    numbers: tuple[int, ...] = ()
    call: ModuleCall | None = None
    operation: tuple[Callable[..., Any], Any, Any] | None = None
    taken: tuple[Tensor, ...] = ()
    made: tuple[Tensor, ...] = ()
    addends: tuple[Tensor, ...] = ()

    @property
    def is_torchs(self) -> bool:
        """Tell whether torch itself, or the `HostType` of a package, says what it does."""
        return "::" not in self.op


class Graph:
    """What one forward did: its nodes in order, and its module calls in the order in which they began."""

    def __init__(self) -> None:
        self.nodes: list[Operation] = []
        self.calls: list[ModuleCall] = []

    def __repr__(self) -> str:
        return f"Graph({len(self.nodes)} nodes, {len(self.calls)} calls)"


def record_graph(model: nn.Module, inputs: ExampleInputs, *, keep_addends: bool = False) -> Graph:
    """Run the model once, in eval mode and without gradients, and return what it did. The model is as before afterwards.

    Args:
        keep_addends: Copy the operands of additions, for the ε-test.

    Raises:
        CompatibilityError: the model does not run on these inputs.
        ConfigError: it runs operators of a package, and packages that may name them as products cannot be loaded.
    """
    recorder = _Recorder(model, keep_addends=keep_addends)
    handles = []
    for module in set(model.modules()):
        if isinstance(module, torch.jit.ScriptModule):  # calls no Python hooks
            continue
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
    try:
        forward(model, inputs, within=recorder)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.graph


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Builds the graph as operations go by.

    Tensors are told apart by `id`. That is safe only because nodes keep every tensor alive: the `id` of one that was freed
    could come back as another's.
    """

    def __init__(self, model: nn.Module, *, keep_addends: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.graph = Graph()
        self._keep_addends = keep_addends
        self._thread = threading.get_ident()  # operations are this thread's alone; hooks see those of all
        self._node_of: dict[int, int] = {}  # id of a tensor -> its node
        self._shown: dict[Hashable, Tensor] = {}  # memory -> the last tensor of a node that showed it
        self._others: list[Tensor] = []  # objects that show the memory of one, kept alive for their `id`
        self._written: dict[int, int] = {}  # storage -> the last node that wrote into it in place
        self._stack: list[ModuleCall] = []  # the calls that run now, innermost last
        self._paths: dict[int, str] = {}  # id of a module -> its first path
        for path, module in modules_by_path(model).items():
            self._paths.setdefault(id(module), path)
        for tensor in (*model.parameters(), *model.buffers()):
            self._add(Operation(len(self.graph.nodes), "parameter"), tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode torch shows composite operations (`conv2d`, `type_as`) whole: elsewhere, what they are made of.
        if torch.is_inference_mode_enabled() and isinstance(func, torch._ops.OpOverload):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        node = self._reading(func, args, kwargs)
        out = func(*args, **kwargs)
        self._add(node, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        if isinstance(out, (list, tuple)) and _returns_list(func):
            self._add_items(node, out)
        self._note_writes(node, func, args)
        return out

    def _add_items(self, node: Operation, tensors: Sequence[Tensor]) -> None:
        """Append a node for each tensor of a list: the halves of a `chunk` may be two streams."""
        for at, tensor in enumerate(tensors):
            self._add(Operation(len(self.graph.nodes), "item", (node.index,), numbers=(at,), call=node.call), tensor)

    def _reading(self, func: Any, args: Any, kwargs: Any) -> Operation:
        """Return the node of an operation that is about to run, with all that it reads."""
        leaves = tree_leaves((args, kwargs))
        name = "alias" if _changes_nothing(func, args, kwargs) else _name_of(func)
        if any(isinstance(leaf, Tensor) and id(leaf) not in self._node_of for leaf in leaves):
            args, kwargs = self._as_known((args, kwargs))
            leaves = tree_leaves((args, kwargs))
        taken = [] if _makes_like(name) else [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        reads = [self._index(tensor) for tensor in taken]
        written = {self._written[s] for s in map(storage_of, taken) if s in self._written}
        # Copied before it runs: an addition in place changes one of its operands.
        is_kept = self._keep_addends and name in (*ADDITIONS, "stack")
        return Operation(
            len(self.graph.nodes),
            name,
            (*reads, *sorted(written.difference(reads))),
            numbers=tuple(leaf for leaf in leaves if type(leaf) is int),
            call=self._stack[-1] if self._stack else None,
            operation=(func, args, kwargs),
            taken=tuple(taken),
            addends=tuple(t.detach().clone() for t in taken) if is_kept else (),
        )

    def _note_writes(self, node: Operation, func: Any, args: Any) -> None:
        """Have the arguments that an operation changed in place stand for its node from now on, and their memory, too.

        One that returns nothing (`silu_and_mul(out, x)`) made what it wrote.
        """
        for argument, schema in zip(args, func._schema.arguments, strict=False):
            if isinstance(argument, Tensor) and schema.alias_info is not None and schema.alias_info.is_write:
                self._written[storage_of(argument)] = node.index
                self._point(argument, node.index)
                if not func._schema.returns:
                    node.made = (*node.made, argument)
                    node.shape, node.is_floating = tuple(node.made[0].shape), node.made[0].is_floating_point()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module is called."""
        if threading.get_ident() != self._thread:
            return
        parent = self._stack[-1] if self._stack else None
        start = len(self.graph.nodes)
        inputs = [(path, self._index(tensor)) for path, tensor in pytree.tensors((args, kwargs))]
        call = ModuleCall(self._paths.get(id(module)), module, parent, start, inputs)
        self._stack.append(call)
        self.graph.calls.append(call)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note that a module returned, and what."""
        if threading.get_ident() != self._thread:
            return
        # Calls inside it that are still open raised, and the model caught that: they returned nothing.
        while self._stack and self._stack[-1].module is not module:
            self._stack.pop()
        if self._stack:
            call = self._stack.pop()
            call.outputs = [(path, self._index(tensor)) for path, tensor in pytree.tensors(output)]
            call.end = len(self.graph.nodes)

    def _add(self, node: Operation, *tensors: Tensor) -> None:
        """Append a node that made these tensors. An operation without any (a check, say) has a node, too."""
        if tensors:
            # Of several tensors the first stands for all: the others are means, indices and the like. Lists have items.
            node.shape, node.is_floating = shape_of(tensors[0]), tensors[0].is_floating_point()
        node.made = tensors
        self.graph.nodes.append(node)
        for tensor in tensors:
            self._point(tensor, node.index)

    def _point(self, tensor: Tensor, index: int) -> None:
        """Have a tensor stand for a node, whatever it stood for before."""
        self._node_of[id(tensor)] = index
        memory = memory_of(tensor)
        if memory is not None:
            self._shown[memory] = tensor

    def _index(self, tensor: Tensor) -> int:
        """Return the tensor's node; a new one if it came from outside."""
        if id(tensor) not in self._node_of:
            known = self._shown.get(memory_of(tensor))
            if known is None:
                self._add(Operation(len(self.graph.nodes), "input"), tensor)
            else:
                self._others.append(tensor)
                self._node_of[id(tensor)] = self._node_of[id(known)]
        return self._node_of[id(tensor)]

    def _as_known(self, value: Any) -> Any:
        """Return arguments in which a tensor of a node stands in the place of another object that shows its memory."""

        def known(leaf: Any) -> Any:
            is_new = isinstance(leaf, Tensor) and id(leaf) not in self._node_of
            return self._shown.get(memory_of(leaf), leaf) if is_new else leaf

        return tree_map(known, value)


def _name_of(func: Any) -> str:
    """Return the name of an operator: torch's without namespace, "linear" if a package says that it is such a product."""
    full = str(func._schema.name)
    namespace, _, name = full.partition("::")
    if namespace in _TORCHS:
        return name
    # One name for all products: what asks for matrix products further on need not know whose they are. Any other keeps its
    # namespace, for another package's `silu` need not do what torch's does.
    return "linear" if full in product_names() else full


def _changes_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether an operation multiplies or divides by 1, as models do by a setting."""
    is_scale = _name_of(func) in ("mul", "div") and not kwargs
    return is_scale and type(args[1]) in (int, float) and args[1] == 1


def _returns_list(func: Any) -> bool:
    """Tell whether an operator returns one list of tensors, as `split` does, and not several values of their own kinds."""
    returns = func._schema.returns
    return len(returns) == 1 and str(returns[0].type) == "List[Tensor]"


def _makes_like(op: str) -> bool:
    """Tell whether an operation makes a tensor that has no more of another than its shape: it does not read that."""
    return op.endswith("_like") or op.startswith("new_")
