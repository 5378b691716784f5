"""What adapters make of the weights of their hosts: computed and checked, not yet written."""

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
from .mergeable import Ties, refusal
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


def merged_weights(model: nn.Module, names: Sequence[str]) -> list[Change]:
    """What these adapters, in order, make of the original weights; of a tied one the same at each host that reads it.

    Raises:
        CompatibilityError: one of them cannot be merged; says where and why.
    """
    ties, originals, covered = Ties(model), originals_of(model), _covered(model, names)
    changes: list[Change] = []
    for path, host, site in sites_of(model):
        held = [(name, *pair) for name in names for pair in site.adapting(name)]
        if held:
            held.sort(key=lambda item: _merge_rank(path, item[0], item[1].spec.at))
            changes += _HostWeights(path, host, site, ties, originals, covered).merged(held)
    _check_agree(changes, names)
    return changes


def _merge_rank(path: str, adapter: str, at: str) -> int:
    """Return the place of a module in the order in which those at one host are merged. Raises CompatibilityError."""
    rank = acting_at(at).merge_rank
    if rank is None:
        raise CompatibilityError(
            f"adapter {adapter!r} cannot be merged into {path!r}: what it does there is no change of a weight ({at}). "
            "Nothing was changed"
        )
    return rank


def _covered(model: nn.Module, names: Sequence[str]) -> dict[int, set[tuple[int, str]]]:
    """By the `id` of each Parameter that the same modules change wherever any does: its holders there, and its names."""
    holders: dict[int, set[tuple[int, str]]] = {}
    acting: dict[int, dict[str, list[int]]] = {}
    for path, host, site in sites_of(model):
        for entry, module in (pair for name in names for pair in site.adapting(name)):
            for owner, leaf in (owner_at(host, own) for own in entry.spec.parameters or ("weight",)):
                parameter = None if owner is None else parameter_at(owner, leaf)
                if parameter is not None:
                    holders.setdefault(id(parameter), set()).add((id(owner), leaf))
                    acts = acting.setdefault(id(parameter), {}).setdefault(path, [])
                    acts += [id(trained(module))] if id(trained(module)) not in acts else []
    return {key: held for key, held in holders.items() if len({tuple(acts) for acts in acting[key].values()}) == 1}


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
    """Copies of one host's tensors, wide, into which adapters are merged."""

    def __init__(
        self,
        path: str,
        host: nn.Module,
        site: AdapterSite,
        ties: Ties,
        originals: Mapping[int, Tensor],
        covered: Mapping[int, set[tuple[int, str]]],
    ) -> None:
        self._path, self._host, self._site, self._ties, self._originals = path, host, site, ties, originals
        self._covered = covered
        self._wide: dict[str, Tensor] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._refused: dict[str, str] = {}

    def merged(self, held: Sequence[tuple[str, SiteEntry, nn.Module]]) -> Iterator[Change]:
        """Merge adapters' modules, in order, and return what changes."""
        changed: dict[str, list[int]] = {}
        before: dict[str, Tensor] | None = None
        for name, entry, held_module in held:
            module = trained(held_module)
            if not (isinstance(module, Mergeable) or (isinstance(module, AdaptsParameter) and entry.spec.at == "weight")):
                config: Any = entry.config
                method = members(config)[entry.spec.member].method
                raise self._refusal(name, f"{method!r} is no change of a weight; only methods that are can be merged")
            names = self._load(name, entry.spec, _dtype_of(held, self._host))
            if before is None and entry.spec.at != "weight":
                before = {key: self._wide[name] for key, name in names.items()}
            given = {key: self._wide[own] for key, own in names.items()}
            for key, value in self._merge(name, entry, module, given).items():
                if names[key] in self._refused:
                    raise self._refusal(name, self._refused[names[key]])
                self._wide[names[key]] = value
                changed.setdefault(names[key], []).append(id(module))
        entries = [entry for _, entry, _ in held]
        if before is not None and needs_trial(self._host, entries):
            beside = [(name, entry) for name, entry, _ in held if entry.spec.at != "weight"]
            wrong = difference(self._host, self._site, beside, before, {name: self._wide[name] for name in before})
            if wrong is not None:
                raise self._refusal(held[0][0], wrong)
        return (self._change(held[0][0], name, changed[name]) for name in self._wide if name in changed)

    def _load(self, adapter: str, spec: SiteSpec, dtype: torch.dtype) -> dict[str, str]:
        """Copy the tensors that a module may change; their names by those that the module knows them by.

        A weight is changed by all of them, so that one that must not be is an error here; a bias only if it is changed.
        """
        names = {"weight": spec.parameters} if spec.parameters else {"weight": ("weight",)}
        if not spec.parameters and isinstance(getattr(self._host, "bias", None), Tensor):
            names["bias"] = ("bias",)
        for key, all_names in names.items():
            name = all_names[0]
            reason = refusal(self._host, all_names, self._ties, self._covered)
            if reason is not None and key == "weight":
                raise self._refusal(adapter, reason)
            if reason is not None:
                self._refused[name] = reason
            self._names[name] = all_names
            if name not in self._wide:
                tensor: Tensor = attrgetter(name)(self._host)
                self._wide[name] = self._originals.get(id(tensor), tensor.detach()).to(tensor.device, dtype)
        return {key: all_names[0] for key, all_names in names.items()}

    def _merge(self, adapter: str, entry: SiteEntry, module: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What one module makes of the tensors, checked."""
        self._check_finite(adapter, "the adapter has", (*module.parameters(), *module.buffers()))
        module = _in_dtype(module, given["weight"].dtype)
        try:
            if isinstance(module, Mergeable):
                merged = module.merged(given)
            elif isinstance(module, AdaptsParameter):
                merged = {"weight": module.adapted(given["weight"])}
        except CompatibilityError as error:
            raise self._refusal(adapter, str(error)) from error
        for key, value in merged.items():
            if key not in given or value.shape != given[key].shape:
                raise self._refusal(
                    adapter, f"its module returned {key!r} of shape {tuple(value.shape)}, for {list(given)}"
                )
        return merged

    def _change(self, adapter: str, name: str, made_by: Sequence[int]) -> Change:
        """The final value of one Parameter, in its own dtype."""
        parameter = self._host.get_parameter(name)
        value = self._wide[name].detach().to(parameter.dtype)
        self._check_finite(adapter, f"in {parameter.dtype} the merged {name} would have", [value])
        return Change(self._site, self._host, self._path, self._names[name], parameter, value, tuple(made_by))

    def _check_finite(self, adapter: str, what: str, tensors: Iterable[Tensor]) -> None:
        if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()):
            raise self._refusal(adapter, f"{what} values that are not finite (NaN, or too large)")

    def _refusal(self, adapter: str, reason: str) -> CompatibilityError:
        return CompatibilityError(
            f"adapter {adapter!r} cannot be merged into {self._path!r}: {reason}. Nothing was changed"
        )


def _dtype_of(held: Sequence[tuple[str, SiteEntry, nn.Module]], host: nn.Module) -> torch.dtype:
    """float32, or float64 where the host's weights or the adapters are in it."""
    tensors = [*host.parameters(), *(parameter for _, _, module in held for parameter in module.parameters())]
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, or a copy of it that computes in this dtype."""
    if getattr(module, "compute_dtype", dtype) == dtype:
        return module
    wide = copy.deepcopy(module).to(dtype)
    shared = borrowed(wide)  # `to` passes over what another module holds
    if shared is not None:
        shared.to(dtype)
    return wide
