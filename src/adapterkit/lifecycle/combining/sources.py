"""What is combined: the modules of each adapter by their place, member by member of a union."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...config.fusion import FusionConfig
from ...config.settings import AdapterConfig
from ...config.union import Config, members
from ...errors import CompatibilityError, ConfigError
from ...heads.spec import HeadSpec
from ...placement.spec import SiteSpec, located
from ...runtime.lookup import adapters_in

__all__ = [
    "Adapter",
    "Combined",
    "HeadKey",
    "SiteKey",
    "Source",
    "adapter_of",
    "check_finite",
    "check_members",
    "check_settings",
    "place_of",
    "site_name",
    "wide",
]


class SiteKey(NamedTuple):
    """Which of an adapter's modules: no two of one member have the same."""

    path: str
    tag: str
    parameter: str


class HeadKey(NamedTuple):
    """Which of an adapter's heads."""

    path: str
    name: str


@dataclass(frozen=True)
class Source:
    """An adapter, or one member of a union, and its weight in the sum."""

    name: str
    weight: float
    config: AdapterConfig
    sites: Mapping[SiteKey, SiteSpec]
    modules: Mapping[SiteKey, nn.Module]


@dataclass(frozen=True)
class Adapter:
    """All that is combined of one adapter."""

    name: str
    weight: float
    config: Config
    sources: tuple[Source, ...]
    heads: Mapping[HeadKey, tuple[HeadSpec, nn.Module]]


@dataclass(frozen=True)
class Combined:
    """What becomes of the sources: an adapter, or one member of a union.

    Attributes:
        states: The tensors of the module at each place.
        errors: How far the change of a weight is from the weighted sum, in parts of it, where it need not be equal.
    """

    config: AdapterConfig
    sites: Sequence[SiteSpec]
    states: Mapping[SiteKey, Mapping[str, Tensor]]
    errors: Mapping[str, float] = field(default_factory=dict)


def adapter_of(model: nn.Module, name: str, weight: float) -> Adapter:
    """The adapter of this name, with its places as they are in this model."""
    adapters = adapters_in(model)
    config = adapters.configs[name]
    if isinstance(config, FusionConfig):
        raise ConfigError(f"{name!r} is a fusion, which weighs adapters and cannot be summed; combine the adapters")
    here = [(located(entry.spec, held.path), held.module) for held, entry in adapters.sites(name)]
    sources = []
    for index, member in enumerate(members(config)):
        own = {place_of(site): (site, module) for site, module in here if site.member == index}
        sites, modules = ({place: both[which] for place, both in own.items()} for which in (0, 1))
        sources.append(Source(name, weight, member, sites, modules))  # type: ignore[arg-type]  # of both kinds at once
    heads = {
        HeadKey(held.path, str(entry.spec.config.name)): (entry.spec, held.module) for held, entry in adapters.heads(name)
    }
    return Adapter(name, weight, config, tuple(sources), heads)


def place_of(site: SiteSpec) -> SiteKey:
    """Where a module sits, among those of its member."""
    return SiteKey(site.path, site.tag, site.parameters[0] if site.parameters else "")


def site_name(site: SiteSpec) -> str:
    """The path of the host, or of the Parameter."""
    return f"{site.path}.{site.parameters[0]}".lstrip(".") if site.parameters else site.path


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype and at the device that sums are made in: any adapter's fit there."""
    return tensor.detach().cpu().double()


def check_members(adapters: Sequence[Adapter]) -> None:
    """Raise ConfigError unless all adapters are of one method, or unions of the same methods in one order."""
    first, *others = adapters
    for other in others:
        ours, theirs = ([source.config.method for source in adapter.sources] for adapter in (first, other))
        if ours != theirs:
            raise ConfigError(
                f"adapters of one method can be combined; {first.name!r} is of {' and '.join(ours)}, {other.name!r} of "
                f"{' and '.join(theirs)}. To have both at once, add an ak.Union, or activate them one after the other"
            )


def check_settings(sources: Sequence[Source], free: Set[str]) -> None:
    """Raise ConfigError where two sources differ in a setting that is not free."""
    first, *others = sources
    for other in others:
        for name in type(first.config).model_fields.keys() - free:
            ours, theirs = (getattr(source.config, name, None) for source in (first, other))
            if ours != theirs:
                raise ConfigError(
                    f"{first.name!r} has {name}={ours!r} and {other.name!r} {name}={theirs!r}: their parameters do not "
                    "mean the same, so that a sum of them would mean nothing"
                )


def check_finite(name: str, states: Mapping[Any, Mapping[str, Tensor]]) -> None:
    """Raise CompatibilityError if a tensor of an adapter holds NaN or an infinity."""
    for place, tensors in states.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CompatibilityError(
                    f"{name!r} has values that are not finite, in {key!r} at {place[0]!r}; nothing can be combined with it"
                )
