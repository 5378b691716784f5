"""Which methods and presets there are: those of this package, those registered by hand, those of installed packages."""

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any, TypeVar

from ..config.settings import AdapterConfig
from ..errors import ConfigError
from ..structure.plugins import describe, load, points_in
from . import in_tree
from .method import Method
from .not_built import why_not_built

__all__ = [
    "METHODS",
    "UNION_PRESETS",
    "all_methods",
    "check_methods_of",
    "method_named",
    "method_of",
    "preset_named",
    "preset_names",
    "presets",
    "register",
]

M = TypeVar("M")  # a method, or a class of methods

_GROUP = "adapterkit.methods"
# What `Method` declares, by name, so that a message can say which one is missing.
_NEEDED = ("name", "config_type", "presets", "placements", "build")

# Presets that are several presets at once.
_MADX = ("invertible", "pfeiffer")  # Pfeiffer et al. 2020, arXiv:2005.00052
UNION_PRESETS: Mapping[str, tuple[str, ...]] = {"madx": _MADX, "seq_bn_inv": _MADX}

# What `register` was given, by the method's name.
_registered: dict[str, Method[Any]] = {}


def register(method: M) -> M:
    """Make a method known in this process, as the entry point of an installed package would: in a notebook, say.

    Registering a class again (a cell that is run again) replaces what it brought before. The same name from another class
    is refused.

    Args:
        method: A `Method`, or a class of methods, which is called without arguments. A class may have `@register` above it.

    Returns:
        What was given.

    Raises:
        ConfigError: the method's name or one of its presets is taken, or it lacks something that a method has.
    """
    made = _as_method(method, f"{method!r}")
    before = _registered.get(made.name)
    if before is not None and _class_of(before) != _class_of(made):
        raise ConfigError(f"{_class_of(made)} brings a method {made.name!r}, which {_class_of(before)} has registered")
    # Without what the same cell registered before: that is replaced, and no clash.
    others = {name: other for name, other in _registered.items() if name != made.name}
    # Packages that cannot be loaded are left out (`[0]`): they are in nobody's way until they are asked for by name.
    _check_names(_class_of(made), made, {**_OURS, **others, **_of_packages()[0]})
    _registered[made.name] = made
    return method


def all_methods() -> Mapping[str, Method[Any]]:
    """Return every method by its name: those of this package, the registered ones, those of installed packages.

    Raises:
        ConfigError: a package's method cannot be loaded, or takes a name that is taken.
    """
    of_packages, problems = _of_packages()
    if problems:
        raise ConfigError("; ".join(problems))
    return {**_OURS, **_registered, **of_packages}


def presets() -> Mapping[str, tuple[Method[Any], Mapping[str, Any]]]:
    """Return every preset by its name, as a method and its settings. Raises as `all_methods`."""
    return {name: found for method in all_methods().values() for name, found in _presets_of(method).items()}


def method_named(name: object) -> Method[Any]:
    """Return the method of this name.

    Packages are asked only if neither this one nor `register` has brought it, so that a broken package is in nobody's way.

    Raises:
        ConfigError: there is none; lists those that there are, and says which packages could not be asked.
    """
    if isinstance(name, str) and name in _OURS:
        return _OURS[name]
    if isinstance(name, str) and name in _registered:
        return _registered[name]
    of_packages, problems = _of_packages()
    if isinstance(name, str) and name in of_packages:
        return of_packages[name]
    # A union is no method, though its configs say `method="union"`: see `spellings.config_from`.
    names = sorted([*_OURS, *_registered, *of_packages, "union"])
    known = [reason] if (reason := why_not_built(name)) else []
    raise ConfigError("; ".join([f"'method' must be one of {names}; found {name!r}", *known, *problems]))


def method_of(config: AdapterConfig) -> Method[Any]:
    """Return the method that a config belongs to.

    Raises:
        ConfigError: there is none of its name here; says how to bring it in.
    """
    return _method_here(config.method)


