"""Merge adapters into the base's weights and take them out again: the model computes the same, and all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from .base import digest
from .config.union import members
from .errors import ActivationError, CompatibilityError
from .hooks import forget_compiled
from .mergeable import Ties, refusal
from .methods.base import Adapting, Mergeable
from .plan import apply, check_known
from .reads import reads_around
from .record import ACTIVATION_LOCK, Record, silenced
from .sites import (
    AdapterSite,
    Entry,
    Original,
    SiteSpec,
    named_parameters,
    originals_of,
    parameter_at,
    sites_of,
)
from .structure.inputs import tiny_inputs
from .structure.trace import ExampleInputs, outside_inference_mode
from .trial import difference, needs_trial

__all__ = ["changed_since_merging", "merge", "unmerge", "unmerge_all"]

# At one host: a changed weight is what an output is added to, and an input is scaled before both.
_ORDER = ("weight", "output", "input")


@dataclass(frozen=True)
class _Change:
    """A Parameter and what is to be written into it.

    Attributes:
        site: The site that keeps its original.
        host: The host that reads it.
        path: The host's path.
        name: Its name from the host on.
        value: In the Parameter's dtype.
    """

    site: AdapterSite
    host: nn.Module
    path: str
    name: str
    parameter: nn.Parameter
    value: Tensor


def merge(model: nn.Module, record: Record, name: str, example_inputs: ExampleInputs | None = None) -> None:
    """Write an adapter into the weights of its hosts. Raises: see `AdapterKit.merge`.

    Args:
        example_inputs: Inputs to run the model on, to see what reads its weights; else tiny ones are made, if any run.
    """
    check_known(model, name)
    with _undisturbed(model):
        if name in record.merged:
            raise ActivationError(f"adapter {name!r} is merged already; kit.unmerge({name!r}) takes it out again")
        if not record.activation.stays(name):
            raise ActivationError(
                f"adapter {name!r} is not active, or only within a `with` block, and merging must not change what the "
                f"model computes: call kit.activate({name!r}) first"
            )
        _check_whole(model, record, name)
        _check_unchanged(model)
        changes = _changes(model, [*record.merged, name])
        _check_reads(model, name, changes, example_inputs)
        _write(model, changes)
        own = [parameter for _, parameter in named_parameters(model, name, heads=False)]
        record.merged[name] = tuple(parameter.requires_grad for parameter in own)
        for parameter in own:
            parameter.requires_grad_(False)
        _settle(model, record)


def unmerge(model: nn.Module, record: Record, name: str, *, restore: bool = True) -> None:
    """Take an adapter out of the weights. Raises: see `AdapterKit.unmerge`."""
    check_known(model, name)
    if name not in record.merged:
        raise ActivationError(f"adapter {name!r} is not merged; merged are: {list(record.merged) or 'none'}")
    if restore:
        _keep_merged(model, record, [other for other in record.merged if other != name])
        return
    with _undisturbed(model):
        for _, _, site in sites_of(model):
            site.originals.clear()
        _reopen(model, record, list(record.merged))
        _settle(model, record)


def unmerge_all(model: nn.Module, record: Record) -> None:
    """Take every adapter out of the weights. Raises CompatibilityError if they changed since."""
    if record.merged:
        _keep_merged(model, record, [])


def changed_since_merging(model: nn.Module) -> list[str]:
    """The names of weights into which adapters are merged, and that are not what merging made of them any more."""
    changed = []
    for path, host, site in sites_of(model):
        for name, original in site.originals.items():
            parameter = parameter_at(host, name)
            if parameter is None or digest(parameter) != original.merged:
                changed.append(f"{path}.{name}".lstrip("."))
    return changed


def _keep_merged(model: nn.Module, record: Record, names: Sequence[str]) -> None:
    """Have these adapters, of those that are merged, in the weights, and no others: anew, from the originals."""
    with _undisturbed(model):
        _check_unchanged(model)
        _write(model, _changes(model, names))
        _reopen(model, record, [name for name in record.merged if name not in names])
        _settle(model, record)


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


def _check_whole(model: nn.Module, record: Record, name: str) -> None:
    """Raise CompatibilityError if the adapter has hosts that are not in this model, or not any more."""
    there, once = sum(name in site.entries for _, _, site in sites_of(model)), len(set(record.hosts[name]))
    if there != once:
        raise CompatibilityError(
            f"adapter {name!r} was added at {once} modules, of which this {type(model).__name__} has {there}: merge it in "
            "the whole model or, if modules were replaced, remove it and add it anew"
        )


def _check_unchanged(model: nn.Module) -> None:
    """Raise CompatibilityError if weights changed since adapters were merged into them."""
    changed = changed_since_merging(model)
    if changed:
        raise CompatibilityError(
            f"{', '.join(map(repr, changed[:3]))}{' and more' if len(changed) > 3 else ''} changed since adapters were "
            "merged (by a checkpoint, a cast or training), so that restoring the weights would undo that. "
            "kit.unmerge(name, restore=False) forgets the originals and keeps the weights as they are"
        )


def _check_reads(model: nn.Module, name: str, changes: Sequence[_Change], inputs: ExampleInputs | None) -> None:
    """Raise CompatibilityError if the model reads a weight around its host, where the adapter does not act."""
    try:
        with silenced():
            inputs = tiny_inputs(model) if inputs is None else inputs
        around = reads_around(model, {id(change.parameter): change.host for change in changes}, inputs)
    except CompatibilityError:  # a model that runs on nothing that is known here: nothing can be seen
        return
    for change in changes:
        if id(change.parameter) in around:
            where = around[id(change.parameter)]
            raise CompatibilityError(
                f"adapter {name!r} cannot be merged into {change.path!r}: {where or type(model).__name__!r} reads its "
                f"{change.name} as well, around it, where the adapter does nothing, but a merged weight would"
            )


def _changes(model: nn.Module, names: Sequence[str]) -> list[_Change]:
    """What these adapters, in order, make of the original weights.

    Raises:
        CompatibilityError: one of them cannot be merged; says where and why.
    """
    ties, originals = Ties(model), originals_of(model)
    changes: list[_Change] = []
    for path, host, site in sites_of(model):
        held = [(name, *pair) for name in names for pair in site.modules_of(name) if pair[0].spec is not None]
        if held:
            held.sort(key=lambda item: _ORDER.index(_spec(item[1]).at))
            changes += _HostWeights(path, host, site, ties, originals).merged(held)
    return changes


class _HostWeights:
    """Copies of one host's tensors, wide, into which adapters are merged."""

    def __init__(self, path: str, host: nn.Module, site: AdapterSite, ties: Ties, originals: Mapping[int, Tensor]) -> None:
        self._path, self._host, self._site, self._ties, self._originals = path, host, site, ties, originals
        self._wide: dict[str, Tensor] = {}
        self._refused: dict[str, str] = {}

    def merged(self, held: Sequence[tuple[str, Entry, nn.Module]]) -> Iterator[_Change]:
        """Merge adapters' modules, in order, and return what changes."""
        changed: set[str] = set()
        before: dict[str, Tensor] | None = None
        for name, entry, module in held:
            names = self._load(name, _spec(entry), _dtype_of(held, self._host))
            if before is None and _spec(entry).at != "weight":
                before = {key: self._wide[name] for key, name in names.items()}
            given = {key: self._wide[own] for key, own in names.items()}
            for key, value in self._merge(name, entry, module, given).items():
                if names[key] in self._refused:
                    raise self._refusal(name, self._refused[names[key]])
                self._wide[names[key]] = value
                changed.add(names[key])
        entries = [entry for _, entry, _ in held]
        if before is not None and needs_trial(self._host, entries):
            beside = [(name, entry) for name, entry, _ in held if _spec(entry).at != "weight"]
            wrong = difference(self._host, self._site, beside, before, {name: self._wide[name] for name in before})
            if wrong is not None:
                raise self._refusal(held[0][0], wrong)
        return (self._change(held[0][0], name) for name in self._wide if name in changed)

    def _load(self, adapter: str, spec: SiteSpec, dtype: torch.dtype) -> dict[str, str]:
        """Copy the tensors that a module may change; their names by those that the module knows them by.

        A weight is changed by all of them, so that one that must not be is an error here; a bias only if it is changed.
        """
        names = {"weight": spec.parameters} if spec.parameters else {"weight": ("weight",)}
        if not spec.parameters and isinstance(getattr(self._host, "bias", None), Tensor):
            names["bias"] = ("bias",)
        for key, all_names in names.items():
            name = all_names[0]
            reason = refusal(self._host, all_names, self._ties)
            if reason is not None and key == "weight":
                raise self._refusal(adapter, reason)
            if reason is not None:
                self._refused[name] = reason
            if name not in self._wide:
                tensor: Tensor = attrgetter(name)(self._host)
                self._wide[name] = self._originals.get(id(tensor), tensor.detach()).to(tensor.device, dtype)
        return {key: all_names[0] for key, all_names in names.items()}

    def _merge(self, adapter: str, entry: Entry, module: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What one module makes of the tensors, checked."""
        self._check_finite(adapter, "the adapter has", (*module.parameters(), *module.buffers()))
        module = _in_dtype(module, given["weight"].dtype)
        try:
            if isinstance(module, Mergeable):
                merged = module.merged(given)
            elif isinstance(module, Adapting) and _spec(entry).at == "weight":
                merged = {"weight": module.adapted(given["weight"])}
            else:
                method = members(entry.config)[_spec(entry).member].method
                raise CompatibilityError(f"{method!r} is no change of a weight; only methods that are can be merged")
        except CompatibilityError as error:
            raise self._refusal(adapter, str(error)) from error
        for key, value in merged.items():
            if key not in given or value.shape != given[key].shape:
                raise self._refusal(
                    adapter, f"its module returned {key!r} of shape {tuple(value.shape)}, for {list(given)}"
                )
        return merged

    def _change(self, adapter: str, name: str) -> _Change:
        """The final value of one Parameter, in its own dtype."""
        parameter = self._host.get_parameter(name)
        value = self._wide[name].detach().to(parameter.dtype)
        self._check_finite(adapter, f"in {parameter.dtype} the merged {name} would have", [value])
        return _Change(self._site, self._host, self._path, name, parameter, value)

    def _check_finite(self, adapter: str, what: str, tensors: Iterable[Tensor]) -> None:
        if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()):
            raise self._refusal(adapter, f"{what} values that are not finite (NaN, or too large)")

    def _refusal(self, adapter: str, reason: str) -> CompatibilityError:
        return CompatibilityError(
            f"adapter {adapter!r} cannot be merged into {self._path!r}: {reason}. Nothing was changed"
        )


def _spec(entry: Entry) -> SiteSpec:
    """The place of a module that is no head."""
    if entry.spec is None:
        raise CompatibilityError("a head has no place at which it could be merged")
    return entry.spec


def _dtype_of(held: Sequence[tuple[str, Entry, nn.Module]], host: nn.Module) -> torch.dtype:
    """float32, or float64 where the host's weights or the adapters are in it."""
    tensors = [*host.parameters(), *(parameter for _, _, module in held for parameter in module.parameters())]
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, or a copy of it that computes in this dtype."""
    if getattr(module, "compute_dtype", dtype) == dtype:
        return module
    wide = copy.deepcopy(module).to(dtype)
    shared = wide.__dict__.get("shared")  # of all but the first module of an adapter it is no child
    if isinstance(shared, nn.Module):
        shared.to(dtype)
    return wide


def _write(model: nn.Module, changes: Sequence[_Change]) -> None:
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
        change.site.originals[change.name] = Original(kept[key], digest(change.parameter))


def _copy(parameter: nn.Parameter) -> Tensor:
    """A tensor of its own, in memory, with the Parameter's values."""
    return parameter.detach().clone()


def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Change a Parameter in place, so that autograd notices."""
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.copy_(value)


def _reopen(model: nn.Module, record: Record, names: Sequence[str]) -> None:
    """Forget that these adapters are merged, and let their parameters train that did before."""
    for name in names:
        own = named_parameters(model, name, heads=False)
        for (_, parameter), trained in zip(own, record.merged.pop(name), strict=False):
            parameter.requires_grad_(trained)


def _settle(model: nn.Module, record: Record) -> None:
    """Have hooks run what is not in the weights."""
    record.activation.change_weights()
    forget_compiled()  # a compiler may have folded the weights into its graph
    apply(model, record)
