"""The step that runs a plan node on the tensor that several adapters of one site change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...composition.nodes import Composition
from ...errors import CompatibilityError
from ...structure import pytree
from ...structure.tracing.row_layout import RowLayout
from ..site import AdapterSite
from ..steps import AddProjected, Step, View
from .batch import indices_per_row
from .plan_nodes import PlanNode

__all__ = ["ComposeStep"]


@dataclass(frozen=True)
class ComposeStep(Step):
    """Run a node on the tensor that all of its modules change.

    Args:
        node: What a composition is at this site.
        adapter: The active composition.
        layout: How rows lie; None where the node does not divide them.
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
        # The first speaks for all: `_check_one_tensor` refused modules that change different tensors.
        path = steps[0].locate(value, in_call=steps[0].spec.at == "input")
        x: Tensor = pytree.get(value, path)
        if x.is_nested:
            raise CompatibilityError(
                f"several modules at {steps[0].spec.path!r} act on a nested tensor, which they cannot share row by row; "
                "set enable_nested_tensor=False in the nn.TransformerEncoder around it"
            )
        # What is read beside the tensor itself goes into the view, so that dividing rows divides it, too.
        taken = next((step.taken(args, kwargs) for step in steps if isinstance(step, AddProjected)), None)
        streams = {}
        for step in steps:
            stream = step.handover.take() if getattr(step, "handover", None) else None
            if stream is not None:
                streams[step.key] = stream
        layout, per_row = self.layout or RowLayout(0), 1
        if layout.is_flat:
            per_row = indices_per_row(site.state, steps[0].spec.path, x, layout, self.adapter)
        view = View(x, x, taken, streams, layout.axis or 0, per_row, layout.in_turn)
        return pytree.put(value, path, self.node.run(site, host, view))
