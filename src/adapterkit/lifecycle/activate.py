"""What runs: the active adapter or composition, compiled into the steps of each site."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..composition.facts import CompositionFacts, facts_of
from ..composition.nodes import Composition, CompositionNode, expanded, names_in
from ..errors import ActivationError, AdapterNameError, CompatibilityError, ConfigError
from ..heads.plan import head_steps
from ..heads.steps import RunHeads
from ..placement.layers import check_dropped
from ..runtime.acting import ACTING, Acting
from ..runtime.compose.by_row import ByRow
from ..runtime.compose.compile import SiteContext, steps_at
from ..runtime.compose.compose_step import ComposeStep
from ..runtime.compose.parallel import known_axis_of_call, set_batch_hooks
from ..runtime.hooks import has_hook
from ..runtime.lookup import adapter_names, adapters_in, fusions_of, sites_among
from ..runtime.site import AdapterSite, SiteEntry
from ..runtime.state import ACTIVATION_LOCK, STATE, ModelState, without_adapters
from ..runtime.steps import Pass, Step
from ..runtime.sync import forget_compiled
from ..structure.tracing.row_layout import Layouts, RowAxes, SeenRows
from ..structure.tracing.rows import discover_rows

__all__ = [
    "SitePlan",
    "activate",
    "activated",
    "apply",
    "check_active",
    "check_known",
    "check_plans",
    "layouts_of",
    "plan_at",
]


@dataclass(frozen=True)
class SitePlan:
    """The steps of one site.

    Attributes:
        steps: Map the name of a way of acting (`Acting.at`) to its steps; without those that have none.
    """

    steps: Mapping[str, tuple[Step, ...]]

    @property
    def dividing(self) -> tuple[ComposeStep, ...]:
        """Return the steps, no heads, that must know the batch: rows run different adapters there, or lie flat."""
        mixes = (step for steps in self.steps.values() for step in steps if isinstance(step, ComposeStep))
        return tuple(step for step in mixes if isinstance(step.node, ByRow) or (step.layout and step.layout.is_flat))


Plans = Sequence[tuple[str, nn.Module, AdapterSite, SitePlan]]


def activate(model: nn.Module, state: ModelState, composition: Composition | None) -> None:
    """Make an adapter or a composition active; None is the base alone.

    Raises:
        CompatibilityError: adapters that cannot act together as it says, with the place and the reason.
        ActivationError: another thread is running the model with another adapter, or another one is merged.
    """
    plans = _plans(model, state, composition)
    with ACTIVATION_LOCK:
        _check_merged(state, composition)
        state.activation.switch(composition)
        _put(model, state, plans)


@contextmanager
def activated(model: nn.Module, state: ModelState, composition: Composition | None) -> Iterator[None]:
    """Make an adapter or a composition active within a `with` block; see `activate`."""
    plans = _plans(model, state, composition)
    with ACTIVATION_LOCK:
        _check_merged(state, composition)
        state.activation.enter(composition)
        _put(model, state, plans)
    try:
        yield
    finally:
        with ACTIVATION_LOCK:
            state.activation.leave()
            # Compiled anew, not put back: adapters may have been added or removed within the block.
            apply(model, state)


def check_plans(model: nn.Module, state: ModelState, composition: Composition | None) -> None:
    """Raise CompatibilityError if adapters cannot act together as a composition says."""
    _plans(model, state, composition)


def apply(model: nn.Module, state: ModelState) -> None:
    """Put the steps of what is active at every site."""
    _put(model, state, _plans(model, state, state.activation.active))


def check_active(model: nn.Module, composition: Composition) -> Composition:
    """Return the composition to run: checked, and with what they weigh in the place of the names of fusions.

    Raises:
        AdapterNameError: no adapter or fusion has such a name.
        ConfigError: several adapters in a list, a tuple or a set.
        TargetError: a Drop of a layer that there is not.
    """
    if isinstance(composition, (list, tuple, set)):
        raise ConfigError(f"several adapters act together in a composition such as ak.Stack('a', 'b'); found {composition}")
    fusions = fusions_of(model)
    if not isinstance(composition, CompositionNode):
        check_known(model, composition)
        # The name of a fusion stands for what it weighs: "f" for Fuse("a", "b", name="f").
        return fusions.get(composition, composition)
    facts = facts_of(composition)
    # Before the names, among which fusions are, too: this message says how to make one.
    for fuse in facts.fusions:
        if fuse.fusion not in fusions:
            raise AdapterNameError(
                f"the model has no fusion {fuse.fusion!r}; kit.add_fusion({fuse!r}) makes one, to be trained. "
                f"It has: {list(fusions) or 'none'}"
            )
    for name in dict.fromkeys(facts.names):
        check_known(model, name)
    for drop in facts.drops:
        specs = [entry.spec for name in dict.fromkeys(names_in(drop)) for _, entry in adapters_in(model).sites(name)]
        if specs:  # else there is nothing to drop
            check_dropped([spec.layer for spec in specs], drop.dropped_layers)
    return expanded(composition, fusions)  # type: ignore[return-value]  # None of None alone


def _plans(model: nn.Module, state: ModelState, composition: Composition | None) -> Plans:
    """Compile a composition: return the plan for the site of each host, in the model's order."""
    modules = dict(model.named_modules())
    axes, facts = RowAxes(modules), facts_of(composition)
    layouts = _layouts_for(model, state, facts)
    return [
        (path, host, site, plan_at(path, modules, axes.at(path), site, facts, layouts, state.merged))
        for path, host, site in sites_among(modules)
    ]


