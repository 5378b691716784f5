"""Several configs in one adapter."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from ..errors import ConfigError
from .problems import no_setting
from .settings import AdapterConfig, Settings

__all__ = ["Config", "Union", "members"]


class Union(Settings):
    """An adapter made of several: `ak.Union(ak.LoRAConfig(), ak.BottleneckConfig(targets=["mlp"]))`.

    They are added, trained, saved and activated as one. At a tensor that several of them adapt they act in this order.

    Args:
        *configs: Two or more configs, of any methods; none of them a union.

    Raises:
        ConfigError: fewer than two, or something else than configs.

    Reference: Mao et al. 2022, arXiv:2110.07577 (UniPELT); He et al. 2022, arXiv:2110.04366 (MAM).
    """

    method: Literal["union"] = "union"
    # SerializeAsAny: pydantic would write the settings of AdapterConfig alone, and lose each method's own.
    configs: tuple[SerializeAsAny[AdapterConfig], ...] = Field(min_length=2)

    def __init__(self, *configs: AdapterConfig, **settings: Any) -> None:
        # Code gives configs by position, a file by the keyword `configs`: () beside it would be a second value for it.
        super().__init__(**({"configs": configs} if configs else {}), **settings)

    @field_validator("configs", mode="before")
    @classmethod
    def _are_configs(cls, configs: Any) -> Any:
        """Refuse what is no config: pydantic would make a plain AdapterConfig of a mapping."""
        wrong = [type(config).__name__ for config in configs if not isinstance(config, AdapterConfig)]
        if wrong:
            raise ValueError(f"a union holds configs such as ak.LoRAConfig(...); found {wrong}")
        return tuple(configs)

    def override(self, settings: Mapping[str, Any]) -> "Union":
        """Return the same union, each setting changed in every member that has it.

        Raises:
            ConfigError: no member has such a setting.
        """
        every = list(dict.fromkeys(name for config in self.configs for name in type(config).model_fields))
        unknown = [name for name in settings if name not in every]
        if unknown:
            raise ConfigError(
                f"no member of the union of {[c.method for c in self.configs]} has a setting {unknown}: "
                + "; ".join(no_setting(name, every) for name in unknown).replace("?; ", "? ")
            )
        # A member without the setting stays as it is: `rank=16` means the LoRA in the union.
        return Union(*(config.override(_settings_of(config, settings)) for config in self.configs))


def _settings_of(config: AdapterConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings that a config has."""
    return {name: value for name, value in settings.items() if name in type(config).model_fields}


Config = AdapterConfig | Union


def members(config: Config) -> tuple[AdapterConfig, ...]:
    """Return the configs of a union, or the config itself, as a tuple of one."""
    return config.configs if isinstance(config, Union) else (config,)
