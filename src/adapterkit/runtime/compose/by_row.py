"""Rows of one batch that run different adapters: the plan node of all compositions that divide or repeat the batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...composition.nodes import Composition
from ...composition.rows import rows_of
from ...errors import CompatibilityError
from ..site import AdapterSite
from ..steps import View
from .batch import check_repeated, check_sizes
from .plan_nodes import Chain, Leaf, PlanGroup, PlanNode
from .stacked import run_each

__all__ = ["ByRow"]


@dataclass(frozen=True)
class ByRow(PlanGroup):
    """Each row of the batch its own chain of modules, or another node.

    Attributes:
        nodes: What each of `kinds` is at this site.
        kinds: The different compositions that rows run.
        composition: All of it.
        path: The host, for messages.
        is_parallel: Whether the rows are those of a repeated batch.
    """

    is_dividing = True
    kinds: tuple[Composition | None, ...]
    composition: Composition
    path: str
    is_parallel: bool = False

    def run(self, site: AdapterSite, host: nn.Module, view: View) -> Tensor:
        """Return every row, changed by its node. Shape: as `view.x`."""
        rows = self._rows_seen(site, view)
        used = sorted(set(rows))
        # One node for the whole batch: no rows need be gathered and put back.
        if len(used) == 1:
            node = self.nodes[used[0]]
            return node.run(site, host, view) if node.leaves else view.x
        # All chains first, together. What is left, such as a mean or a fusion, cannot be stacked, and runs node by node.
        view = self._run_chains(site, host, view, rows)
        for i in used:
            if not _is_chain(self.nodes[i]):
                where = view.indices([row for row, j in enumerate(rows) if j == i])
                changed = self.nodes[i].run(site, host, view.select(where))
                view = view._replace(x=view.put(where, changed))
        return view.x

    def assign(self, view: View) -> list[int]:
        """Return the index in `nodes` of each row's node.

        Raises:
            CompatibilityError: the tensor does not have as many rows.
        """
        x, axis = view.x, view.axis
        try:
            if x.dim() <= axis or axis == self.leaves[0].step.spec.axis % x.dim():
                raise CompatibilityError(f"it has no rows on axis {axis}")
            rows = rows_of(self.composition, view.row_count)
        except CompatibilityError as error:
            raise CompatibilityError(f"at {self.path!r}, a tensor of shape {tuple(x.shape)}: {error}") from error
        number = {kind: i for i, kind in enumerate(self.kinds)}
        return [number[row] for row in rows]

    def _rows_seen(self, site: AdapterSite, view: View) -> list[int]:
        """`assign`, once it is seen that the rows of all tensors here are those of the batch. Raises CompatibilityError."""
        others = [tensor for tensor in (view.taken, *view.streams.values()) if tensor is not None]
        size = view.x.shape[view.axis : view.axis + 1]
        if any(tensor.shape[view.axis : view.axis + 1] != size for tensor in others):
            shapes = [tuple(tensor.shape) for tensor in others]
            raise CompatibilityError(
                f"{self.composition!r} at {self.path!r} divides the rows of a tensor of shape {tuple(view.x.shape)}, and "
                f"its adapters read tensors of shapes {shapes}: other rows. Name another `residual`, or exclude this place"
            )
        if self.is_parallel:  # before `assign`: it says more than that there are no equal parts
            check_repeated(site.state, self.path, view.x, view.axis, view.per_row)
        rows = self.assign(view)
        if not self.is_parallel and view.per_row == 1:
            check_sizes(site.state, self.path, view.x, view.axis)
        return rows

    def _run_chains(self, site: AdapterSite, host: nn.Module, view: View, rows: list[int]) -> View:
        """Run the rows whose node is modules one after the other, and return the view with these rows changed.

        It goes level by level, all rows at once. At each level, modules that differ in their tensors alone are one stacked
        computation: many adapters cost about as much as one.
        """
        chains = {i: self.nodes[i].leaves for i in sorted(set(rows)) if _is_chain(self.nodes[i])}
        for level in range(max([0, *(len(leaves) for leaves in chains.values())])):
            here = {i: leaves[level] for i, leaves in chains.items() if len(leaves) > level}
            at = [(row, here[i].step, here[i].kind) for row, i in enumerate(rows) if i in here]
            view = view._replace(x=run_each(site, host, view, at))
        return view


def _is_chain(node: PlanNode) -> bool:
    """Tell whether a node is modules one after the other, and nothing else."""
    return isinstance(node, Leaf) or (isinstance(node, Chain) and all(isinstance(inner, Leaf) for inner in node.nodes))
