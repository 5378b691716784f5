"""Merge adapters into the base's weights and take them out again: the model computes the same, and all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ...composition.nodes import names_in
from ...errors import ActivationError, CompatibilityError
from ...nn.traits import reads_bare_output
from ...runtime.lookup import fusions_of, named_parameters, sites_of
from ...runtime.originals import originals_of
from ...runtime.site import Original, SiteEntry
from ...runtime.state import ACTIVATION_LOCK, ModelState, without_adapters
from ...runtime.sync import forget_compiled
from ...structure.base_tensors import digest, owner_at, parameter_at
from ...structure.tracing.forward import ExampleInputs, outside_inference_mode
from ...structure.tracing.inputs import tiny_inputs
from ...structure.tracing.reads import Holder, reads_around
from ..activate import apply, check_known
from .merged_weights import Change, merged_weights

__all__ = ["changed_since_merging", "merge", "unmerge", "unmerge_all"]


def merge(model: nn.Module, state: ModelState, name: str, example_inputs: ExampleInputs | None = None) -> None:
    """Write an adapter into the weights of its hosts. Raises: see `AdapterKit.merge`.

    Args:
        example_inputs: Inputs to run the model on, to see what reads its weights; else tiny ones are made, if any run.
    """
    check_known(model, name)
    if name in fusions_of(model):
        raise CompatibilityError(f"{name!r} is a fusion: what it adds depends on each token, and no weight can hold that")
    with _undisturbed(model):
        if name in state.merged:
            raise ActivationError(f"adapter {name!r} is merged already; kit.unmerge({name!r}) takes it out again")
        if not state.activation.stays(name):
            raise ActivationError(
                f"adapter {name!r} is not active, or only within a `with` block, and merging must not change what the "
                f"model computes: call kit.activate({name!r}) first"
            )
        _check_whole(model, state, name)
        _check_company(model, state, name)
        _check_unchanged(model)
        changes = merged_weights(model, [*state.merged, name])
        _check_reads(model, name, changes, example_inputs)
        _write(model, changes)
        own = [parameter for _, parameter in named_parameters(model, name, heads=False)]
        state.merged[name] = tuple(parameter.requires_grad for parameter in own)
        for parameter in own:
            parameter.requires_grad_(False)
        _settle(model, state)


def unmerge(model: nn.Module, state: ModelState, name: str, *, restore: bool = True) -> None:
    """Take an adapter out of the weights. Raises: see `AdapterKit.unmerge`."""
    check_known(model, name)
    if name not in state.merged:
        raise ActivationError(f"adapter {name!r} is not merged; merged are: {list(state.merged) or 'none'}")
    if restore:
        _keep_merged(model, state, [other for other in state.merged if other != name])
        return
    with _undisturbed(model):
        for _, _, site in sites_of(model):
            site.originals.clear()
        _reopen(model, state, list(state.merged))
        _settle(model, state)


def unmerge_all(model: nn.Module, state: ModelState) -> None:
    """Take every adapter out of the weights. Raises CompatibilityError if they changed since."""
    if state.merged:
        _keep_merged(model, state, [])


def changed_since_merging(model: nn.Module) -> list[str]:
    """The names of weights into which adapters are merged, and that are not what merging made of them any more."""
    changed = []
    for path, host, site in sites_of(model):
        for name, original in site.originals.items():
            parameter = parameter_at(host, name)
            if parameter is None or digest(parameter) != original.merged:
                changed.append(f"{path}.{name}".lstrip("."))
    return changed


def _keep_merged(model: nn.Module, state: ModelState, names: Sequence[str]) -> None:
    """Have these adapters, of those that are merged, in the weights, and no others: anew, from the originals."""
    with _undisturbed(model):
        _check_unchanged(model)
        _write(model, merged_weights(model, names))
        _reopen(model, state, [name for name in state.merged if name not in names])
        _settle(model, state)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block that nothing else may see halfway, with plain arithmetic."""
    devices = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    with ExitStack() as stack:
        stack.enter_context(ACTIVATION_LOCK)
        stack.enter_context(outside_inference_mode())
        stack.enter_context(torch.no_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))  # which would multiply in half precision
        yield


def _check_whole(model: nn.Module, state: ModelState, name: str) -> None:
    """Raise CompatibilityError if the adapter has hosts that are not in this model, or not any more."""
    there, once = sum(name in site.entries for _, _, site in sites_of(model)), len(set(state.hosts[name]))
    if there != once:
        raise CompatibilityError(
            f"adapter {name!r} was added at {once} modules, of which this {type(model).__name__} has {there}: merge it in "
            "the whole model or, if modules were replaced, remove it and add it anew"
        )


