"""Compute what adapters make of the weights of their hosts, and check it; nothing is written yet."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...config.union import members
from ...errors import CompatibilityError
from ...methods.method import AdaptsParameter, Mergeable
from ...nn.shared import borrowed
from ...nn.twin import trained
from ...placement.spec import SiteSpec
from ...runtime.acting import acting_at
from ...runtime.lookup import sites_of
from ...runtime.originals import originals_of
from ...runtime.site import AdapterSite, SiteEntry
from ...structure.base_tensors import owner_at, parameter_at
from .mergeable import HolderKey, Ties, refusal
from .trial import difference, needs_trial

__all__ = ["Change", "merged_weights"]


@dataclass(frozen=True)
class Change:
    """A Parameter and what is to be written into it.

    Attributes:
        site: The site that keeps its original.
        host: The host that reads it.
        path: The host's path.
        names: Its names from the host on.
        value: In the Parameter's dtype.
        made_by: The `id`s of the modules that change it, in order.
    """

    site: AdapterSite
    host: nn.Module
    path: str
    names: tuple[str, ...]
    parameter: nn.Parameter
    value: Tensor
    made_by: tuple[int, ...]


@dataclass(frozen=True)
class _Merged:
    """One module that is to be merged into its host.

    Attributes:
        adapter: The adapter that it is of.
        entry: What the site knows of it.
        module: The module; of a tied Parameter's further sites the one that the first site trains.
    """

    adapter: str
    entry: SiteEntry
    module: nn.Module

    @property
    def is_beside(self) -> bool:
        """Tell whether it acts beside the host, on its input or output, and not on a Parameter."""
        return self.entry.spec.at != "weight"


def merged_weights(model: nn.Module, names: Sequence[str]) -> list[Change]:
    """Compute what these adapters, in order, make of the original weights; nothing is written yet.

    A tied Parameter has one change for each host that reads it, all with the same value.

    Raises:
        CompatibilityError: one of them cannot be merged; says where and why.
    """
    ties, originals, changed_alike = Ties(model), originals_of(model), _changed_alike(model, names)
    changes: list[Change] = []
    for path, host, site in sites_of(model):
        modules = [_Merged(name, entry, trained(held)) for name in names for entry, held in site.adapting(name)]
        if modules:
            # A stable sort: adapters that act in one way stay in the order of `names`.
            modules.sort(key=lambda one: _merge_rank(path, one.adapter, one.entry.spec.at))
            changes += _HostWeights(path, host, site, ties, originals, changed_alike).changes_by(modules)
    _check_agree(changes, names)
    return changes


def _merge_rank(path: str, adapter: str, at: str) -> int:
    """Return when a module is merged among those at one host, the lowest first. Raises CompatibilityError."""
    rank = acting_at(at).merge_rank
    if rank is None:
        raise CompatibilityError(
            f"adapter {adapter!r} cannot be merged into {path!r}: what it does there is no change of a weight ({at}). "
            "Nothing was changed"
        )
    return rank


def _changed_alike(model: nn.Module, names: Sequence[str]) -> dict[int, set[HolderKey]]:
    """Find the Parameters that the same modules change at each host where any of these adapters changes them.

    A tied Parameter may be merged there: all of these holders mean the same new value. Where one host has a module more
    than another, each would need a value of its own.

    Returns:
        A map from the `id` of each such Parameter to its holders.
    """
    holders: dict[int, set[HolderKey]] = {}
    modules_at: dict[int, dict[str, list[int]]] = {}  # Parameter -> path of a host -> modules there, each by its `id`
    for path, parameter, holder, module in _changed_parameters(model, names):
        holders.setdefault(id(parameter), set()).add(holder)
        modules = modules_at.setdefault(id(parameter), {}).setdefault(path, [])
        # A host that reads the Parameter under two names has one module for both.
        modules += [id(module)] if id(module) not in modules else []
    return {key: held for key, held in holders.items() if len(set(map(tuple, modules_at[key].values()))) == 1}


def _changed_parameters(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter, HolderKey, nn.Module]]:
    """Yield each Parameter that a module of these adapters changes: its host's path, itself, a holder, the module."""
    for path, host, site in sites_of(model):
        for entry, held in (pair for name in names for pair in site.adapting(name)):
            for owner, leaf in (owner_at(host, own) for own in entry.spec.parameters or ("weight",)):
                parameter = None if owner is None else parameter_at(owner, leaf)
                if parameter is not None:
                    yield path, parameter, (id(owner), leaf), trained(held)


def _check_agree(changes: Sequence[Change], names: Sequence[str]) -> None:
    """Raise CompatibilityError where hosts that read one Parameter would have it changed differently."""
    first: dict[int, Change] = {}
    for change in changes:
        other = first.setdefault(id(change.parameter), change)
        if other.made_by != change.made_by:
            raise CompatibilityError(
                f"adapter {names[-1]!r} cannot be merged into {change.path!r}: {other.path!r} reads the same "
                f"{change.names[0]}, which the adapter changes differently there. Nothing was changed"
            )