def check_methods_of(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the method that a config was written for is here; of a union, the methods of its members."""
    name = settings.get("method")
    if name == "union":
        members = settings.get("configs")
        # Settings of a file, not yet checked: anything may stand where configs should; building them says so.
        for member in members if isinstance(members, (list, tuple)) else ():
            if isinstance(member, Mapping):
                check_methods_of(member)
    elif isinstance(name, str):
        _method_here(name)


def preset_named(name: str) -> tuple[Method[Any], Mapping[str, Any]] | None:
    """Return the preset of this name as a method and its settings, or None. Packages: see `method_named`."""
    for method in (*_OURS.values(), *_registered.values()):
        if name in method.presets:
            return method, method.presets[name]
    return next(((m, m.presets[name]) for m in _of_packages()[0].values() if name in m.presets), None)


def preset_names() -> tuple[list[str], list[str]]:
    """Return the names of all presets, and a sentence for each package that could not be asked for its own."""
    of_packages, problems = _of_packages()
    methods = (*_OURS.values(), *_registered.values(), *of_packages.values())
    return [*(name for method in methods for name in method.presets), *UNION_PRESETS], problems


def _method_here(name: str) -> Method[Any]:
    """Return the method of this name. Raise ConfigError, as for who has a config and lacks its method, if there is none."""
    try:
        return method_named(name)
    except ConfigError as error:
        raise ConfigError(
            f"the method {name!r} is not here: install the package that brings it, or register it with "
            f"adapterkit.methods.register ({error})"
        ) from None


def _presets_of(method: Method[Any]) -> dict[str, tuple[Method[Any], Mapping[str, Any]]]:
    return {name: (method, settings) for name, settings in method.presets.items()}


def _of_packages() -> tuple[dict[str, Method[Any]], list[str]]:
    """Return the methods of installed packages by name, and a sentence for each entry point that brings none."""
    found: dict[str, Method[Any]] = {}
    problems = []
    for point in points_in(_GROUP):
        try:
            method = _load(point)
            # Against those found before it, too: of two packages that bring one name the second is refused.
            _check_names(describe(point), method, {**_OURS, **_registered, **found})
        except ConfigError as error:
            problems.append(str(error))
        else:
            found[method.name] = method
    return found, problems


def _check_names(source: str, method: Method[Any], known: Mapping[str, Method[Any]]) -> None:
    """Raise ConfigError, naming the source, if a name that a method brings is taken, or its configs say another one."""
    if method.name in known or method.name == "union":
        raise ConfigError(f"{source} brings a method {method.name!r}, which exists")
    names = {name for other in known.values() for name in other.presets} | set(UNION_PRESETS)
    taken = sorted(names & set(method.presets))
    if taken:
        raise ConfigError(f"{source} brings a preset {taken[0]!r}, which exists")
    named = getattr(method.config_type.model_fields.get("method"), "default", None)
    if named != method.name:  # `kit.add` finds the method of a config by this name
        raise ConfigError(
            f"{source} brings the method {method.name!r}, whose configs ({method.config_type.__name__}) say "
            f"method={named!r}: the two names must be one"
        )


@cache
def _load(point: EntryPoint) -> Method[Any]:
    """Return the method that an entry point leads to."""
    return _as_method(load(point), describe(point))


def _as_method(found: Any, source: str) -> Method[Any]:
    """Call what is a class, and raise ConfigError, naming the source, if the result is no method."""
    try:
        method: Method[Any] = found() if isinstance(found, type) else found
        missing = [name for name in _NEEDED if not hasattr(method, name)]
        # Somebody else's class: what its presets are is found out here, where the message names the source.
        _ = missing or dict(method.presets)
    except Exception as error:
        raise ConfigError(f"{source} cannot be loaded: {error!r}") from error
    if missing:
        raise ConfigError(f"{source} leads to no method: it has no {missing}")
    return method


def _class_of(method: Method[Any]) -> str:
    """Name a method's class. A cell that is run again makes another class of the same name: that is the same method."""
    # By name, not by identity: of the two classes neither is the other.
    kind = type(method)
    return f"{kind.__module__}.{kind.__qualname__}"


def _methods_in_tree() -> Iterator[Method[Any]]:
    """Make the method of each config in `in_tree`: of the class in the config's file that has it as its `config_type`."""
    for name, config_type in vars(in_tree).items():
        if name.endswith("Config"):
            classes = vars(sys.modules[config_type.__module__]).values()
            # Exactly one: a config without a method in its file, or with two, fails when the package is imported.
            (method,) = (kind for kind in classes if getattr(kind, "config_type", None) is config_type)
            yield method()


# At the end of the file: it calls what stands above.
METHODS: tuple[Method[Any], ...] = tuple(_methods_in_tree())
_OURS: Mapping[str, Method[Any]] = {method.name: method for method in METHODS}