def _check_company(model: nn.Module, state: ModelState, name: str) -> None:
    """Raise CompatibilityError where adapters that stay unmerged act at one host with this one, and order matters there."""
    others = {*names_in(state.activation.active)} - {name, *state.merged}
    for path, _, site in sites_of(model):
        here = [other for other in others if other in site.entries] if name in site.entries else []
        held = [pair for which in (name, *here) for pair in site.adapting(which)]
        if here and not all(_is_a_sum(entry, module) for entry, module in held):
            raise CompatibilityError(
                f"adapter {name!r} cannot be merged into {path!r}, where {here[0]!r} acts as well and is not merged: what "
                "one of them computes depends on the other. Activate it alone, or merge where they do not meet"
            )


def _is_a_sum(entry: SiteEntry, module: nn.Module) -> bool:
    """Whether a module adds to its host's output what depends on the host's input alone."""
    return entry.spec.reads == "own_input" and not reads_bare_output(module)


def _check_unchanged(model: nn.Module) -> None:
    """Raise CompatibilityError if weights changed since adapters were merged into them."""
    changed = changed_since_merging(model)
    if changed:
        raise CompatibilityError(
            f"{', '.join(map(repr, changed[:3]))}{' and more' if len(changed) > 3 else ''} changed since adapters were "
            "merged (by a checkpoint, a cast or training), so that restoring the weights would undo that. "
            "kit.unmerge(name, restore=False) forgets the originals and keeps the weights as they are"
        )


def _check_reads(model: nn.Module, name: str, changes: Sequence[Change], inputs: ExampleInputs | None) -> None:
    """Raise CompatibilityError if the model reads a weight around its host, where the adapter does not act."""
    held = [
        (change, Holder(owner, leaf, change.host))
        for change in changes
        for owner, leaf in (owner_at(change.host, own) for own in change.names)
        if owner is not None
    ]
    try:
        with without_adapters():
            inputs = tiny_inputs(model) if inputs is None else inputs
            around = reads_around(model, [holder for _, holder in held], inputs)
    except CompatibilityError:  # a model that runs on nothing that is known here: nothing can be seen
        return
    for (change, _), stacks in zip(held, around, strict=True):
        if stacks:
            where, full = stacks[0][-1][0] if stacks[0] else "", f"{change.path}.{change.names[0]}".lstrip(".")
            raise CompatibilityError(
                f"adapter {name!r} cannot be merged into {change.path!r}: {where or type(model).__name__!r} reads its "
                f"{change.names[0]} as well, around it, where the adapter does nothing, but a merged weight would. Adapt "
                f"the Parameter {full!r}, by this name, in a model that is wrapped with example inputs: "
                "ak.wrap(model, example_inputs=batch)"
            )


def _write(model: nn.Module, changes: Sequence[Change]) -> None:
    """Put the changes into the Parameters and the originals back into all others, and keep the originals of the changes."""
    originals = originals_of(model)
    changing = {id(change.parameter): change for change in changes}
    restored = {
        id(parameter): (parameter, original.value)
        for _, host, site in sites_of(model)
        for name, original in site.originals.items()
        if (parameter := parameter_at(host, name)) is not None and id(parameter) not in changing
    }
    kept = {key: originals.get(key, _copy(change.parameter)) for key, change in changing.items()}
    writes = [(change.parameter, change.value) for change in changing.values()] + list(restored.values())
    # What is merged already would be there to compute anew, but not in the middle of an interrupt.
    before = [(p, _copy(p) if id(p) in originals else kept[id(p)]) for p, _ in writes]
    try:
        for parameter, value in writes:
            _overwrite(parameter, value)
    except BaseException:  # an interrupt, say
        for parameter, value in before:
            _overwrite(parameter, value)
        raise
    for _, _, site in sites_of(model):
        site.originals.clear()
    for key, change in changing.items():
        change.site.originals[change.names[0]] = Original(kept[key], digest(change.parameter))


def _copy(parameter: nn.Parameter) -> Tensor:
    """A tensor of its own, in memory, with the Parameter's values."""
    return parameter.detach().clone()


def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Change a Parameter in place, so that autograd notices."""
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.copy_(value)
    torch.clear_autocast_cache()  # inside an autocast region it holds the weight as it was


def _reopen(model: nn.Module, state: ModelState, names: Sequence[str]) -> None:
    """Forget that these adapters are merged, and let their parameters train that did before."""
    for name in names:
        own = named_parameters(model, name, heads=False)
        for (_, parameter), trained in zip(own, state.merged.pop(name), strict=False):
            parameter.requires_grad_(trained)


def _settle(model: nn.Module, state: ModelState) -> None:
    """Have hooks run what is not in the weights."""
    state.activation.change_weights()
    forget_compiled()  # a compiler may have folded the weights into its graph
    apply(model, state)
