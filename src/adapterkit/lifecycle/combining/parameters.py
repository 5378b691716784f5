"""Combine adapters parameter by parameter: sums where a method is linear in them, means where it is not."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...nn.functional.slices import SliceLayout
from ...placement.spec import SiteSpec
from .addressing import addressing, all_sites, check_same_sites, target_fields
from .sources import Combined, SiteKey, Source, check_settings, site_name, wide

__all__ = ["averaged", "common_dtype", "settled", "summed", "with_settings"]


def summed(sources: Sequence[Source], neutral: float) -> Combined:
    """Return the adapter whose parameters are neutral + sum of weight * (parameter - neutral).

    A source without a module at a site adds nothing there. It sits at all sites of its sources.

    Args:
        sources: What is summed, all of one method.
        neutral: What every parameter of an adapter that changes nothing is: 1 for IA3, which multiplies; 0 where one adds.

    Raises:
        ConfigError: the sources differ in a setting or a frozen tensor.
        TargetError: see `all_sites` and `addressing`.
    """
    fields = target_fields(sources[0].config)
    check_settings(sources, {*fields, "exclude", "layers", *_transient(sources[0])})
    sites = all_sites(sources)
    states = {key: _weighted_sum(key, site, sources, neutral) for key, site in sites.items()}
    settings = addressing(sources, sites.values(), fields=fields) | settled(sources)
    return Combined(with_settings(sources[0], settings), list(sites.values()), states)


def averaged(sources: Sequence[Source]) -> Combined:
    """Return the adapter whose parameters are the weighted mean, for methods that are not linear in them.

    Raises:
        ConfigError: the weights do not sum to one; the sources differ in a setting, a shape or a frozen tensor.
        TargetError: the sources do not adapt the same sites.
    """
    total = sum(source.weight for source in sources)
    if not math.isclose(total, 1.0, rel_tol=1e-6):
        raise ConfigError(
            f"{sources[0].config.method!r} is not linear in its parameters, so that only a mean of them can be taken, with "
            f"weights that sum to 1; these sum to {total:g}"
        )
    fields = target_fields(sources[0].config)
    check_settings(sources, {*fields, "exclude", "layers", *_transient(sources[0])})
    check_same_sites(sources)  # no number stands for a missing bottleneck, as zero does for a missing sum
    sites = all_sites(sources)
    states = {key: _weighted_sum(key, site, sources, 0.0) for key, site in sites.items()}
    return Combined(with_settings(sources[0], settled(sources)), list(sites.values()), states)


def _transient(source: Source) -> set[str]:
    """Name the settings that matter while an adapter is made or trained, not for what it computes."""
    # Of a LoRA these are {"seed", "dtype", "init", "dropout"}.
    return {"seed", "dtype", *source.config.at_start, *source.config.in_training}


def settled(sources: Sequence[Source]) -> dict[str, Any]:
    """Return the result's values of settings that sums do not depend on: the least dropout, the widest dtype."""
    settings: dict[str, Any] = {
        name: min(getattr(source.config, name, 0.0) for source in sources) for name in sources[0].config.in_training
    }
    if len({source.config.dtype for source in sources}) > 1:
        tensors = [p for source in sources for module in source.modules.values() for p in module.parameters()]
        settings["dtype"] = str(common_dtype(tensors)).removeprefix("torch.")
    return settings


def with_settings(source: Source, settings: Mapping[str, Any]) -> Any:
    """Return a source's config with these settings instead of its own."""
    # Only those that differ: what `override` is given counts as set, and may rule out settings that exclude it.
    return source.config.override({name: v for name, v in settings.items() if getattr(source.config, name) != v})


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the narrowest dtype that holds the values of all: float32 for bfloat16 and float16."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _weighted_sum(key: SiteKey, site: SiteSpec, sources: Sequence[Source], neutral: float) -> dict[str, Tensor]:
    """Return the tensors of the module at one site, by their names in it.

    Parameters become neutral + sum of weight * (parameter - neutral). Frozen tensors, which are equal in all sources, stay.

    Args:
        key: Which module of each source is meant.
        site: Where the result sits.
        sources: All sources; those without this module add nothing.
        neutral: As in `summed`.
    """
    there = [source for source in sources if key in source.modules]
    held = [source.modules[key].state_dict() for source in there]
    trained = {name for name, parameter in there[0].modules[key].named_parameters() if parameter.is_floating_point()}
    _check_same(key, site, there, held, trained)
    state = {}
    for name, first in held[0].items():
        if name not in trained:
            state[name] = first.detach().clone()  # frozen, such as the bases of a VeRA
            continue
        tensors = [own[name] for own in held]
        terms = [
            source.weight * _at_slices_of(site, source.sites[key], wide(tensor) - neutral)
            for source, tensor in zip(there, tensors, strict=True)
        ]
        state[name] = (sum(terms[1:], terms[0]) + neutral).to(common_dtype(tensors))  # the only rounding
    return state


def _check_same(
    key: SiteKey, site: SiteSpec, there: Sequence[Source], held: Sequence[Mapping[str, Tensor]], trained: Set[str]
) -> None:
    """Raise ConfigError unless the sources have tensors of the same shapes, and the same values where none is trained.

    Args:
        key: Which module of each source is meant.
        site: Where the result sits.
        there: The sources that have it.
        held: The tensors of each of these modules, by their names in it.
        trained: The names of those that are trained.
    """
    (first, *others), (ours, *rest) = there, held
    for source, theirs in zip(others, rest, strict=True):
        # Of other slices the shapes must differ: each has the values of its own features. They meet in the sum.
        if first.sites[key].slices == source.sites[key].slices:
            shapes, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (ours, theirs))
            if shapes != found:
                raise ConfigError(
                    f"{first.name!r} and {source.name!r} have tensors of other shapes at {site_name(site)!r}: {shapes} and "
                    f"{found}"
                )
        frozen = [name for name in ours if name not in trained and not torch.equal(ours[name].cpu(), theirs[name].cpu())]
        if frozen:
            raise ConfigError(
                f"the frozen tensors {frozen} at {site_name(site)!r} are others in {first.name!r} than in {source.name!r}, "
                "so that their parameters do not mean the same; adapters made with one seed have the same"
            )


def _at_slices_of(new: SiteSpec, old: SiteSpec, values: Tensor) -> Tensor:
    """Return values of the features that `old` covers as those of `new`, which covers more; zero for what is added.

    Shape: values (..., covered by old), result (..., covered by new).
    """
    if old.slices == new.slices:
        return values
    return SliceLayout(new.width, new.slices).pick(SliceLayout(old.width, old.slices).spread(values))