def _layouts_for(model: nn.Module, state: ModelState, facts: CompositionFacts) -> SeenRows:
    """Return where rows lie; the model runs on tiny inputs if a composition must know, and nobody has looked yet.

    Raises:
        CompatibilityError: a Parallel repeats the rows of the model's call, and on which axis they are is not known.
    """
    layouts = layouts_of(model, state)
    if facts.divides and not layouts.was_looked_for:
        with ACTIVATION_LOCK, without_adapters():
            layouts = discover_rows(model)
        if model.__dict__.get(STATE) is state:
            state.layouts = layouts
    if facts.parallel is not None and known_axis_of_call(model, layouts) is None:
        raise CompatibilityError(
            f"{facts.composition!r} repeats the rows of what the model takes, and on which axis they are there is not known"
            f"{layouts.note('')}. Wrap the model with inputs that show it, ak.wrap(model, example_inputs=batch)"
        )
    return layouts


def layouts_of(model: nn.Module, state: ModelState) -> SeenRows:
    """Map the path of each module to what was seen of where rows lie in its tensors.

    Nothing is kept of a part of a wrapped model: its paths are others.
    """
    is_whole = model.__dict__.get(STATE) is state
    return state.layouts if is_whole else SeenRows()


def _put(model: nn.Module, state: ModelState, plans: Plans) -> None:
    """Put the steps of these plans into the sites, for their hooks to run."""
    active = state.activation.active
    # A model in which nothing was ever active needs no checks, and its hooks stay empty.
    idle = (Pass(active),) if state.activation.was_used else ()
    is_stale = False
    for _, host, site, plan in plans:
        _ask_for_what_is_read(site, plan)
        for acting in ACTING:
            steps = plan.steps.get(acting.at, idle)
            is_stale |= steps != site.steps.get(acting.at, ()) and _is_unguarded(acting, host)
            site.steps[acting.at] = steps
    if is_stale:
        forget_compiled()
    dividing = [(path, step.layout) for path, _, _, plan in plans for step in plan.dividing]
    set_batch_hooks(model, state, dividing, layouts_of(model, state))


def _ask_for_what_is_read(site: AdapterSite, plan: SitePlan) -> None:
    """Say at each handover of a site whether a step of the plan takes what is handed over: streams, calls, labels."""
    acting = {key for steps in plan.steps.values() for step in steps for key in step.module_keys}
    for entry in (entry for entries in site.entries.values() for entry in entries):
        if isinstance(entry, SiteEntry) and entry.handover is not None:
            entry.handover.wanted = True if entry.key in acting else None
    heads = (step for step in plan.steps.get("output", ()) if isinstance(step, RunHeads))
    site.call.wanted = next((step.wants for step in heads), None)


def _is_unguarded(acting: Acting, host: nn.Module) -> bool:
    """Tell whether a compiled graph of the host's own forward would miss a change of the steps of this way of acting.

    Such a graph, where the forward is compiled apart from its hooks, has no guard on what these put in the way of its
    Parameters.
    """
    return acting.is_unguarded and acting.before is not None and has_hook(host, acting.before)


def check_known(model: nn.Module, name: object) -> None:
    """Raise AdapterNameError, with the nearest names, unless the model has this adapter."""
    names = adapter_names(model)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3)
        hint = f"Did you mean {', '.join(map(repr, near))}?" if near else f"It has: {names or 'none'}."
        if name is None:
            hint += " The base alone runs after kit.deactivate(), or inside `with kit.base():`."
        raise AdapterNameError(f"the model has no adapter {name!r}. {hint}")


def _check_merged(state: ModelState, composition: Composition | None) -> None:
    """Raise ActivationError unless what is to be active runs all that is merged on every row."""
    always = facts_of(composition).names_always
    others = [merged for merged in state.merged if merged not in always]
    if others:
        raise ActivationError(
            f"cannot run {'the base' if composition is None else repr(composition)} alone: {others[0]!r} is merged into "
            f"the weights, and would run as well. Call kit.unmerge({others[0]!r}) first"
        )


def plan_at(
    path: str,
    modules: Mapping[str, nn.Module],
    row_axis: int | None,
    site: AdapterSite,
    facts: CompositionFacts,
    layouts: SeenRows,
    merged: Collection[str] = (),
) -> SitePlan:
    """Compile a composition for the site of one host, without what is merged into its weights.

    Args:
        row_axis: What the model's modules say of it; see `RowAxes.at`.
        layouts: What was seen of where rows lie, by path.

    Raises:
        CompatibilityError: its adapters cannot act together here as it says.
    """
    here: Layouts = layouts.get(path, {})
    seen = here.get(("output",))
    head_axis = row_axis if seen is None or seen.is_flat else seen.axis
    heads = head_steps(path, modules, site, facts, row_axis=head_axis or 0)
    if not heads and not any(name in site.entries for name in facts.names):
        return SitePlan({})
    steps: dict[str, tuple[Step, ...]] = {}
    for acting in ACTING:
        context = SiteContext(path, site, acting.at, row_axis, here, merged, layouts.note(path))
        steps[acting.at] = steps_at(context, facts)
    steps["output"] += heads  # they read what the adapters there made
    return SitePlan({at: own for at, own in steps.items() if own})
