"""Where a combination sits: at all sites of its sources; and settings that lead there."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ...config.settings import AdapterConfig
from ...errors import TargetError
from ...nn.functional.slices import Slices
from ...placement.spec import SiteSpec
from .sources import SiteKey, Source, coverage, site_name

__all__ = ["addressing", "all_sites", "by_site", "check_same_sites", "target_fields"]

V = TypeVar("V")


def all_sites(sources: Sequence[Source]) -> dict[SiteKey, SiteSpec]:
    """Collect the sites that any source has; of a fused projection, with all slices that any source adapts.

    Example:
        "@attention.q" and "@attention.v" of one fused projection: one site, with the slices q and v.

    Raises:
        TargetError: two sources adapt different tensors at one site.
    """
    found: dict[SiteKey, tuple[Source, SiteSpec]] = {}
    for source in sources:
        for key, site in source.sites.items():
            first, held = found.setdefault(key, (source, site))
            if _tensor(held) != _tensor(site):
                raise TargetError(
                    f"at {site_name(site)!r}, {first.name!r} and {source.name!r} adapt different tensors: "
                    f"{_in_words(held)} and {_in_words(site)}"
                )
            # The first source stays the one that messages name; the slices grow with each.
            found[key] = first, replace(held, slices=_all_slices((held, first), (site, source)))
    return {key: site for key, (_, site) in found.items()}


def check_same_sites(sources: Sequence[Source]) -> None:
    """Raise TargetError unless all sources adapt the same tensors, and the same slices of them."""
    first, *others = sources
    for other in others:
        differing = coverage(first.sites.values()) ^ coverage(other.sites.values())  # what one of the two covers alone
        if differing:
            paths = sorted({key.path for key, _ in differing})
            raise TargetError(
                f"{first.name!r} and {other.name!r} do not adapt the same sites, and a missing one counts as nothing "
                f"only in methods whose changes add up: they differ at {paths[:4]}" + (", …" if len(paths) > 4 else "")
            )


def target_fields(config: AdapterConfig) -> list[str]:
    """Return the settings that name modules, such as ["targets"], or IA3's ["targets", "feedforward_targets"]."""
    return [name for name in type(config).model_fields if name.endswith("targets")]


def addressing(sources: Sequence[Source], sites: Iterable[SiteSpec], *, fields: Sequence[str]) -> dict[str, Any]:
    """Find settings that lead to these sites: those in `fields`, `exclude` and `layers`.

    Those that read most like the sources' own are tried first: the settings of one source, the targets of all, the layers
    of all. Last come the sites' own paths, which lead to every whole host or Parameter.

    Args:
        sources: What is combined.
        sites: Where the result sits: see `all_sites`.
        fields: The settings of the result's config that name modules.

    Raises:
        TargetError: no settings lead there, because slices of fused projections, or several fields, cannot be told apart
            by paths.
    """
    sites = list(sites)
    # Where a method's change becomes a LoRA, the method may name its targets in other fields than LoRA does.
    if all(target_fields(source.config) == list(fields) for source in sources):
        found = _reuse_one_source(sources, sites, fields)
        found = found or _unite_targets(sources, fields) or _unite_layers(sources, fields)
        if found is not None:
            return found
    return _list_paths(sources, sites, fields)


def _reuse_one_source(sources: Sequence[Source], sites: Sequence[SiteSpec], fields: Sequence[str]) -> dict[str, Any] | None:
    """Return the settings of the first source that has all of these sites; None if none has.

    Example:
        targets ("query",) and targets ("query", "up"), layers None: those of the second, whatever else differs.
    """
    for source in sources:
        if coverage(source.sites.values()) == coverage(sites):
            return {name: getattr(source.config, name) for name in (*fields, "exclude", "layers")}
    return None


def _unite_targets(sources: Sequence[Source], fields: Sequence[str]) -> dict[str, Any] | None:
    """Return the targets of all sources, if `exclude` and `layers` are equal in all; else None.

    Example:
        ("query",) and ("up",), both of layers (0,): targets ("query", "up"), layers (0,).
    """
    # Elsewhere the union would lead too far: to "up" in the layers of "query", or to what one source excludes.
    if not {"exclude", "layers"} <= _equal_settings(sources, ["exclude", "layers"]):
        return None
    first = sources[0].config
    targets = {name: _once(value for source in sources for value in getattr(source.config, name)) for name in fields}
    return {**targets, "exclude": first.exclude, "layers": first.layers}


