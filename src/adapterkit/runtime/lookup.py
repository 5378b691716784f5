"""Look up what sits in a model: its sites, adapters, fusions, heads and their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from ..composition.nodes import Fuse, from_json
from ..config.fusion import FusionConfig
from ..config.union import Config
from ..structure.paths import SITE
from .site import AdapterSite, Entry, HeadEntry, SiteEntry
from .state import STATE, ModelState

if TYPE_CHECKING:  # heads are above
    from ..heads.config import HeadConfig

__all__ = [
    "Adapters",
    "HeldModule",
    "adapter_names",
    "adapters_in",
    "find_state",
    "fusions_of",
    "heads_of",
    "named_parameters",
    "open_parameters",
    "sites_among",
    "sites_of",
]


def sites_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSite]]:
    """Yield each host that holds adapters, in the model's order: its path, itself, its site."""
    return sites_among(dict(model.named_modules()))


def sites_among(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, AdapterSite]]:
    """Yield what `sites_of` does, given the model's modules by path."""
    for path, module in modules.items():
        site = module._modules[SITE] if SITE in module._modules else None  # noqa: SIM401  # TorchScript's has no get
        if isinstance(site, AdapterSite):
            yield path, module, site


def open_parameters(module: nn.Module, *, trains: bool) -> None:
    """Let a module's parameters train, or not; those that cannot (integers) stay as they are."""
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(trains)


class HeldModule(NamedTuple):
    """One module of an adapter in a model, and what holds it.

    Attributes:
        path: The host's path in this model.
        host: The host.
        site: The site at the host.
        entry: What the site knows of the module.
        module: The module.
    """

    path: str
    host: nn.Module
    site: AdapterSite
    entry: Entry
    module: nn.Module


class Adapters:
    """The modules of every adapter and fusion in a model, found in one walk over it; see `adapters_in`."""

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[str, list[HeldModule]] = {}
        for path, host, site in sites_of(model):
            for name in site.entries:
                held = (HeldModule(path, host, site, entry, module) for entry, module in site.modules_of(name))
                self._held.setdefault(name, []).extend(held)

    @property
    def names(self) -> list[str]:
        """The names of all adapters and fusions, in the order in which the model holds their first modules."""
        return list(self._held)

    @property
    def configs(self) -> dict[str, Config | FusionConfig]:
        """Map the name of each adapter to its config, and of each fusion."""
        return {name: held[0].entry.config for name, held in self._held.items()}  # every entry has the whole config

    def modules(self, name: str) -> list[HeldModule]:
        """Return the modules of one adapter, heads too, in the model's order."""
        return self._held.get(name, [])

    def sites(self, name: str) -> list[tuple[HeldModule, SiteEntry]]:
        """Return the modules of one adapter that adapt their hosts, each with its entry."""
        return [(held, held.entry) for held in self.modules(name) if isinstance(held.entry, SiteEntry)]

    def heads(self, name: str) -> list[tuple[HeldModule, HeadEntry]]:
        """Return the heads of one adapter, each with its entry."""
        return [(held, held.entry) for held in self.modules(name) if isinstance(held.entry, HeadEntry)]


def adapters_in(model: nn.Module) -> Adapters:
    """Find the modules of every adapter in the model."""
    return Adapters(model)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all adapters in the model, and of all fusions."""
    return adapters_in(model).names


def fusions_of(model: nn.Module) -> dict[str, Fuse]:
    """Map the names of the model's fusions to the compositions that they weigh."""
    configs = adapters_in(model).configs
    found = {}
    for name, config in configs.items():
        if isinstance(config, FusionConfig):
            unnamed = Fuse(*(from_json(child) for child in config.children))  # type: ignore[arg-type]  # no None
            # A Fuse without a name is called "a,b" after its children. Naming it so would make it another value.
            found[name] = unnamed if unnamed.fusion == name else Fuse(*unnamed.children, name=name)
    return found


def named_parameters(model: nn.Module, name: str, *, heads: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield an adapter's parameters with their names in the model: sites first, in the model's order, then heads."""
    adapters = adapters_in(model)
    held = [one for one, _ in adapters.sites(name)] + [one for one, _ in adapters.heads(name) if heads]
    for one in held:
        yield from one.module.named_parameters(prefix=f"{one.path}.{SITE}.{one.entry.key}".lstrip("."))


def heads_of(model: nn.Module, name: str) -> dict[str, HeadConfig]:
    """Map the names of an adapter's heads to their configs, in the model's order."""
    return {str(head.spec.config.name): head.spec.config for _, head in adapters_in(model).heads(name)}


def find_state(model: nn.Module) -> ModelState | None:
    """Return the model's state; None if adapterkit has not touched it.

    It hangs on the root. In a part that was taken out of a larger model the sites still lead to it.
    """
    state: ModelState | None = model.__dict__.get(STATE)
    return state or next((site.state for _, _, site in sites_of(model)), None)
