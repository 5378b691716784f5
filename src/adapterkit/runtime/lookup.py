"""Look up what sits in a model: its sites, adapters, fusions, heads and their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from ..composition.nodes import Fuse, from_json
from ..config.fusion import FusionConfig
from ..placement.spec import SiteSpec
from ..structure.paths import SITE
from .site import AdapterSite
from .state import STATE, ModelState

if TYPE_CHECKING:  # heads are above
    from ..heads.config import HeadConfig

__all__ = [
    "adapter_names",
    "find_state",
    "fusions_of",
    "heads_of",
    "named_parameters",
    "open_parameters",
    "sites_among",
    "sites_of",
    "specs_of",
]


def sites_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSite]]:
    """Each host that holds adapters: its path, itself, its site; in the model's order."""
    return sites_among(dict(model.named_modules()))


def sites_among(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, AdapterSite]]:
    """`sites_of` the model that has these modules."""
    for path, module in modules.items():
        site = module._modules[SITE] if SITE in module._modules else None  # noqa: SIM401  # TorchScript's has no get
        if isinstance(site, AdapterSite):
            yield path, module, site


def open_parameters(module: nn.Module, trains: bool) -> None:
    """Let a module's parameters train, or not; those that cannot (integers) stay as they are."""
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(trains)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters in the model, and of all fusions."""
    return list(dict.fromkeys(name for _, _, site in sites_of(model) for name in site.entries))


def fusions_of(model: nn.Module) -> dict[str, Fuse]:
    """The model's fusions by name, each as the composition that it weighs."""
    configs = {name: entries[0].config for _, _, site in sites_of(model) for name, entries in site.entries.items()}
    found = {}
    for name, config in configs.items():
        if isinstance(config, FusionConfig):
            unnamed = Fuse(*(from_json(child) for child in config.children))  # type: ignore[arg-type]  # no None
            found[name] = unnamed if unnamed.fusion == name else Fuse(*unnamed.children, name=name)
    return found


def named_parameters(model: nn.Module, name: str, *, heads: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """An adapter's parameters with their names in the model: sites first, in the model's order, then heads."""
    for is_head in (False, True) if heads else (False,):
        for path, _, site in sites_of(model):
            for entry, module in site.modules_of(name):
                if (entry.spec is None) == is_head:
                    yield from module.named_parameters(prefix=f"{path}.{SITE}.{entry.key}".lstrip("."))


def specs_of(model: nn.Module, name: str) -> Iterator[tuple[str, SiteSpec]]:
    """An adapter's places, each with its host's path in this model; no heads."""
    for path, _, site in sites_of(model):
        for entry in site.entries.get(name, ()):
            if entry.spec is not None:
                yield path, entry.spec


def heads_of(model: nn.Module, name: str) -> dict[str, HeadConfig]:
    """An adapter's heads by their names, in the model's order."""
    entries = (entry for _, _, site in sites_of(model) for entry in site.entries.get(name, ()))
    return {str(entry.head.config.name): entry.head.config for entry in entries if entry.head is not None}


def find_state(model: nn.Module) -> ModelState | None:
    """The model's state: on its root, or, in a part taken out of a larger model, on its sites; None if untouched."""
    state: ModelState | None = model.__dict__.get(STATE)
    return state or next((site.state for _, _, site in sites_of(model)), None)
