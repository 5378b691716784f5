"""Which repeated block a module lies in: the `layers` of a config, and settings by layer or pattern."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..config.settings import AdapterConfig
from ..errors import TargetError
from .patterns import matching
from .spec import SiteSpec

__all__ = [
    "check_dropped",
    "check_layers",
    "check_maps",
    "in_layers",
    "layer_of",
    "setting_at",
    "settings_site",
    "stack_of",
]

Layer = tuple[int, int]


def layer_of(path: str, modules: Mapping[str, nn.Module]) -> Layer | None:
    """(index, count) of the outermost repeated block that holds the module: in an nn.ModuleList, else a Sequential."""
    place = stack_of(path, modules)
    return place and place[1:]


def stack_of(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, int, int] | None:
    """What holds that block, the block's index, and the count."""
    parts = path.split(".")
    for kind in (nn.ModuleList, nn.Sequential):
        for n in range(len(parts)):
            stack = ".".join(parts[:n])
            if isinstance(modules[stack], kind):
                return stack, list(modules[stack]._modules).index(parts[n]), len(modules[stack]._modules)
    return None


def in_layers(layer: Layer | None, wanted: Sequence[int] | None) -> bool:
    """Whether a layer is one of those wanted, which may be counted from the end; None wants all."""
    return wanted is None or bool(_spellings(layer) & set(wanted))


def check_layers(layers: Iterable[Layer | None], wanted: Sequence[int] | None) -> None:
    """Raise TargetError unless something lies in each of the wanted layers."""
    layers = list(layers)
    missing = [index for index in wanted or () if not any(index in _spellings(layer) for layer in layers)]
    if missing:
        there = sorted({layer[0] for layer in layers if layer})
        raise TargetError(
            f"layers={list(wanted or ())}: none of the {len(layers)} modules that match lies in {missing}; "
            + (f"they lie in layers {there}" if there else "none of them lies in a repeated block")
        )


def check_dropped(layers: Collection[Layer | None], dropped: Sequence[int]) -> None:
    """Raise TargetError where a layer to drop is none of the blocks around the places of the adapters."""
    counts = {layer[1] for layer in layers if layer}
    missing = [index for index in dropped if not any(-count <= index < count for count in counts)]
    if missing:
        there = " and ".join(map(str, sorted(counts)))
        raise TargetError(
            f"Drop with layers={list(dropped)}: "
            + (
                f"there is no layer {missing}; the adapters lie in repeated blocks, of which there are {there}"
                if counts
                else f"none of the {len(layers)} places of the adapters lies in a repeated block"
            )
        )


def setting_at(value: Any, site: SiteSpec) -> Any:
    """A setting that may be a map by layer index or pattern, at one site: the longest key that fits wins."""
    if not isinstance(value, Mapping):
        return value
    fitting = [key for key in value if key != "default" and _fits(key, site)]
    return value[max(fitting, key=len, default="default")]


def check_maps(config: AdapterConfig, sites: Sequence[SiteSpec]) -> None:
    """Raise TargetError where a pattern in a map of settings fits no site: it would be without effect, in silence."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        patterns = [key for key in value if key != "default" and not key.isdecimal()] if isinstance(value, Mapping) else []
        idle = [key for key in patterns if not any(_fits(key, site) for site in sites)]
        if idle:
            raise TargetError(
                f"{name} has values for {idle}, which fit none of the {len(sites)} sites, such as "
                f"{[site.path for site in sites[:3]]}"
            )


def settings_site(config: AdapterConfig, sites: Sequence[SiteSpec]) -> SiteSpec:
    """Of the sites of one tied Parameter that at which its settings are looked up: the first that a pattern names.

    Raises:
        TargetError: patterns name several, with other values.
    """
    values = [getattr(config, name) for name in type(config).model_fields]
    maps = [value for value in values if isinstance(value, Mapping)]
    keys = [key for value in maps for key in value if key != "default" and not key.isdecimal()]
    named = [site for site in sites if any(_fits(key, site) for key in keys)]
    if any(setting_at(value, site) != setting_at(value, named[0]) for site in named for value in maps):
        raise TargetError(
            f"{[site.path for site in named]} hold one Parameter, which has one change, but settings differ between them; "
            "give them the same"
        )
    return (named or sites)[0]


def _fits(key: str, site: SiteSpec) -> bool:
    """Whether a layer index is the site's, or a pattern matches its host or the Parameter there."""
    if key.isdecimal():
        return site.layer is not None and int(key) == site.layer[0]
    names = [site.path, *(f"{site.path}.{parameter}".lstrip(".") for parameter in site.parameters)]
    return bool(matching(key, dict.fromkeys(names)))


def _spellings(layer: Layer | None) -> set[int]:
    return {layer[0], layer[0] - layer[1]} if layer else set()
