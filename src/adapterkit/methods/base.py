"""What a method is: how it is configured, where it sits, and the module it puts there."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn

from ..config.base import AdapterConfig
from ..placement import Placement
from ..sites import SiteSpec

__all__ = ["Method"]

C = TypeVar("C", bound=AdapterConfig)


class Method(Protocol[C]):
    """A family of adapters. Matching, attaching, moving, freezing and saving are done for it.

    Attributes:
        name: What `config.method` says.
        config_type: The class of its configs.
        presets: Settings by the names that papers and other libraries gave them.
    """

    name: str
    config_type: type[C]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    def placement(self, config: C) -> Placement:
        """Where its modules sit at their hosts, and what they read."""
        ...

    def build(self, config: C, site: SiteSpec, *, dtype: torch.dtype) -> nn.Module:
        """A new module for one site, called as `module(z, x) -> delta`, z (..., input_width), x and delta (..., width).

        It has a property `compute_dtype`, the dtype that z is cast to.
        """
        ...
