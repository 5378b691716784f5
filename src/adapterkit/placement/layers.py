"""Which repeated block a module lies in: the `layers` of a config, and settings by layer or pattern."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from ..config.settings import AdapterConfig
from ..errors import TargetError
from .patterns import matching
from .spec import SiteSpec

__all__ = [
    "Layer",
    "check_dropped",
    "check_layers",
    "check_maps",
    "in_layers",
    "layers_matter",
    "setting_at",
    "settings_site",
    "stack_of",
]

Layer = tuple[int, int]
"""(index, count): which of a stack of repeated blocks, and how many there are."""


def stack_of(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, int, int] | None:
    """Return the path of the outermost list around a module, with the index of the item in it, and its count.

    It is an nn.ModuleList or, where there is none around the module, an nn.Sequential; None if there is neither.
    """
    parts = path.split(".")
    # Lists first: a Sequential inside a block is no stack of blocks, and one around the list may be the whole model.
    for kind in (nn.ModuleList, nn.Sequential):
        # From the outside in. The module itself is left out: a container is not in itself.
        for n in range(len(parts)):
            stack = ".".join(parts[:n])
            if isinstance(modules[stack], kind):
                # Its position, for the name need not be a number: blocks may have been named, or taken out.
                return stack, list(modules[stack]._modules).index(parts[n]), len(modules[stack]._modules)
    return None


def layers_matter(config: AdapterConfig) -> bool:
    """Tell whether a config speaks of layers by their index."""
    return config.layers is not None or any(key.isdecimal() for value in _maps_in(config).values() for key in value)


def in_layers(layer: Layer | None, wanted: Sequence[int] | None) -> bool:
    """Tell whether a layer is one of those wanted, which may be counted from the end; None wants all."""
    return wanted is None or bool(_indices(layer) & set(wanted))


def check_layers(layers: Mapping[str, Layer | None], wanted: Sequence[int] | None) -> None:
    """Raise TargetError unless each target lies in a block, and some target in each of the wanted layers.

    Args:
        layers: Map the path of each target → its layer.
    """
    if wanted is None:
        return
    found = [layer for layer in layers.values() if layer is not None]
    missing = [index for index in wanted if not any(index in _indices(layer) for layer in found)]
    if missing:
        there = sorted({layer[0] for layer in found})
        raise TargetError(
            f"layers={list(wanted)}: none of the {len(layers)} modules that match lies in {missing}; "
            + (f"they lie in layers {there}" if there else "none of them lies in a repeated block")
        )
    outside = [path for path, layer in layers.items() if layer is None]
    if outside:
        raise TargetError(
            f"layers={list(wanted)}: {outside} match, but lie in no repeated block, so that no layer says whether they are "
            "meant; leave them out with exclude=, or adapt them by a config of their own"
        )


def check_dropped(layers: Collection[Layer | None], dropped: Sequence[int]) -> None:
    """Raise TargetError where a layer to drop is none of the blocks around the sites of the adapters."""
    # Several stacks may be of different heights, as an encoder and a decoder: an index need exist in one of them.
    counts = {layer[1] for layer in layers if layer}
    missing = [index for index in dropped if not any(-count <= index < count for count in counts)]
    if not missing:
        return
    there = " and ".join(map(str, sorted(counts)))
    reason = (
        f"there is no layer {missing}; the adapters lie in repeated blocks, of which there are {there}"
        if counts
        else f"none of the {len(layers)} places of the adapters lies in a repeated block"
    )
    raise TargetError(f"Drop with layers={list(dropped)}: {reason}")


def setting_at(value: Any, site: SiteSpec) -> Any:
    """Return the value of a setting at one site, where the setting may be a map by layer index or pattern.

    Args:
        value: The setting. In a map, the longest key that fits the site decides; "default" is for the others.
        site: As `Method.build` is given it.
    """
    if not isinstance(value, Mapping):
        return value
    # The longest key is the most specific: "encoder.layer.0.output" goes before "output". A map always has a "default".
    fitting = [key for key in value if key != "default" and _fits(key, site)]
    return value[max(fitting, key=len, default="default")]


def check_maps(config: AdapterConfig, sites: Sequence[SiteSpec]) -> None:
    """Raise TargetError where a key in a map of settings fits no site: it would be without effect, in silence.

    Where the config names `layers`, it may have values for layers that these leave out.
    """
    layers = sorted({site.layer[0] for site in sites if site.layer})
    count = max((site.layer[1] for site in sites if site.layer), default=0)
    for name, value in _maps_in(config).items():
        idle = [key for key in value if key != "default" and not any(_fits(key, site) for site in sites)]
        if config.layers is not None:
            idle = [key for key in idle if not (key.isdecimal() and int(key) < count)]
        if idle:
            raise TargetError(
                f"{name} has values for {idle}, which fit none of the {len(sites)} sites, such as "
                f"{[site.path for site in sites[:3]]}; "
                + (f"they lie in layers {layers}" if layers else "none lies in a repeated block")
            )


def settings_site(config: AdapterConfig, sites: Sequence[SiteSpec]) -> SiteSpec:
    """Choose which of a tied Parameter's sites decides its settings: the first one that a pattern names.

    Args:
        sites: One for each module that reads the Parameter.

    Raises:
        TargetError: patterns name several of them, with other values.
    """
    maps = _maps_in(config).values()
    keys = [key for value in maps for key in _patterns_in(value)]
    named = [site for site in sites if any(_fits(key, site) for key in keys)]
    # Where no pattern names any, `named` is empty, and `named[0]` is never reached.
    if any(setting_at(value, site) != setting_at(value, named[0]) for site in named for value in maps):
        raise TargetError(
            f"{[site.path for site in named]} hold one Parameter, which has one change, but settings differ between them; "
            "give them the same"
        )
    return (named or sites)[0]


def _maps_in(config: AdapterConfig) -> dict[str, Mapping[str, Any]]:
    """Map the name of each setting that is a map by layer or pattern → that map."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, Mapping)}


def _patterns_in(value: Mapping[str, Any]) -> list[str]:
    """List the keys of a map of settings that are patterns: neither "default" nor layer indices."""
    return [key for key in value if key != "default" and not key.isdecimal()]


def _fits(key: str, site: SiteSpec) -> bool:
    """Tell whether a layer index is the site's, or a pattern matches its host or the Parameter there."""
    if key.isdecimal():
        return site.layer is not None and int(key) == site.layer[0]
    # A pattern may speak of the Parameter: "in_proj_weight" fits a site whose host is the attention.
    names = [site.path, *(f"{site.path}.{parameter}".lstrip(".") for parameter in site.parameters)]
    return bool(matching(key, dict.fromkeys(names)))


def _indices(layer: Layer | None) -> set[int]:
    """Return the two indices of a layer, from the front and from the end; none of no layer."""
    return {layer[0], layer[0] - layer[1]} if layer else set()
