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

    They are added, trained, saved and activated as one. At a place that several of them adapt they act in this order.

    Args:
        *configs: Two or more configs, of any methods; none of them a union.

    Raises:
        ConfigError: fewer than two, or something else than configs.

    Reference: Mao et al. 2022, arXiv:2110.07577 (UniPELT); He et al. 2022, arXiv:2110.04366 (MAM).
    """

    method: Literal["union"] = "union"
    configs: tuple[SerializeAsAny[AdapterConfig], ...] = Field(min_length=2)

    def __init__(self, *configs: AdapterConfig, **settings: Any) -> None:
        super().__init__(**({"configs": configs} if configs else {}), **settings)

    @field_validator("configs", mode="before")
    @classmethod
    def _are_configs(cls, configs: Any) -> Any:
        """Only configs: pydantic would make a plain AdapterConfig of a mapping."""
        wrong = [type(config).__name__ for config in configs if not isinstance(config, AdapterConfig)]
        if wrong:
            raise ValueError(f"a union holds configs such as ak.LoRAConfig(...); found {wrong}")
        return tuple(configs)

    def override(self, settings: Mapping[str, Any]) -> "Union":
        """The same union, each setting changed in every member that has it.

        Raises:
            ConfigError: no member has such a setting.
        """
        fields = [type(config).model_fields for config in self.configs]
        unknown = [name for name in settings if not any(name in known for known in fields)]
        if unknown:
            every = list(dict.fromkeys(name for known in fields for name in known))
            raise ConfigError(
                f"no member of the union of {[c.method for c in self.configs]} has a setting {unknown}: "
                + "; ".join(no_setting(name, every) for name in unknown).replace("?; ", "? ")
            )
        pairs = zip(self.configs, fields, strict=True)
        return Union(*(config.override({k: v for k, v in settings.items() if k in known}) for config, known in pairs))


Config = AdapterConfig | Union


def members(config: Config) -> tuple[AdapterConfig, ...]:
    """The configs of a union, or the config itself."""
    return config.configs if isinstance(config, Union) else (config,)
