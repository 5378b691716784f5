"""What a composition becomes at one site: the steps of its hooks."""

from __future__ import annotations

from collections.abc import Sequence

from ...composition.facts import CompositionFacts
from ...composition.nodes import Composition, CompositionNode
from ...errors import CompatibilityError
from ...placement.spec import layout_of
from ...structure.tracing.row_layout import NO_ROWS, UNCLEAR, RowLayout
from ..acting import acting_at
from ..site import SiteEntry
from ..steps import AddDelta, AddProjected, AddsToTensor, Step
from .by_row import ByRow
from .compose_step import ComposeStep
from .plan_nodes import Chain, Leaf, PlanGroup, PlanNode, chain, plan_of
from .site_context import SiteContext
from .stacked import stacking_key

__all__ = ["SiteContext", "steps_at"]


def steps_at(context: SiteContext, facts: CompositionFacts) -> tuple[Step, ...]:
    """Return the steps of a composition for one way of acting at one site.

    Raises:
        CompatibilityError: its adapters cannot act together there as it says.
    """
    composition = facts.composition
    if composition is None:
        return ()
    if facts.is_in_order:
        # A name, and names one after the other, need none of the machinery for parts of tensors.
        steps = _steps_in_order(context, composition)
        if not steps or _need_no_view(steps):
            return steps
    elif next(context.entries_of(composition), None) is None:  # not all: a `Rows` would have as many as the batch has rows
        return ()
    elif acting_at(context.at).is_shared:
        names = sorted({name for entry in context.entries_of(composition) for name in entry.spec.parameters})
        changed = f"the Parameter {', '.join(names)}" if context.at == "weight" else f"its {context.at}"
        raise CompatibilityError(
            f"{composition!r} cannot act on {context.path!r}: an adapter there changes {changed}, which all rows and "
            "tokens share. Stack such adapters, or adapt a layer"
        )
    return _composed(context, facts, composition)


def _steps_in_order(context: SiteContext, composition: Composition) -> tuple[Step, ...]:
    """Return one step for each module: in order, then those that undo, the last one first."""
    entries = list(context.entries_of(composition))
    undoing = [entry for entry in entries if context.undoes(entry)]
    ordered = [*(entry for entry in entries if entry not in undoing), *reversed(undoing)]
    acting = acting_at(context.at)
    return tuple(acting.step(entry, composition, context.site.get_submodule(entry.key)) for entry in ordered)


def _need_no_view(steps: Sequence[Step]) -> bool:
    """Tell whether steps can run one after the other on what a hook is given.

    A step reads the tensor as those before it left it, and takes its stream away from the handover. One that reads the
    host's own output, after others, or a stream a second time, needs a `View`, which keeps both.
    """
    streams = [step.key for step in steps if isinstance(step, AddDelta) and step.handover is not None]
    return not any(isinstance(step, AddProjected) for step in steps[1:]) and len({*streams}) == len(streams)


def _composed(context: SiteContext, facts: CompositionFacts, composition: Composition) -> tuple[Step, ...]:
    """Return the one step that runs a composition's plan node; none where nothing acts. Raises CompatibilityError."""
    node = _plan_node(context, facts, composition)
    if not node.leaves:  # those that have modules here get no rows
        return ()
    _check_one_tensor(context, node, composition)
    is_one_for_all_rows = layout_of(context.layouts, node.readers[0].spec) == NO_ROWS
    if isinstance(node, ByRow) and len({*node.nodes}) == 1 and is_one_for_all_rows:
        node = node.nodes[0]  # rows do not differ here, so a tensor without rows (a position bias) need not be divided
    return (ComposeStep(node, composition, _layout_at(context, node, facts)),)


