"""How several adapters change one tensor together: what the nodes of a composition become at a site.

A plan node takes a `View` and returns the tensor x as its adapters leave it. Plan nodes are values, made once when a
composition is activated; they hold no tensors.

Each composition node has a plan node here and a function, registered with `plan_of`, that makes it of the children's. What
divides the rows needs neither: `ByRow` runs all of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce, singledispatch
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...composition.nodes import Average, Composition, CompositionNode, Drop, Fuse, Split, Stack, to_json
from ...composition.sizes import sizes_of
from ...errors import CompatibilityError
from ..site import AdapterSite
from ..steps import AddDelta, AddsToTensor, View, plus
from .batch import is_of_tokens
from .site_context import SiteContext

__all__ = ["ByToken", "Chain", "Fused", "Leaf", "Mean", "PlanGroup", "PlanNode", "chain", "plan_of"]


class PlanNode:
    """Something that changes a site's tensor.

    Attributes:
        leaves: The adapters' modules in it, in order. A node without any changes nothing, and is not run.
        readers: All steps that read what a `View` holds.
        is_dividing: Its nodes run on some of the rows or tokens, so that the layout of the tensor must be known.
    """

    is_dividing: ClassVar[bool] = False
    leaves: tuple[Leaf, ...]
    readers: tuple[AddsToTensor, ...]

    # A node defines one of the two, whichever is nearer to it; the other follows.

    def run(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Return the tensor as these adapters leave it. Shape: as `view.x`."""
        return plus(view.x, self.delta(site, host, view))

    def delta(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Return what they add. Shape: as `view.x`."""
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
        # Past the frozen dataclass: these follow from its fields, and are set once.
        object.__setattr__(self, "leaves", (self,))
        object.__setattr__(self, "readers", (self.step,))

    def delta(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Return what the module adds, in the finer of its dtype and the tensor's. Shape: as `view.x`."""
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


@singledispatch
def plan_of(composition: CompositionNode, _nodes: Sequence[PlanNode], _at: SiteContext, _whole: Composition) -> PlanNode:
    """Return what a composition node becomes at a site where its children became these nodes, some of which act.

    Args:
        composition: A node that gives all of its rows the same: what divides them is a `ByRow`.
        _nodes: One for each child.
        _at: The site.
        _whole: All of the composition, for messages.

    Raises:
        CompatibilityError: it cannot act there.
    """
    raise TypeError(
        f"no plan is known of a {type(composition).__name__}: register a function that makes one with @plan_of.register, "
        "beside its plan node in runtime/compose/plan_nodes.py"
    )


@dataclass(frozen=True)
class Chain(PlanGroup):
    """One after the other; () changes nothing."""

    def run(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Return what the last leaves. Shape: as `view.x`."""
        for node in self.nodes:
            view = view._replace(x=node.run(site, host, view))
        return view.x


def chain(nodes: Sequence[PlanNode]) -> PlanNode:
    """Return the nodes one after the other, those that do nothing left out."""
    kept = tuple(node for node in nodes if node.leaves)
    return kept[0] if len(kept) == 1 else Chain(kept)


@plan_of.register(Stack)
@plan_of.register(Drop)  # the layers that it drops are known to the context, where nothing acts in them
def _plan_of_stack(_: Stack | Drop, nodes: Sequence[PlanNode], _at: SiteContext, _whole: Composition) -> PlanNode:
    # At the output embedding invertible adapters are undone, from the last one to the first.
    undoing = [node for node in nodes if node.leaves and all(leaf.undoes for leaf in node.leaves)]
    return chain([*(node for node in nodes if node not in undoing), *reversed(undoing)])


@dataclass(frozen=True)
class Mean(PlanGroup):
    """The weighted sum of what the nodes add. Weights sum to 1."""

    weights: tuple[float, ...]

    def delta(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Return the sum. Shape: as `view.x`."""
        pairs = [(node.delta(site, host, view), w) for node, w in zip(self.nodes, self.weights, strict=True) if node.leaves]
        # Not in the dtype of a narrow adapter: on a wider host its delta alone is not rounded once more.
        return reduce(add, [weight * delta.to(torch.promote_types(delta.dtype, view.x.dtype)) for delta, weight in pairs])


@plan_of.register(Average)
def _plan_of_average(composition: Average, nodes: Sequence[PlanNode], _at: SiteContext, _whole: Composition) -> PlanNode:
    weights = composition.weights or (1.0,) * len(nodes)
    # A child without modules here counts with a delta of 0, so its weight stays in the sum.
    return Mean(tuple(nodes), tuple(weight / sum(weights) for weight in weights))


@dataclass(frozen=True)
class ByToken(PlanGroup):
    """Each node on its part of the sequence. Sizes are of the parts, equal ones if None."""

    is_dividing = True
    sizes: tuple[int, ...] | None
    path: str

    def run(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Return the parts, each changed by its node. Shape: as `view.x`."""
        if view.x.dim() != 3 or view.axis > 1:  # rows, tokens, features
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


@plan_of.register(Split)
def _plan_of_split(composition: Split, nodes: Sequence[PlanNode], at: SiteContext, whole: Composition) -> PlanNode:
    # With features on another axis than the last, as in a convolution, what is added to a token depends on others.
    for leaf in (leaf for node in nodes for leaf in node.leaves):
        if leaf.step.spec.axis != -1:
            raise CompatibilityError(
                f"{whole!r} divides the sequence, and {at.path!r} ({leaf.step.spec.host}) has its features on axis "
                f"{leaf.step.spec.axis}: no sequence of tokens"
            )
    return ByToken(tuple(nodes), composition.sizes, at.path)


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
        """Return the weighted sum. Shape: as `view.x`."""
        module: Any = site.get_submodule(self.fusion.key)
        dtype, axis = module.compute_dtype, self.fusion.spec.axis

        def as_last(tensor: Tensor) -> Tensor:
            return tensor.to(dtype).movedim(axis, -1)

        # A child without a module here adds 0, and has its place in the attention all the same.
        added = [node.delta(site, host, view) if node.leaves else torch.zeros_like(view.x) for node in self.nodes]
        deltas = torch.stack([as_last(delta) for delta in added], dim=-2)  # (..., children, hidden)
        # Straight to forward where nobody's hook listens, as `AddDelta` does: it spares the cost of a small kernel.
        run = module if module._forward_hooks else module.forward
        delta, _ = run(as_last(self.fusion.read(host, view)), deltas, as_last(view.x))
        return delta.movedim(-1, axis)  # type: ignore[no-any-return]  # a tensor


@plan_of.register(Fuse)
def _plan_of_fuse(composition: Fuse, nodes: Sequence[PlanNode], at: SiteContext, whole: Composition) -> PlanNode:
    entry = next(iter(at.entries(composition.fusion)), None)
    trained: Any = () if entry is None else getattr(entry.config, "children", ())
    others = [child for child in map(to_json, composition.children) if child not in trained]
    if entry is None or others:
        raise CompatibilityError(
            f"no fusion {composition.fusion!r} weighs {others or list(composition.children)} at {at.path!r}; "
            f"kit.add_fusion({composition!r}) makes one, to be trained"
        )
    return Fused(tuple(nodes), AddDelta(entry.key, whole, entry.spec, entry.handover))