class _HostWeights:
    """Copies of one host's tensors in a wide dtype, into which adapters are merged module by module."""

    def __init__(
        self,
        path: str,
        host: nn.Module,
        site: AdapterSite,
        ties: Ties,
        originals: Mapping[int, Tensor],
        changed_alike: Mapping[int, set[HolderKey]],
    ) -> None:
        self._path, self._host, self._site, self._ties, self._originals = path, host, site, ties, originals
        self._changed_alike = changed_alike
        # All by a tensor's first name from the host on, such as "weight" or "in_proj_weight".
        self._wide: dict[str, Tensor] = {}  # its value so far
        self._before: dict[str, Tensor] = {}  # its value before the first module that acts beside the host
        self._names: dict[str, tuple[str, ...]] = {}  # all of its names
        self._refused: dict[str, str] = {}  # why it must not change
        self._made_by: dict[str, list[int]] = {}  # the modules that changed it, by their `id`

    def changes_by(self, modules: Sequence[_Merged]) -> Iterator[Change]:
        """Merge these modules, in their order, and return what changes.

        Raises:
            CompatibilityError: one of them cannot be merged, or the host would not return what it does with them.
        """
        dtype = _dtype_of(modules, self._host)
        for one in modules:
            self._merge(one, dtype)
        self._check_by_trial(modules)
        return (self._change(modules[0].adapter, name) for name in self._wide if name in self._made_by)

    def _merge(self, one: _Merged, dtype: torch.dtype) -> None:
        """Replace the tensors that one module changes."""
        # At a Parameter `adapted` is enough: it gives the whole new value, for each call or for good.
        if not (isinstance(one.module, Mergeable) or (isinstance(one.module, AdaptsParameter) and not one.is_beside)):
            config: Any = one.entry.config
            method = members(config)[one.entry.spec.member].method
            raise self._refusal(one.adapter, f"{method!r} is no change of a weight; only methods that are can be merged")
        names = self._load(one.adapter, one.entry.spec, dtype)
        if one.is_beside:
            for name in names.values():
                self._before.setdefault(name, self._wide[name])
        tensors = {key: self._wide[name] for key, name in names.items()}
        for key, value in self._values_after(one, tensors).items():
            name = names[key]
            if name in self._refused:
                raise self._refusal(one.adapter, self._refused[name])
            self._wide[name] = value
            self._made_by.setdefault(name, []).append(id(one.module))

    def _load(self, adapter: str, spec: SiteSpec, dtype: torch.dtype) -> dict[str, str]:
        """Copy the tensors that a module may change.

        Every module changes a weight, so one that must not change is an error here. A bias that must not is an error only
        once a module changes it.

        Returns:
            A map from the names that the module knows the tensors by ("weight", "bias") to those from the host on.
        """
        names = {"weight": spec.parameters} if spec.parameters else {"weight": ("weight",)}
        if not spec.parameters and isinstance(getattr(self._host, "bias", None), Tensor):
            names["bias"] = ("bias",)
        for key, all_names in names.items():
            name = all_names[0]
            reason = refusal(self._host, all_names, self._ties, self._changed_alike)
            if reason is not None and key == "weight":
                raise self._refusal(adapter, reason)
            if reason is not None:
                self._refused[name] = reason
            self._names[name] = all_names
            if name not in self._wide:
                tensor: Tensor = attrgetter(name)(self._host)
                # What is merged already is merged anew with the rest: sums onto a rounded weight would drift.
                self._wide[name] = self._originals.get(id(tensor), tensor.detach()).to(tensor.device, dtype)
        return {key: all_names[0] for key, all_names in names.items()}

    def _values_after(self, one: _Merged, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the tensors that one module changes, with their new values, checked; by the same names."""
        self._check_finite(one.adapter, "the adapter has", (*one.module.parameters(), *one.module.buffers()))
        module = _in_dtype(one.module, tensors["weight"].dtype)
        try:
            if isinstance(module, Mergeable):
                merged = module.merged(tensors)
            elif isinstance(module, AdaptsParameter):
                merged = {"weight": module.adapted(tensors["weight"])}
        except CompatibilityError as error:
            raise self._refusal(one.adapter, str(error)) from error
        for key, value in merged.items():
            if key not in tensors or value.shape != tensors[key].shape:
                raise self._refusal(
                    one.adapter, f"its module returned {key!r} of shape {tuple(value.shape)}, for {list(tensors)}"
                )
        return merged

    def _check_by_trial(self, modules: Sequence[_Merged]) -> None:
        """Raise CompatibilityError if the host, with the new weights, returns other than with these modules beside it."""
        if not self._before or not needs_trial(self._host, [one.entry for one in modules]):
            return
        beside = [(one.adapter, one.entry) for one in modules if one.is_beside]
        wrong = difference(self._host, self._site, beside, self._before, {name: self._wide[name] for name in self._before})
        if wrong is not None:
            raise self._refusal(modules[0].adapter, wrong)

    def _change(self, adapter: str, name: str) -> Change:
        """Return the final value of one Parameter, in its own dtype."""
        parameter = self._host.get_parameter(name)
        value = self._wide[name].detach().to(parameter.dtype)  # the only rounding
        self._check_finite(adapter, f"in {parameter.dtype} the merged {name} would have", [value])
        made_by = tuple(self._made_by[name])
        return Change(self._site, self._host, self._path, self._names[name], parameter, value, made_by)

    def _check_finite(self, adapter: str, what: str, tensors: Iterable[Tensor]) -> None:
        if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()):
            raise self._refusal(adapter, f"{what} values that are not finite (NaN, or too large)")

    def _refusal(self, adapter: str, reason: str) -> CompatibilityError:
        return CompatibilityError(
            f"adapter {adapter!r} cannot be merged into {self._path!r}: {reason}. Nothing was changed"
        )


def _dtype_of(modules: Sequence[_Merged], host: nn.Module) -> torch.dtype:
    """Return the dtype to merge in: float32, or float64 where the host's weights or the adapters are in it."""
    tensors = [*host.parameters(), *(parameter for one in modules for parameter in one.module.parameters())]
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module, or a copy of it that computes in this dtype."""
    if getattr(module, "compute_dtype", dtype) == dtype:
        return module
    wide = copy.deepcopy(module).to(dtype)
    shared = borrowed(wide)  # `to` passes over what another module holds
    if shared is not None:
        shared.to(dtype)
    return wide