def _layout_at(context: SiteContext, node: PlanNode, facts: CompositionFacts) -> RowLayout | None:
    """Return how rows lie in the tensor that a node changes; None where nothing reads it.

    Raises:
        CompatibilityError: it cannot tell, or the tensor is one for all rows.
    """
    seen = layout_of(context.layouts, node.readers[0].spec)
    if not _divides(node):
        return None
    if seen is not None and seen.axis is None and _divides_rows(node):
        what = "holds no fixed number of tokens of each row" if seen == UNCLEAR else "is one for all rows of the batch"
        raise CompatibilityError(
            f"{facts.composition!r} cannot act on {context.path!r}: its tensor there {what}. Exclude this place"
        )
    if seen is not None and seen.axis is not None:  # what was seen in a run is sure; what modules say (batch_first) is next
        return seen
    if context.row_axis is not None:
        return RowLayout(context.row_axis)
    raise CompatibilityError(
        f"{facts.composition!r} cannot act on {context.path!r}: on which axis its tensor has the rows of the batch is not "
        f"known{context.why_unseen}. Wrap the model with inputs that show it, ak.wrap(model, example_inputs=batch), or "
        "exclude this place"
    )


def _divides(node: PlanNode) -> bool:
    """Tell whether a node runs others on some rows or tokens, or holds one that does."""
    return node.is_dividing or (isinstance(node, PlanGroup) and any(map(_divides, node.nodes)))


def _divides_rows(node: PlanNode) -> bool:
    """Tell whether a node runs others on some rows, or holds one that does."""
    return isinstance(node, ByRow) or (isinstance(node, PlanGroup) and any(map(_divides_rows, node.nodes)))


def _plan_node(context: SiteContext, facts: CompositionFacts, whole: Composition) -> PlanNode:
    """Return what a composition is at a site. `whole` is all of it, for messages."""
    composition = facts.composition
    if composition is None:
        return Chain(())
    if not isinstance(composition, CompositionNode):
        return chain([_leaf(context, entry, whole) for entry in context.entries(composition)])
    if facts.divides_rows:
        return _plan_by_row(context, facts, composition, whole)
    inside = context.inside(composition)
    nodes = [_plan_node(inside, child, whole) for child in facts.children]
    return plan_of(composition, nodes, context, whole) if any(node.leaves for node in nodes) else Chain(())


def _plan_by_row(
    context: SiteContext, facts: CompositionFacts, composition: CompositionNode, whole: Composition
) -> PlanNode:
    """Return what a composition that divides the rows is at a site: a node for each kind of row."""
    kinds, is_parallel = facts.row_kinds, facts.parallel is not None
    nodes = tuple(_plan_node(context, kind, whole) for kind in kinds)
    if is_parallel and len(set(nodes)) == 1:
        # All children do the same here. A block where that holds throughout computes the rows of the first child alone
        # (see `parallel.py`), and a `ByRow` would ask it for those of all.
        return nodes[0]
    return ByRow(nodes, tuple(kind.composition for kind in kinds), composition, context.path, is_parallel)


def _leaf(context: SiteContext, entry: SiteEntry, whole: Composition) -> Leaf:
    """Return the plan node of one module. Raises CompatibilityError: its step cannot act on some rows alone."""
    module = context.site.get_submodule(entry.key)
    step = acting_at(context.at).step(entry, whole, module)
    if not isinstance(step, AddsToTensor):
        raise CompatibilityError(f"{whole!r} cannot act on {context.path!r} with {type(step).__name__}")
    key = stacking_key(step, module)
    # A new kind gets the next number: 0, 1, 2, …
    return Leaf(step, context.kinds.setdefault(key, len(context.kinds)), context.undoes(entry))


def _check_one_tensor(context: SiteContext, node: PlanNode, whole: Composition) -> None:
    """Raise CompatibilityError where adapters change different tensors of one host's output or call."""
    specs = [leaf.step.spec for leaf in node.leaves]
    tensors = {(spec.input if spec.at == "input" else spec.output, spec.axis) for spec in specs}
    if len(tensors) > 1:
        raise CompatibilityError(
            f"{whole!r} cannot act on {context.path!r}: its adapters change different tensors there, "
            f"{sorted(map(str, tensors))}"
        )
