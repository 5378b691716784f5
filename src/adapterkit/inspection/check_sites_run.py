"""Check that the sites of the active adapters run, belong where they are, and get gradients."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from ..composition.nodes import drops_in
from ..config.settings import AdapterConfig
from ..config.union import Union
from ..errors import TargetError
from ..lifecycle.add import find_sites, needs_structure
from ..placement.layers import in_layers
from ..placement.spec import SiteSpec, located
from ..runtime.lookup import adapters_in, sites_of
from ..runtime.site import SiteEntry
from ..runtime.state import ModelState, without_adapters
from ..structure.base_tensors import owner_at, parameter_at
from ..structure.paths import SITE
from ..structure.tracing.forward import ExampleInputs, runs_around
from ..structure.tracing.reads import Holder, reads_around
from .proof import SiteProof, dead_parameters
from .table import in_short

__all__ = ["in_other_places", "site_problems", "without_gradients"]


def in_other_places(model: nn.Module, name: str, inputs: ExampleInputs) -> Iterator[str]:
    """Yield a sentence if an adapter's config, read anew, asks for other sites than those that the adapter has.

    That is so if the model computes otherwise than when the adapter was added.
    """
    config = adapters_in(model).configs.get(name)
    # A fusion is wherever its adapters are. Sites found by name alone stay right, whatever the model computes.
    if not isinstance(config, AdapterConfig | Union) or not needs_structure(config):
        return
    try:
        wanted = {_same_as(spec) for spec in find_sites(model, config, inputs)}
    except TargetError as error:
        yield f"the places that adapter {name!r} was added at are not found any more: {error}"
        return
    # `model` may be a piece of the model that the adapter was added to: its paths are shorter then.
    there = {_same_as(located(entry.spec, held.path)) for held, entry in adapters_in(model).sites(name)}
    changed = sorted({path for path, _ in wanted ^ there})
    if changed:
        yield (
            f"the model computes otherwise than when adapter {name!r} was added: its config now asks for other places than "
            f"{in_short([repr(path) for path in changed])}; remove the adapter, and add it anew"
        )


def _same_as(spec: SiteSpec) -> tuple[str, object]:
    """Return a site's path, and what else two sites share if they are the same."""
    # Whether an argument is given by position or by name is up to the inputs, not to the config.
    location = replace(spec.location, input=None)
    return spec.path, (location, spec.parameters, spec.slices, spec.tag, spec.member)


def without_gradients(model: nn.Module, state: ModelState, name: str, inputs: ExampleInputs) -> list[str]:
    """Return a sentence if no gradient reaches some of an adapter's parameters, or if none can be computed."""
    # No gradient is meant to reach what a Drop leaves out. (Without a Drop this is (), with which no key starts.)
    dropped = tuple(_dropped(model, state, name))
    try:
        dead = [key for key in dead_parameters(model, name, inputs) if not key.startswith(dropped)]
    except (RuntimeError, ValueError) as error:  # the model's own, in training mode or in its backward
        return [f"no gradients can be computed: {str(error).splitlines()[0]}"]
    return [f"no gradient of the model's output reaches {in_short(dead)}"] if dead else []


def _dropped(model: nn.Module, state: ModelState, name: str) -> Iterator[str]:
    """Yield how the names of an adapter's parameters begin in the layers where an active Drop leaves it out."""
    layers = [layer for drop in drops_in(state.activation.active) for layer in drop.dropped_layers]
    for path, _, site in sites_of(model):
        # The steps are what runs: an adapter may stand in the composition twice, inside of a Drop and outside.
        acting = {key for steps in site.steps.values() for step in steps for key in step.module_keys}
        for entry in site.entries.get(name, ()):
            if isinstance(entry, SiteEntry) and in_layers(entry.spec.layer, layers) and entry.key not in acting:
                # The last dot: one key may be the beginning of another ("a" of "ab").
                yield f"{path}.{SITE}.{entry.key}.".lstrip(".")


def site_problems(
    model: nn.Module, sites: Sequence[SiteProof], specs: Sequence[tuple[str, SiteSpec]], inputs: ExampleInputs
) -> Iterator[str]:
    """Yield what is wrong at the sites.

    Args:
        model: The adapted model.
        sites: What was seen at each site.
        specs: The path and spec of each, in the same order.
        inputs: What the model was run on.
    """
    idle = _idle(model, sites, specs)
    yield from _idle_parameters(model, [(path, spec) for path, spec in idle if spec.parameters], inputs)
    modules = [path for path, spec in idle if not spec.parameters]
    for path, around in (runs_around(model, inputs, modules) if modules else {}).items():
        yield (
            f"{path!r} never ran on the example inputs (skipped, or its weights are read around it); adapt "
            f"{repr(around) if around else 'the model itself'}, which does"
        )
    # A site that never ran has been named above; it has no training run or ε-test to speak of.
    for proof in (proof for proof in sites if proof.fired_in_eval):
        if not proof.fired_in_training:
            why = proof.training_error or "does the model run in it on these inputs?"
            yield f"{proof.path!r} ran in eval mode, but never in training mode ({why})"
        if not proof.agrees:
            yield f"the \N{GREEK SMALL LETTER EPSILON}-test of {proof.path!r} ({proof.place}) fails: {proof.moved}"


def _idle(
    model: nn.Module, sites: Sequence[SiteProof], specs: Sequence[tuple[str, SiteSpec]]
) -> list[tuple[str, SiteSpec]]:
    """Return the sites whose hosts never ran.

    A tied Parameter is adapted wherever it is read: one host of it that ran is enough.
    """
    # None for a site at no Parameter: it is not in `read`, so only its own host counts.
    held = [
        parameter_at(model.get_submodule(path), spec.parameters[0]) if spec.parameters else None for path, spec in specs
    ]
    read = {id(p) for p, proof in zip(held, sites, strict=True) if p is not None and proof.fired_in_eval}
    return [
        (proof.path, spec)
        for proof, (_, spec), parameter in zip(sites, specs, held, strict=True)
        if not proof.fired_in_eval and id(parameter) not in read
    ]


def _idle_parameters(model: nn.Module, idle: Sequence[tuple[str, SiteSpec]], inputs: ExampleInputs) -> Iterator[str]:
    """Yield what is wrong where a Parameter is adapted whose host never runs, so that nobody reads the changed one."""
    owners = [owner_at(model.get_submodule(path), spec.parameters[0]) for path, spec in idle]
    held = [
        (path, spec.parameters[0], Holder(owner, leaf, model.get_submodule(path)))
        for (path, spec), (owner, leaf) in zip(idle, owners, strict=True)
        if owner is not None
    ]
    # Adapters compute with their hosts' Parameters, and that would count as a read.
    with without_adapters():
        reads = reads_around(model, [holder for _, _, holder in held], inputs) if held else []
    for (path, name, _), stacks in zip(held, reads, strict=True):
        if not stacks:
            yield (
                f"{path!r} never ran on the example inputs, and nothing else read its {name!r}, which is adapted there: "
                "verify with inputs that run it, or exclude it"
            )
            continue
        reader = stacks[0][-1][0] if stacks[0] else ""  # the innermost module that was running; "" is the model itself
        yield (
            f"{path!r} never ran on the example inputs: {repr(reader) if reader else type(model).__name__} reads its "
            f"{name!r} around it, as it was before the adapter. Wrap the model with the inputs, ak.wrap(model, "
            "example_inputs=batch), and add it anew"
        )
