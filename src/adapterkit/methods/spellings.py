"""The spellings of a config: a preset's name, a config, a mapping with its method, or a path to such JSON."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.settings import AdapterConfig, Settings
from ..config.union import Config, Union
from ..errors import ConfigError
from .not_built import why_not_built
from .registry import UNION_PRESETS, method_named, preset_named, preset_names

__all__ = ["as_config", "config_from", "no_config", "read_json"]


def config_from(settings: Mapping[str, Any]) -> Config:
    """Build a config from a mapping that names its method: `{"method": "bottleneck", ...}`.

    Raises:
        ConfigError: no such method, or bad settings.
    """
    # `**settings` would raise a TypeError that names no setting.
    wrong = [key for key in settings if not isinstance(key, str)]
    if wrong:
        raise ConfigError(f"settings are named by strings; found {wrong}")
    name = settings.get("method")
    if name == "union":
        return _union_from(settings)
    config: AdapterConfig = method_named(name).config_type(**settings)
    return config


def as_config(config: Settings | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any]) -> Config:
    """Build a config from any of its spellings.

    Raises:
        ConfigError: not one of these, or bad settings.
    """
    if isinstance(config, (AdapterConfig, Union)):
        return config.override(overrides)
    if isinstance(config, Mapping):
        return config_from(config).override(overrides)
    # A string is a preset's name before it is a path: a file called "lora" has to be written "./lora".
    if isinstance(config, str) and config in UNION_PRESETS:
        # `filter` is for type checkers: the presets of a union are this package's, and there.
        return Union(*filter(None, map(_preset, UNION_PRESETS[config]))).override(overrides)
    preset = _preset(config) if isinstance(config, str) else None
    return (config_from(_settings_in(config)) if preset is None else preset).override(overrides)


def _preset(name: str) -> AdapterConfig | None:
    """Build the config of a preset; None if there is none of this name."""
    found = preset_named(name)
    if found is None:
        return None
    method, settings = found
    config: AdapterConfig = method.config_type(**settings)
    return config


def _union_from(settings: Mapping[str, Any]) -> Union:
    """Build a union from a mapping; its members are configs, mappings or presets' names."""
    given = settings.get("configs")  # checked here, since pydantic cannot tell a config from its mapping
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"a union has a list of 'configs'; found {given!r}")
    # A file has mappings here, code may have configs or "lora".
    configs = [as_config(member, {}) for member in given]
    return Union(**{**settings, "configs": configs})


def _settings_in(config: object) -> Mapping[str, Any]:
    """Read the settings in a JSON file. Raise ConfigError, which knows the presets, if that is no file."""
    settings = read_json(config)
    if settings is None:
        names, problems = preset_names()
        raise ConfigError("; ".join([no_config(config, names), *problems]))
    return settings


def no_config(config: object, presets: Sequence[str]) -> str:
    """Write the message for something that is no spelling of a config."""
    known, listed = why_not_built(config), f"the presets are {', '.join(presets)}"
    if known:
        return f"{known}; {listed}"
    near = difflib.get_close_matches(str(config), presets, n=3)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else listed
    return f"{str(config)[:80]!r} is neither a preset nor a config nor a JSON file with one; {hint}"


def read_json(config: object) -> Mapping[str, Any] | None:
    """Read the settings in a JSON file; None if that is no path of a file.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        path = Path(config)  # type: ignore[arg-type]  # what is no path raises TypeError
        is_file = path.is_file()
    # A long text, such as JSON itself, is no path to the file system (OSError), nor is one with a null byte (ValueError).
    except (TypeError, ValueError, OSError):
        is_file = False
    if not is_file:
        return None
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise ConfigError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{str(path)!r} holds a JSON {type(settings).__name__}, not an object with settings")
    return settings