def _unite_layers(sources: Sequence[Source], fields: Sequence[str]) -> dict[str, Any] | None:
    """Return the layers of all sources, if all else is equal in all; else None.

    Example:
        ("query",) in layers (0,) and ("query",) in layers (-1,): targets ("query",), layers (0, -1).
    """
    names = [*fields, "exclude"]
    if _equal_settings(sources, names) != {*names}:
        return None
    each = [source.config.layers for source in sources]
    # None is every layer. Negative indices stay as they are: the config then reads as the sources' do.
    layers = None if None in each else _once(index for own in each for index in own or ())
    return {**{name: getattr(sources[0].config, name) for name in names}, "layers": layers}


def _list_paths(sources: Sequence[Source], sites: Sequence[SiteSpec], fields: Sequence[str]) -> dict[str, Any]:
    r"""Return a pattern for each site that matches it alone. Raises TargetError where paths cannot name the sites.

    Example:
        "query" in layers (0,) and "up" in layers (1,): targets ("re:blocks\.0\.query", "re:blocks\.1\.up").
    """
    if len(fields) > 1 or any(site.slices for site in sites):
        what = "parts of fused projections are named by roles alone" if len(fields) == 1 else f"it has {list(fields)}"
        raise TargetError(
            f"no config leads to all sites of {[source.name for source in sources]}, which differ in more than their "
            f"targets: {what}. Give them equal exclude= and layers="
        )
    return {fields[0]: tuple(exactly(site) for site in sites), "exclude": (), "layers": None}


def exactly(site: SiteSpec) -> str:
    r"""Return the pattern that matches this host or Parameter and nothing else: "re:blocks\.0\.query"."""
    return f"re:{re.escape(site_name(site))}"


def by_site(values: Sequence[V], sites: Iterable[SiteSpec]) -> V | dict[str, V]:
    """Spell a setting that has a value at each site as a config does: one value, or a map with a default.

    Example:
        4, 4, 8 at "a", "b", "c": {"default": 4, "re:c": 8}.

    Args:
        values: The value at each site.
        sites: The sites, in the same order.
    """
    # The most frequent value becomes the default, so that the fewest sites need a key of their own.
    ((default, count),) = Counter(values).most_common(1)
    if count == len(values):
        return default
    # A Parameter has its own key in any case: that of a module around it would fit it as well, and the longer one wins.
    kept = {exactly(site): v for site, v in zip(sites, values, strict=True) if v != default or site.parameters}
    return {"default": default, **kept}


def _equal_settings(sources: Sequence[Source], names: Iterable[str]) -> set[str]:
    """Return those of the settings that all sources have the same value of."""
    return {name for name in names if len({getattr(source.config, name) for source in sources}) == 1}


def _once(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return the values in their order, each once."""
    return tuple(dict.fromkeys(values))


def _tensor(site: SiteSpec) -> tuple[object, ...]:
    """Return what tells which tensor a module adapts and reads: its location, and the shape that it was made for."""
    return site.location, site.axis, site.input_width, site.width


def _in_words(site: SiteSpec) -> str:
    """Say which tensor a module adapts and what it reads: "at=output, reads=site, axis=-1, width=(8, 8)"."""
    always = {"at": site.at, "reads": site.reads, "axis": site.axis, "width": (site.input_width, site.width)}
    optional = {"output": site.output, "input": site.input, "residual": site.residual}
    return ", ".join(f"{key}={value}" for key, value in {**always, **optional}.items() if value is not None)


def _all_slices(one: tuple[SiteSpec, Source], other: tuple[SiteSpec, Source]) -> Slices:
    """Return the slices that either has of one tensor; () if one of them has the whole.

    Raises:
        TargetError: they mean different features by one name.
    """
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
    # In the order of the features, as roles give them; else the combined config would lead to other slices.
    return tuple(sorted(ranges.items(), key=lambda part: part[1]))
