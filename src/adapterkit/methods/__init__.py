"""The adapter methods. A new one is a file here, its module, its config, and a line in METHODS.

Other packages add theirs by an entry point in the group `adapterkit.methods` that leads to a Method; nothing here changes.
What such a package needs is exported here.
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..config.settings import AdapterConfig, Targets, TensorConfig
from ..errors import ConfigError
from ..placement.layers import setting_at
from ..placement.rule import Placement
from ..placement.spec import SiteSpec
from ..placement.weights import projection_at
from .bitfit import BitFit
from .bottleneck import Bottleneck
from .compacter import Compacter
from .ia3 import IA3
from .invertible import Invertible
from .lora import LoRA
from .method import LinearInParameters, Method, SharesTensors
from .norm_tuning import NormTuning
from .vera import VeRA

__all__ = [
    "METHODS",
    "UNION_PRESETS",
    "AdapterConfig",
    "LinearInParameters",
    "Method",
    "Placement",
    "SharesTensors",
    "SiteSpec",
    "Targets",
    "TensorConfig",
    "all_methods",
    "method_named",
    "method_of",
    "preset_named",
    "preset_names",
    "presets",
    "projection_at",
    "setting_at",
]

METHODS: tuple[Method[Any], ...] = (Bottleneck(), Compacter(), Invertible(), LoRA(), VeRA(), IA3(), BitFit(), NormTuning())

# Presets that are several presets at once.
_MADX = ("invertible", "pfeiffer")  # Pfeiffer et al. 2020, arXiv:2005.00052
UNION_PRESETS: Mapping[str, tuple[str, ...]] = {"madx": _MADX, "seq_bn_inv": _MADX}

_GROUP = "adapterkit.methods"


def all_methods() -> Mapping[str, Method[Any]]:
    """Every method by its name: those here, then those of installed packages.

    Raises:
        ConfigError: a package's method cannot be loaded, or takes a name that is taken.
    """
    brought, problems = _brought()
    if problems:
        raise ConfigError("; ".join(problems))
    return {**_OURS, **brought}


def presets() -> Mapping[str, tuple[Method[Any], Mapping[str, Any]]]:
    """Every preset by its name, as a method and its settings. Raises as `all_methods`."""
    return {name: found for method in all_methods().values() for name, found in _presets_of(method).items()}


def method_named(name: object) -> Method[Any]:
    """The method of this name. Packages are asked only if none here has it, so that a broken one is in nobody's way.

    Raises:
        ConfigError: none has this name; says which packages could not be asked.
    """
    if isinstance(name, str) and name in _OURS:
        return _OURS[name]
    brought, problems = _brought()
    if isinstance(name, str) and name in brought:
        return brought[name]
    names = sorted([*_OURS, *brought, "union"])
    raise ConfigError("; ".join([f"'method' must be one of {names}; found {name!r}", *problems]))


def preset_named(name: str) -> tuple[Method[Any], Mapping[str, Any]] | None:
    """The preset of this name, as a method and its settings; None if there is none. Packages: see `method_named`."""
    if name in _OUR_PRESETS:
        return _OUR_PRESETS[name]
    return next((_presets_of(m)[name] for m in _brought()[0].values() if name in m.presets), None)


def preset_names() -> tuple[list[str], list[str]]:
    """The names of all presets that there are, and a sentence for each package that could not be asked for its own."""
    brought, problems = _brought()
    return [*_OUR_PRESETS, *(name for method in brought.values() for name in method.presets), *UNION_PRESETS], problems


def method_of(config: AdapterConfig) -> Method[Any]:
    """The method that a config belongs to.

    Raises:
        ConfigError: none has its name; the package that brought it is not installed here.
    """
    try:
        return method_named(config.method)
    except ConfigError as error:
        raise ConfigError(
            f"no method is called {config.method!r}: {error}. Install the package that has it, or register it as an entry "
            f"point in the group {_GROUP!r}"
        ) from None


def _presets_of(method: Method[Any]) -> dict[str, tuple[Method[Any], Mapping[str, Any]]]:
    return {name: (method, settings) for name, settings in method.presets.items()}


def _brought() -> tuple[dict[str, Method[Any]], list[str]]:
    """The methods of installed packages by name, and a sentence for each entry point that brings none."""
    brought: dict[str, Method[Any]] = {}
    problems = []
    for point in entry_points(group=_GROUP):
        try:
            method = _load(point)
            _check_free(point, method, {**_OURS, **brought})
        except ConfigError as error:
            problems.append(str(error))
        else:
            brought[method.name] = method
    return brought, problems


def _check_free(point: EntryPoint, method: Method[Any], known: Mapping[str, Method[Any]]) -> None:
    """Raise ConfigError if a name that a package's method brings is taken."""
    if method.name in known or method.name == "union":
        raise ConfigError(f"{_described(point)} brings a method {method.name!r}, which exists")
    names = {name for other in known.values() for name in other.presets} | set(UNION_PRESETS)
    taken = sorted(names & set(method.presets))
    if taken:
        raise ConfigError(f"{_described(point)} brings a preset {taken[0]!r}, which exists")


@cache
def _load(point: EntryPoint) -> Method[Any]:
    """The method that an entry point leads to; a class is called."""
    try:
        found = point.load()
        method: Method[Any] = found() if isinstance(found, type) else found
        missing = [name for name in ("name", "config_type", "presets", "placements", "build") if not hasattr(method, name)]
        _ = missing or dict(method.presets)
    except Exception as error:
        raise ConfigError(f"{_described(point)} cannot be loaded: {error!r}") from error
    if missing:
        raise ConfigError(f"{_described(point)} leads to no method: it has no {missing}")
    return method


def _described(point: EntryPoint) -> str:
    """An entry point, and the package to mend or uninstall."""
    owner = f" of the package {point.dist.name!r}" if point.dist is not None else ""
    return f"the entry point {point.value!r} in {_GROUP!r}{owner}"


_OURS: Mapping[str, Method[Any]] = {method.name: method for method in METHODS}
_OUR_PRESETS = {name: found for method in METHODS for name, found in _presets_of(method).items()}
