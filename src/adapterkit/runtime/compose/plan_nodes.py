"""How several adapters change one tensor together: what a composition becomes at a site.

A node takes a `View` and returns the tensor x as its adapters leave it. Nodes are values, made once when a composition is
activated; they hold no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from ...composition.nodes import Composition
from ...composition.rows import fixed_rows, rows_of, sizes_of
from ...errors import CompatibilityError
from ...structure import pytree
from ...structure.tracing.row_layout import RowLayout
from ..site import AdapterSite
from ..steps import AddDelta, AddProjected, AddsToTensor, Step, View, plus
from .batch import check_repeated, check_sizes, indices_per_row, is_of_tokens
from .stacked import run_each

__all__ = ["ByRow", "ByToken", "Chain", "ComposeStep", "Fused", "Leaf", "Mean", "PlanGroup", "PlanNode", "chain"]


class PlanNode:
    """Something that changes a site's tensor.

    Attributes:
        leaves: The adapters' modules in it, in order.
        readers: All steps that read what a `View` holds.
    """

    leaves: tuple[Leaf, ...]
    readers: tuple[AddsToTensor, ...]

    def run(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """The tensor as these adapters leave it. Shape: as `view.x`."""
        return plus(view.x, self.delta(site, host, view))

    def delta(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """What they add. Shape: as `view.x`."""
        return self.run(site, host, view) - view.x


@dataclass(frozen=True)
class Leaf(PlanNode):
    """One module of one adapter.

    Attributes:
        kind: A number for what it has in common with others that differ in their tensors alone.
        undoes: It takes back what its adapter did elsewhere.
    """

    step: AddsToTensor
    kind: int = field(compare=False)
    undoes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", (self,))
        object.__setattr__(self, "readers", (self.step,))

    def delta(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """What the module adds, in the finer of its dtype and the tensor's. Shape: as `view.x`."""
        delta = self.step.delta(site.get_submodule(self.step.key), host, view)
        return delta.to(torch.promote_types(delta.dtype, view.x.dtype))


@dataclass(frozen=True)
class PlanGroup(PlanNode):
    """Base of what is made of other nodes."""

    nodes: tuple[PlanNode, ...]

    def __post_init__(self) -> None:
        # Once, for hooks to read: gathering them anew in each forward would cost as much as a small kernel.
        object.__setattr__(self, "leaves", tuple(leaf for node in self.nodes for leaf in node.leaves))
        object.__setattr__(self, "readers", tuple(step for node in self.nodes for step in node.readers))


