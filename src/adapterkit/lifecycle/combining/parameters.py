"""Combinations parameter by parameter: sums where a method is linear in them, averages where it is not."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...nn.functional.slices import SliceLayout
from ...placement.spec import SiteSpec
from .addressing import addressing, all_sites, check_same_places, target_fields
from .sources import Combined, SiteKey, Source, check_settings, site_name, wide

__all__ = ["averaged", "changed", "common_dtype", "settled", "summed"]


def summed(sources: Sequence[Source], neutral: float) -> Combined:
    """The weighted sum of what parameters are beyond `neutral`; of a source without a module at a place, nothing.

    Raises:
        ConfigError: the sources differ in a setting or a frozen tensor.
        TargetError: see `all_sites` and `addressing`.
    """
    fields = target_fields(sources[0].config)
    check_settings(sources, {*fields, "exclude", "layers", *_transient(sources[0])})
    sites = all_sites(sources)
    states = {place: _weighted(place, site, sources, neutral) for place, site in sites.items()}
    settings = addressing(sources, sites.values(), fields=fields) | settled(sources)
    return Combined(changed(sources[0], settings), list(sites.values()), states)


def averaged(sources: Sequence[Source]) -> Combined:
    """The weighted mean of the parameters, for methods that are not linear in them.

    Raises:
        ConfigError: the weights do not sum to one; the sources differ in a setting, a shape or a frozen tensor.
        TargetError: the sources do not sit at the same places.
    """
    total = sum(source.weight for source in sources)
    if not math.isclose(total, 1.0, rel_tol=1e-6):
        raise ConfigError(
            f"{sources[0].config.method!r} is not linear in its parameters, so that only a mean of them can be taken, with "
            f"weights that sum to 1; these sum to {total:g}"
        )
    fields = target_fields(sources[0].config)
    check_settings(sources, {*fields, "exclude", "layers", *_transient(sources[0])})
    check_same_places(sources)
    sites = all_sites(sources)
    states = {place: _weighted(place, site, sources, 0.0) for place, site in sites.items()}
    return Combined(changed(sources[0], settled(sources)), list(sites.values()), states)


def _transient(source: Source) -> set[str]:
    """Name the settings that matter while an adapter is made or trained, not for what it computes."""
    return {"seed", "dtype", *source.config.at_start, *source.config.in_training}


def settled(sources: Sequence[Source]) -> dict[str, Any]:
    """Transient settings in which sources differ: the least dropout, the widest dtype."""
    settings: dict[str, Any] = {
        name: min(getattr(source.config, name, 0.0) for source in sources) for name in sources[0].config.in_training
    }
    if len({source.config.dtype for source in sources}) > 1:
        tensors = [p for source in sources for module in source.modules.values() for p in module.parameters()]
        settings["dtype"] = str(common_dtype(tensors)).removeprefix("torch.")
    return settings


def changed(source: Source, settings: Mapping[str, Any]) -> Any:
    """A source's config with these settings; those that it has are not given anew."""
    return source.config.override({name: v for name, v in settings.items() if getattr(source.config, name) != v})


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds the values of all."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _weighted(place: SiteKey, site: SiteSpec, sources: Sequence[Source], neutral: float) -> dict[str, Tensor]:
    """The tensors at one place: of parameters neutral + sum of weight * (parameter - neutral), of others the same ones."""
    there = [source for source in sources if place in source.modules]
    held = [source.modules[place].state_dict() for source in there]
    trained = {name for name, parameter in there[0].modules[place].named_parameters() if parameter.is_floating_point()}
    _check_same(place, site, there, held, trained)
    state = {}
    for key, first in held[0].items():
        tensors = [tensors[key] for tensors in held]
        terms = [
            source.weight * _refitted(wide(tensor) - neutral, source.sites[place], site)
            for source, tensor in zip(there, tensors, strict=True)
        ]
        total = (sum(terms[1:], terms[0]) + neutral).to(common_dtype(tensors))
        state[key] = total if key in trained else first.detach().clone()
    return state


def _check_same(
    place: SiteKey, site: SiteSpec, there: Sequence[Source], held: Sequence[Mapping[str, Tensor]], trained: Set[str]
) -> None:
    """Raise ConfigError unless the sources have tensors of the same shapes, and the same values where none is trained."""
    (first, *others), (ours, *rest) = there, held
    for source, theirs in zip(others, rest, strict=True):
        if first.sites[place].slices == source.sites[place].slices:
            shapes, found = ({key: tuple(t.shape) for key, t in tensors.items()} for tensors in (ours, theirs))
            if shapes != found:
                raise ConfigError(
                    f"{first.name!r} and {source.name!r} have tensors of other shapes at {site_name(site)!r}: {shapes} and "
                    f"{found}"
                )
        frozen = [key for key in ours if key not in trained and not torch.equal(ours[key].cpu(), theirs[key].cpu())]
        if frozen:
            raise ConfigError(
                f"the frozen tensors {frozen} at {site_name(site)!r} are others in {first.name!r} than in {source.name!r}, "
                "so that their parameters do not mean the same; adapters made with one seed have the same"
            )


def _refitted(values: Tensor, old: SiteSpec, new: SiteSpec) -> Tensor:
    """Values of the features that a site covers as those of a site that covers more. Shape: (..., covered)."""
    if old.slices == new.slices:
        return values
    return SliceLayout(new.width, new.slices).pick(SliceLayout(old.width, old.slices).spread(values))
