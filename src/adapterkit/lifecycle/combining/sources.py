"""What is combined: the modules of each adapter, member by member of a union.

The words of this folder: a *source* is an adapter, or one member of a union, and its weight. A *site key* says which of a
member's modules is meant: two sources have a module for one tensor where they have one key. What a source has no module for
it does not change.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from ...config.fusion import FusionConfig
from ...config.settings import AdapterConfig
from ...config.union import Config, members
from ...errors import CompatibilityError, ConfigError
from ...heads.spec import HeadSpec
from ...nn.functional.slices import Slices
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
    "coverage",
    "site_name",
    "wide",
]


class SiteKey(NamedTuple):
    """Which of the modules of one member of an adapter is meant: no two of them have one key.

    Not `SiteSpec.location`: modules of two sources that read different tensors at one host must meet under one key, where
    they are refused.

    Attributes:
        path: The host's path.
        tag: Which of the method's placements it came of.
        parameter: The first name of the Parameter from the host on; "" for what sits beside the host.
    """

    path: str
    tag: str
    parameter: str

    @classmethod
    def of(cls, site: SiteSpec) -> "SiteKey":
        """Return the key of the module at this site."""
        return cls(site.path, site.tag, site.parameters[0] if site.parameters else "")


class HeadKey(NamedTuple):
    """Which of an adapter's heads is meant: its host's path, and its name."""

    path: str
    name: str


@dataclass(frozen=True)
class Source:
    """An adapter, or one member of a union, and its weight in the sum.

    Attributes:
        name: The adapter's name.
        weight: Its weight.
        config: Its config; of a union the member's.
        sites: Map the key of each module to its site, with paths as they are in this model.
        modules: Map the same keys to the modules.
    """

    name: str
    weight: float
    config: AdapterConfig
    sites: Mapping[SiteKey, SiteSpec]
    modules: Mapping[SiteKey, nn.Module]


@dataclass(frozen=True)
class Adapter:
    """All that is combined of one adapter: its members, one if it is no union, and its heads."""

    name: str
    weight: float
    config: Config
    sources: tuple[Source, ...]
    heads: Mapping[HeadKey, tuple[HeadSpec, nn.Module]]


@dataclass(frozen=True)
class Combined:
    """What becomes of the sources: an adapter, or one member of a union.

    Attributes:
        config: Its config.
        sites: Where its modules sit.
        states: Map the key of each module to its tensors, by their names in it.
        errors: Map the name of each site whose change need not equal the weighted sum to the relative error of it: the
            Frobenius norm of the difference in parts of that of the sum.
    """

    config: AdapterConfig
    sites: Sequence[SiteSpec]
    states: Mapping[SiteKey, Mapping[str, Tensor]]
    errors: Mapping[str, float] = field(default_factory=dict)


def adapter_of(model: nn.Module, name: str, weight: float) -> Adapter:
    """Return the adapter of this name, with paths as they are in this model. Raises ConfigError if it is a fusion."""
    adapters = adapters_in(model)
    config = adapters.configs[name]
    if isinstance(config, FusionConfig):
        raise ConfigError(f"{name!r} is a fusion, which weighs adapters and cannot be summed; combine the adapters")
    # A site remembers the paths of the model that its adapter was added in, of which this one may be a part.
    here = [(located(entry.spec, held.path), held.module) for held, entry in adapters.sites(name)]
    sources = []
    for index, member in enumerate(members(config)):
        own = [(SiteKey.of(site), site, module) for site, module in here if site.member == index]
        sites, modules = {key: site for key, site, _ in own}, {key: module for key, _, module in own}
        sources.append(Source(name, weight, member, sites, modules))
    heads = {
        HeadKey(held.path, str(entry.spec.config.name)): (entry.spec, held.module) for held, entry in adapters.heads(name)
    }
    return Adapter(name, weight, config, tuple(sources), heads)


def coverage(sites: Iterable[SiteSpec]) -> set[tuple[SiteKey, Slices]]:
    """Return what modules at these sites cover: which tensors, and which of their features."""
    return {(SiteKey.of(site), site.slices) for site in sites}


def site_name(site: SiteSpec) -> str:
    """Return the path of the host or, where a Parameter is adapted, of the Parameter."""
    return f"{site.path}.{site.parameters[0]}".lstrip(".") if site.parameters else site.path


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor as sums are made: in float64, on the CPU, where tensors of any adapter meet."""
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
    """Raise ConfigError where two sources differ in a setting, other than those in `free`."""
    first, *others = sources
    for other in others:
        for name in type(first.config).model_fields.keys() - free:
            ours, theirs = (getattr(source.config, name, None) for source in (first, other))
            if ours != theirs:
                raise ConfigError(
                    f"{first.name!r} has {name}={ours!r} and {other.name!r} {name}={theirs!r}: their parameters do not "
                    "mean the same, so that a sum of them would mean nothing"
                )


def check_finite(name: str, states: Mapping[SiteKey, Mapping[str, Tensor]]) -> None:
    """Raise CompatibilityError if a tensor of an adapter holds NaN or an infinity.

    Args:
        name: What to call the adapter.
        states: Map the key of each module to its tensors.
    """
    for site, tensors in states.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CompatibilityError(
                    f"{name!r} has values that are not finite, in {key!r} at {site.path!r}; nothing can be combined with it"
                )
