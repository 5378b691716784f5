"""Merge adapters into the base's weights, and take them out again.

The model computes the same before and after, and what fails changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn

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
from ...structure.tracing.reads import CallStack, Holder, reads_around
from ..activate import apply, check_known
from .merged_weights import Change, merged_weights

__all__ = ["changed_since_merging", "merge", "unmerge", "unmerge_all"]


def merge(model: nn.Module, state: ModelState, name: str, example_inputs: ExampleInputs | None = None) -> None:
    """Write an adapter into the weights of its hosts. Raises: see `AdapterKit.merge`.

    Warns if the model runs on no inputs that are known, so that what reads its weights cannot be seen.

    Args:
        model: The model that has the adapter.
        state: The model's state.
        name: The adapter's name.
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
        # All of them anew, from the originals: what comes out must not depend on the order of merging and unmerging.
        changes = merged_weights(model, [*state.merged, name])
        _check_reads(model, name, changes, example_inputs)
        _write(model, changes)
        # From here on nothing can fail. A merged adapter does not run, so that training it would do nothing.
        own = [parameter for _, parameter in named_parameters(model, name, heads=False)]
        state.merged[name] = tuple(parameter.requires_grad for parameter in own)
        for parameter in own:
            parameter.requires_grad_(False)
        _settle(model, state)


def unmerge(model: nn.Module, state: ModelState, name: str, *, restore: bool = True) -> None:
    """Take an adapter out of the weights. Raises: see `AdapterKit.unmerge`.

    Args:
        model: The model that has the adapter.
        state: The model's state.
        name: The adapter's name.
        restore: Put the originals back. If not, all merged adapters are forgotten and the weights stay as they are.
    """
    check_known(model, name)
    if name not in state.merged:
        raise ActivationError(f"adapter {name!r} is not merged; merged are: {list(state.merged) or 'none'}")
    if restore:
        _keep_merged(model, state, [other for other in state.merged if other != name])
        return
    with _undisturbed(model):
        # Of all merged adapters: one original stands below their sum, and cannot be forgotten for one of them.
        for _, _, site in sites_of(model):
            site.originals.clear()
        _reopen(model, state, list(state.merged))
        _settle(model, state)


def unmerge_all(model: nn.Module, state: ModelState) -> None:
    """Take every adapter out of the weights. Raises CompatibilityError if they changed since."""
    if state.merged:
        _keep_merged(model, state, [])


def changed_since_merging(model: nn.Module) -> list[str]:
    """Return the names of weights that changed since adapters were merged into them."""
    changed = []
    for path, host, site in sites_of(model):
        for name, original in site.originals.items():
            parameter = parameter_at(host, name)
            if parameter is None or digest(parameter) != original.merged:
                changed.append(f"{path}.{name}".lstrip("."))
    return changed


def _keep_merged(model: nn.Module, state: ModelState, names: Sequence[str]) -> None:
    """Keep these of the merged adapters in the weights and take all others out.

    The weights are computed anew from the originals: W + a + b - a is not W + b in floating point.
    """
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
        stack.enter_context(outside_inference_mode())  # else the originals could not be trained on later
        stack.enter_context(torch.no_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))  # which would multiply in half precision
        yield


def _check_whole(model: nn.Module, state: ModelState, name: str) -> None:
    """Raise CompatibilityError if the adapter has hosts that are not in this model, or not any more."""
    # `state.merged` is of the whole adapter: at a host outside of this model it would be left out of the steps, and not be
    # in the weights either.
    there, once = sum(name in site.entries for _, _, site in sites_of(model)), len(set(state.hosts[name]))
    if there != once:
        raise CompatibilityError(
            f"adapter {name!r} was added at {once} modules, of which this {type(model).__name__} has {there}: merge it in "
            "the whole model or, if modules were replaced, remove it and add it anew"
        )


def _check_company(model: nn.Module, state: ModelState, name: str) -> None:
    """Raise CompatibilityError where an adapter that stays unmerged acts at one host with this one, and order matters.

    Merging moves this adapter before all others. Sums of what the host's input alone decides may change their order. One
    that scales the host's output, or reads it, would then get other numbers.
    """
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
    """Tell whether a module adds to its host's output what depends on the host's input alone."""
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
    """Raise CompatibilityError if the model reads a weight around its host, where the adapter does not act.

    Such is `x @ self.embedding.weight.T`: the adapter does nothing there, but a merged weight would.
    """
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
    except CompatibilityError as error:
        # Not refused: most models read no weight around its module. And no class of its own for this warning: inputs that
        # run end it, so there is no reason to silence it.
        warnings.warn(
            f"merging adapter {name!r} could not check what reads the weights, because it could not run the model. If "
            f"{type(model).__name__} reads one of them around its module (such as `x @ self.embedding.weight.T`), merging "
            "changes what it computes there. Wrap it with inputs that run, and merging checks that: "
            f"ak.wrap(model, example_inputs=batch). {error}",
            UserWarning,
            stacklevel=4,  # the caller of `kit.merge`
        )
        return
    for (change, _), stacks in zip(held, around, strict=True):
        if stacks:
            _refuse_read(model, name, change, stacks[0])


def _refuse_read(model: nn.Module, name: str, change: Change, running: CallStack) -> NoReturn:
    """Raise CompatibilityError for a read around the host, during which these modules ran."""
    reader = running[-1][0] if running else ""  # the innermost; "" is the model itself
    full = f"{change.path}.{change.names[0]}".lstrip(".")
    raise CompatibilityError(
        f"adapter {name!r} cannot be merged into {change.path!r}: {reader or type(model).__name__!r} reads its "
        f"{change.names[0]} as well, around it, where the adapter does nothing, but a merged weight would. Adapt "
        f"the Parameter {full!r}, by this name, in a model that is wrapped with example inputs: "
        "ak.wrap(model, example_inputs=batch)"
    )


def _write(model: nn.Module, changes: Sequence[Change]) -> None:
    """Make the weights what these changes say, and all other merged weights what they were before.

    The sites then hold the originals of what is changed, and of nothing else.
    """
    originals = originals_of(model)
    # Of a tied Parameter each host has a change: they are equal, and the last one's site keeps the original.
    changing = {id(change.parameter): change for change in changes}
    kept = {key: originals[key] if key in originals else _copy(change.parameter) for key, change in changing.items()}
    writes = [(change.parameter, change.value) for change in changing.values()] + _to_restore(model, changing)
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
        # By a name from the host on: in a copy of the model, or of the host alone, it leads to the copied Parameter.
        change.site.originals[change.names[0]] = Original(kept[key], digest(change.parameter))


def _to_restore(model: nn.Module, changing: Mapping[int, Change]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the merged Parameters that are not among those that change, each once, with its original."""
    found = {
        id(parameter): (parameter, original.value)
        for _, host, site in sites_of(model)
        for name, original in site.originals.items()
        if (parameter := parameter_at(host, name)) is not None and id(parameter) not in changing
    }
    return list(found.values())


def _copy(parameter: nn.Parameter) -> Tensor:
    """Return a tensor of its own, in memory, with the Parameter's values."""
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
    """Have the hooks run what is not in the weights."""
    state.activation.change_weights()  # a forward that is checkpointed now must not be recomputed with other weights
    forget_compiled()  # a compiler may have folded the weights into its graph
    apply(model, state)