@dataclass(frozen=True)
class Chain(PlanGroup):
    """One after the other; () changes nothing."""

    def run(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """What the last leaves. Shape: as `view.x`."""
        for node in self.nodes:
            view = view._replace(x=node.run(site, host, view))
        return view.x


@dataclass(frozen=True)
class Mean(PlanGroup):
    """The weighted sum of what the nodes add. Weights sum to 1."""

    weights: tuple[float, ...]

    def delta(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """The sum. Shape: as `view.x`."""
        pairs = [(node.delta(site, host, view), w) for node, w in zip(self.nodes, self.weights, strict=True) if node.leaves]
        # Not in the dtype of a narrow adapter: on a wider host its delta alone is not rounded once more.
        return reduce(add, [weight * delta.to(torch.promote_types(delta.dtype, view.x.dtype)) for delta, weight in pairs])


@dataclass(frozen=True)
class Fused(PlanGroup):
    """What the nodes add, weighed by a fusion: nothing, where a node has no module.

    Attributes:
        fusion: The step that reads the query.
    """

    fusion: AddDelta

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "readers", (*self.readers, self.fusion))

    def delta(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """The weighted sum. Shape: as `view.x`."""
        module: Any = site.get_submodule(self.fusion.key)
        dtype, axis = module.compute_dtype, self.fusion.spec.axis

        def as_last(tensor: Tensor) -> Tensor:
            return tensor.to(dtype).movedim(axis, -1)

        added = [node.delta(site, host, view) if node.leaves else torch.zeros_like(view.x) for node in self.nodes]
        deltas = torch.stack([as_last(delta) for delta in added], dim=-2)  # (..., children, hidden)
        run = module if module._forward_hooks else module.forward
        delta, _ = run(as_last(self.fusion.read(host, view)), deltas, as_last(view.x))
        return delta.movedim(-1, axis)  # type: ignore[no-any-return]  # a tensor


@dataclass(frozen=True)
class ByToken(PlanGroup):
    """Each node on its part of the sequence. Sizes are of the parts, equal ones if None."""

    sizes: tuple[int, ...] | None
    path: str

    def run(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """The parts, each changed by its node. Shape: as `view.x`."""
        if view.x.dim() != 3:  # rows, tokens, features
            raise CompatibilityError(
                f"Split divides a sequence, and {self.path!r} has a tensor of shape {tuple(view.x.shape)}"
            )
        axis = 1 - view.axis
        if view.per_row > 1 and not is_of_tokens(site.state, view.x.shape[axis]):
            raise CompatibilityError(
                f"Split divides a sequence, and {self.path!r} has a tensor of shape {tuple(view.x.shape)}, in which each "
                f"row of the batch is several indices of axis {view.axis}: windows of it. Exclude this place"
            )
        sizes = sizes_of(self.sizes, len(self.nodes), view.x.shape[axis], f"the sequence at {self.path!r}")
        parts, start = [], 0
        for node, size in zip(self.nodes, sizes, strict=True):
            part = view.narrow(axis, start, size)
            parts.append(node.run(site, host, part) if node.leaves and size else part.x)
            start += size
        return torch.cat(parts, axis)


@dataclass(frozen=True)
class ByRow(PlanGroup):
    """Each row of the batch its own chain of modules, or another node.

    Attributes:
        nodes: What each of `kinds` is at this site.
        kinds: The different compositions that rows run.
        composition: All of it.
        is_parallel: Whether the rows are those of a repeated batch.
        path: The host, for messages.
    """

    kinds: tuple[Composition | None, ...]
    composition: Composition
    path: str
    is_parallel: bool = False

    def assign(self, view: View) -> list[int]:
        """Which node each row has. Raises CompatibilityError: the tensor does not have as many rows."""
        x, axis = view.x, view.axis
        try:
            if x.dim() <= axis or axis == self.leaves[0].step.spec.axis % x.dim():
                raise CompatibilityError(f"it has no rows on axis {axis}")
            rows = rows_of(self.composition, view.row_count)
        except CompatibilityError as error:
            raise CompatibilityError(f"at {self.path!r}, a tensor of shape {tuple(x.shape)}: {error}") from error
        number = {kind: i for i, kind in enumerate(self.kinds)}
        return [number[row] for row in rows]

    def run(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Every row, changed by its node. Shape: as `view.x`.

        Chains go level by level, all rows at once; at each level, modules that differ in their weights alone are one
        stacked computation.
        """
        others = [tensor for tensor in (view.taken, *view.streams.values()) if tensor is not None]
        size = view.x.shape[view.axis : view.axis + 1]
        if any(tensor.shape[view.axis : view.axis + 1] != size for tensor in others):
            shapes = [tuple(tensor.shape) for tensor in others]
            raise CompatibilityError(
                f"{self.composition!r} at {self.path!r} divides the rows of a tensor of shape {tuple(view.x.shape)}, and "
                f"its adapters read tensors of shapes {shapes}: other rows. Name another `residual`, or exclude this place"
            )
        if self.is_parallel:  # first: it says more than that there are no equal parts
            check_repeated(site.state, self.path, view.x, view.axis, view.per_row)
        rows = self.assign(view)
        if not self.is_parallel and view.per_row == 1:
            check_sizes(site.state, self.path, view.x, view.axis)
        used = sorted(set(rows))
        if len(used) == 1:
            node = self.nodes[used[0]]
            return node.run(site, host, view) if node.leaves else view.x
        chains = {i: self.nodes[i].leaves for i in used if _is_chain(self.nodes[i])}
        for level in range(max([0, *(len(leaves) for leaves in chains.values())])):
            here = {i: leaves[level] for i, leaves in chains.items() if len(leaves) > level}
            at = [(row, here[i].step, here[i].kind) for row, i in enumerate(rows) if i in here]
            view = view._replace(x=run_each(site, host, view, at))
        for i in used:
            if i not in chains:
                where = view.indices([row for row, j in enumerate(rows) if j == i])
                changed = self.nodes[i].run(site, host, view.select(where))
                view = view._replace(x=view.put(where, changed))
        return view.x


@dataclass(frozen=True)
class ComposeStep(Step):
    """Run a node on the tensor that all of its modules change.

    Args:
        node: What a composition is at this site.
        layout: How rows lie; None where they are on the axis that has as many as the composition needs.
    """

    node: PlanNode
    adapter: Composition | None
    layout: RowLayout | None

    @property
    def module_keys(self) -> tuple[str, ...]:
        """The modules of all its nodes, the fusions' too."""
        return tuple(reader.key for reader in self.node.readers)

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return `value` with that tensor replaced. Shape: as it was."""
        steps: Sequence[Any] = self.node.readers
        path = steps[0].locate(value, in_call=steps[0].spec.at == "input")
        x: Tensor = pytree.get(value, path)
        if x.is_nested:
            raise CompatibilityError(
                f"several modules at {steps[0].spec.path!r} act on a nested tensor, which they cannot share row by row; "
                "set enable_nested_tensor=False in the nn.TransformerEncoder around it"
            )
        taken = next((step.taken(args, kwargs) for step in steps if isinstance(step, AddProjected)), None)
        streams = {}
        for step in steps:
            stream = step.handover.take() if getattr(step, "handover", None) else None
            if stream is not None:
                streams[step.key] = stream
        axis, per_row = self._row_axis(x), 1
        if self.layout is not None and self.layout.is_flat:
            per_row = indices_per_row(site.state, steps[0].spec.path, x, self.layout, self.adapter)
        return pytree.put(value, path, self.node.run(site, host, View(x, x, taken, streams, axis, per_row)))

    def _row_axis(self, x: Tensor) -> int:
        """The axis of the rows. Raises CompatibilityError: their number does not tell it."""
        if self.layout is not None and self.layout.axis is not None:
            return self.layout.axis
        spec, rows = self.node.readers[0].spec, fixed_rows(self.adapter)
        features = spec.axis % max(1, x.dim())
        found = [axis for axis, size in enumerate(x.shape[:2]) if size == rows and axis != features]
        if len(found) == 1:
            return found[0]
        raise CompatibilityError(
            f"{self.adapter!r} needs {rows} rows, and {spec.path!r} has a tensor of shape {tuple(x.shape)}: its rows may "
            "be on its first axis or, as elsewhere in the model (batch_first=False), on its second, and their number does "
            "not tell which; pad the sequence by a token, or exclude this place"
        )


def chain(nodes: Sequence[PlanNode]) -> PlanNode:
    """The nodes one after the other, those that do nothing left out."""
    kept = tuple(node for node in nodes if node.leaves)
    return kept[0] if len(kept) == 1 else Chain(kept)


def _is_chain(node: PlanNode) -> bool:
    """Whether a node is modules one after the other, and nothing else."""
    return isinstance(node, Leaf) or (isinstance(node, Chain) and all(isinstance(inner, Leaf) for inner in node.nodes))
