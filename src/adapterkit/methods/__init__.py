"""The adapter methods. A new one is a file here, its module, its config, and a line in METHODS."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.base import AdapterConfig
from ..errors import ConfigError
from .base import Method
from .bottleneck import Bottleneck

__all__ = ["METHODS", "PRESETS", "Method", "as_config", "config_from", "method_of"]

METHODS: tuple[Method[Any], ...] = (Bottleneck(),)
_BY_NAME = {method.name: method for method in METHODS}
PRESETS = {name: (method, settings) for method in METHODS for name, settings in method.presets.items()}


def method_of(config: AdapterConfig) -> Method[Any]:
    """The method that a config belongs to."""
    return _BY_NAME[config.method]


def config_from(settings: Mapping[str, Any]) -> AdapterConfig:
    """Build a config from a mapping that names its method: `{"method": "bottleneck", ...}`.

    Raises:
        ConfigError: no such method, or bad settings.
    """
    wrong = [key for key in settings if not isinstance(key, str)]
    if wrong:
        raise ConfigError(f"settings are named by strings; found {wrong}")
    name = settings.get("method")
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ConfigError(f"'method' must be one of {sorted(_BY_NAME)}; found {name!r}")
    config: AdapterConfig = _BY_NAME[name].config_type(**settings)
    return config


def as_config(config: AdapterConfig | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any]) -> AdapterConfig:
    """A config from any of its spellings: a preset's name, a config, a mapping with its method, or a path to such JSON.

    Raises:
        ConfigError: not one of these, or bad settings.
    """
    if isinstance(config, AdapterConfig):
        return config.override(overrides)
    if isinstance(config, Mapping):
        return config_from(config).override(overrides)
    if isinstance(config, str) and config in PRESETS:
        method, settings = PRESETS[config]
        preset: AdapterConfig = method.config_type(**settings)
        return preset.override(overrides)
    try:
        path = Path(config)
        is_file = path.is_file()
    except (TypeError, ValueError, OSError):
        is_file = False
    if not is_file:
        near = difflib.get_close_matches(str(config), PRESETS, n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"the presets are {', '.join(PRESETS)}"
        raise ConfigError(f"{str(config)[:80]!r} is neither a preset nor a config nor a JSON file with one; {hint}")
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{str(path)!r} holds a JSON {type(settings).__name__}, not an object with settings")
    return config_from(settings).override(overrides)
