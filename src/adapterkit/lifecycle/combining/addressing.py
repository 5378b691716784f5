"""Where a combination sits: all places of its sources, and settings that lead there."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ...config.settings import AdapterConfig
from ...errors import TargetError
from ...nn.functional.slices import Slices
from ...placement.spec import SiteSpec
from .sources import SiteKey, Source, site_name

__all__ = ["addressing", "all_sites", "by_site", "check_same_places", "target_fields"]

V = TypeVar("V")


def all_sites(sources: Sequence[Source]) -> dict[SiteKey, SiteSpec]:
    """The places that any source has; of a fused projection, all parts.

    Raises:
        TargetError: two sources adapt different tensors there.
    """
    found: dict[SiteKey, tuple[Source, SiteSpec]] = {}
    for source in sources:
        for place, site in source.sites.items():
            first, held = found.setdefault(place, (source, site))
            if _tensor(held) != _tensor(site):
                raise TargetError(
                    f"at {site_name(site)!r}, {first.name!r} and {source.name!r} adapt different tensors: {_tensor(held)} "
                    f"and {_tensor(site)}"
                )
            found[place] = first, replace(held, slices=_all_parts((held, first), (site, source)))
    return {place: site for place, (_, site) in found.items()}


def check_same_places(sources: Sequence[Source]) -> None:
    """Raise TargetError unless all sources sit at the same places."""
    first, *others = sources
    for other in others:
        differing = first.sites.keys() ^ other.sites.keys()
        differing |= {p for p in first.sites.keys() & other.sites.keys() if first.sites[p].slices != other.sites[p].slices}
        if differing:
            paths = sorted({place.path for place in differing})
            raise TargetError(
                f"{first.name!r} and {other.name!r} do not sit at the same places, and what is missing counts as nothing "
                f"in methods alone whose changes add up: they differ at {paths[:4]}" + (", …" if len(paths) > 4 else "")
            )


def target_fields(config: AdapterConfig) -> list[str]:
    """The settings that name modules."""
    return [name for name in type(config).model_fields if name.endswith("targets")]


def addressing(sources: Sequence[Source], sites: Iterable[SiteSpec], *, fields: Sequence[str]) -> dict[str, Any]:
    """Settings `fields` (those of the result that name modules), `exclude` and `layers` that lead to these sites.

    Those of a source, if it has all sites; else the targets or the layers of all of them; else the sites' own paths.

    Raises:
        TargetError: none do, because parts of fused projections, or several kinds of places, are not named by a path.
    """
    sites = list(sites)
    wanted = {(site_name(site), site.tag, site.slices) for site in sites}
    configs: list[Any] = [source.config for source in sources]
    names = [*fields, "exclude", "layers"]
    if all(target_fields(config) == list(fields) for config in configs):
        for source in sources:
            if {(site_name(site), site.tag, site.slices) for site in source.sites.values()} == wanted:
                return {name: getattr(source.config, name) for name in names}
        same = {name for name in names if len({getattr(config, name) for config in configs}) == 1}
        settings = {name: getattr(configs[0], name) for name in names}
        if {"exclude", "layers"} <= same:
            return settings | {name: _once(v for c in configs for v in getattr(c, name)) for name in fields}
        if same == {*names} - {"layers"}:
            every = [config.layers for config in configs]
            return settings | {"layers": None if None in every else _once(index for layers in every for index in layers)}
    if len(fields) > 1 or any(site.slices for site in sites):
        what = "parts of fused projections are named by roles alone" if len(fields) == 1 else f"it has {list(fields)}"
        raise TargetError(
            f"no config leads to all places of {[source.name for source in sources]}, which differ in more than their "
            f"targets: {what}. Give them equal exclude= and layers="
        )
    return {fields[0]: tuple(exactly(site) for site in sites), "exclude": (), "layers": None}


def exactly(site: SiteSpec) -> str:
    """A pattern for one host or Parameter."""
    return f"re:{re.escape(site_name(site))}"


def by_site(values: Sequence[V], sites: Iterable[SiteSpec]) -> V | dict[str, V]:
    """A setting with a value for each site, as a config spells it: one value, or a map."""
    ((default, count),) = Counter(values).most_common(1)
    if count == len(values):
        return default
    # A Parameter has its own key in any case: that of a module around it would fit it as well, and the longer one wins.
    kept = {exactly(site): v for site, v in zip(sites, values, strict=True) if v != default or site.parameters}
    return {"default": default, **kept}


def _once(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _tensor(site: SiteSpec) -> str:
    """Which tensor of the host is adapted, and what is read."""
    parts = {"at": site.at, "reads": site.reads, "axis": site.axis, "width": (site.input_width, site.width)}
    optional = {"output": site.output, "input": site.input, "residual": site.residual}
    return ", ".join(f"{key}={value}" for key, value in {**parts, **optional}.items() if value is not None)


def _all_parts(one: tuple[SiteSpec, Source], other: tuple[SiteSpec, Source]) -> Slices:
    """The parts that either has; () if one of them has the whole."""
    (site, source), (more, adding) = one, other
    if not site.slices or not more.slices:
        return ()
    ranges = dict(site.slices)
    for name, held in more.slices:
        if ranges.setdefault(name, held) != held:
            raise TargetError(
                f"at {site_name(site)!r}, {source.name!r} and {adding.name!r} mean other features by {name!r}: "
                f"{ranges[name]} and {held}"
            )
    return tuple(sorted(ranges.items(), key=lambda part: part[1]))
