"""The adapter methods. A new one is a file here, its module, its config, and a line in METHODS.

Other packages add theirs by an entry point in the group `adapterkit.methods` that leads to a Method; nothing here changes.
What such a package needs is exported here.
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from ..config.base import ActivationConfig, AdapterConfig, Targets
from ..errors import ConfigError
from ..layers import setting_at
from ..sites import SiteSpec
from ..spots import Placement
from ..weights import projection_at
from .base import Additive, Method, Sharing
from .bitfit import BitFit
from .bottleneck import Bottleneck
from .compacter import Compacter
from .ia3 import IA3
from .invertible import Invertible
from .lora import LoRA
from .norm_tuning import NormTuning
from .vera import VeRA

__all__ = [
    "METHODS",
    "UNION_PRESETS",
    "ActivationConfig",
    "AdapterConfig",
    "Additive",
    "Method",
    "Placement",
    "Sharing",
    "SiteSpec",
    "Targets",
    "all_methods",
    "method_of",
    "presets",
    "projection_at",
    "setting_at",
]

METHODS: tuple[Method[Any], ...] = (Bottleneck(), Compacter(), Invertible(), LoRA(), VeRA(), IA3(), BitFit(), NormTuning())

# Presets that are several presets at once.
_MADX = ("invertible", "pfeiffer")  # Pfeiffer et al. 2020, arXiv:2005.00052
UNION_PRESETS: Mapping[str, tuple[str, ...]] = {"madx": _MADX, "seq_bn_inv": _MADX}

_GROUP = "adapterkit.methods"


@cache
def all_methods() -> Mapping[str, Method[Any]]:
    """Every method by its name: those here, then those of installed packages.

    Raises:
        ConfigError: a package's method cannot be loaded, or takes a name that is taken.
    """
    methods = {method.name: method for method in METHODS}
    for point in entry_points(group=_GROUP):
        method = _load(point)
        if method.name in methods:
            raise ConfigError(
                f"the entry point {point.value!r} in {_GROUP!r} brings a method {method.name!r}, which exists"
            )
        methods[method.name] = method
    return methods


@cache
def presets() -> Mapping[str, tuple[Method[Any], Mapping[str, Any]]]:
    """Every preset by its name, as a method and its settings.

    Raises:
        ConfigError: as `all_methods`, or two methods have a preset of one name.
    """
    found: dict[str, tuple[Method[Any], Mapping[str, Any]]] = {}
    for method in all_methods().values():
        for name, settings in method.presets.items():
            if name in found or name in UNION_PRESETS:
                raise ConfigError(f"the method {method.name!r} brings a preset {name!r}, which exists")
            found[name] = method, settings
    return found


def method_of(config: AdapterConfig) -> Method[Any]:
    """The method that a config belongs to.

    Raises:
        ConfigError: none has its name; the package that brought it is not installed here.
    """
    try:
        return all_methods()[config.method]
    except KeyError:
        raise ConfigError(
            f"no method is called {config.method!r}; there are {', '.join(all_methods())}. Install the package that "
            f"has it, or register it as an entry point in the group {_GROUP!r}"
        ) from None


def _load(point: Any) -> Method[Any]:
    """The method that an entry point leads to; a class is called."""
    try:
        found = point.load()
        method: Method[Any] = found() if isinstance(found, type) else found
        missing = [name for name in ("name", "config_type", "presets", "placements", "build") if not hasattr(method, name)]
    except Exception as error:
        raise ConfigError(f"the entry point {point.value!r} in {_GROUP!r} cannot be loaded: {error!r}") from error
    if missing:
        raise ConfigError(f"the entry point {point.value!r} in {_GROUP!r} leads to no method: it has no {missing}")
    return method
