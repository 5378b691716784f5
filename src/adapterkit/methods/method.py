"""What a method is: how it is configured, where it sits, and the modules it puts there."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ..config.settings import AdapterConfig
from ..placement.rule import Placement
from ..placement.spec import SiteSpec

__all__ = ["AdaptsParameter", "LinearInParameters", "Mergeable", "Method", "SharesTensors"]

# A method handles the configs of its own class alone.
C = TypeVar("C", bound=AdapterConfig)


class Method(Protocol[C]):
    """A family of adapters. Matching, attaching, moving, freezing, merging, saving and loading are done for it.

    Attributes:
        name: What `config.method` says.
        config_type: The class of its configs.
        presets: Settings by the names that papers and other libraries gave them.
    """

    name: str
    config_type: type[C]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    def placements(self, config: C) -> tuple[Placement, ...]:
        """Return where its modules sit at their hosts, and what they read."""
        ...

    def build(self, config: C, site: SiteSpec, *, host: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Build a new module for one site, on torch's default device.

        It has a property `compute_dtype`, the dtype that it computes in, and one of

            module(z, x) -> delta              z (..., input_width), x and delta (..., width); for `level="tensor"`
            module(z, x, host) -> delta        z what the host takes, x and delta what it returns; for `level="projection"`
            module.adapted(weight) -> weight   the host's Parameter with its change; for sites with `parameters`

        and, where the host's weights can take its change for good, `Mergeable.merged`; at a Parameter `adapted` is enough
        for that. What else a module may say of itself stands in `nn.traits`.
        """
        ...


@runtime_checkable
class Mergeable(Protocol):
    """A module whose change the host's weights can take for good."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the module computes in."""
        ...

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the host tensors to overwrite so that, in eval mode, the host alone computes what it did with the module.

        Args:
            tensors: Map name → tensor, in `compute_dtype`: "weight" and, if the host has one, "bias"; at a Parameter that
                alone, as "weight".

        Raises:
            CompatibilityError: there are no such tensors; says why.
        """
        ...


@runtime_checkable
class AdaptsParameter(Protocol):
    """A module that changes a Parameter of its host, whose input it does not see."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the module computes in."""
        ...

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the Parameter with its change. Shape: as the Parameter."""
        ...


@runtime_checkable
class SharesTensors(Protocol):
    """A method whose modules of one adapter share tensors: each finds them as `self.shared` (see `nn.shared`)."""

    def shared(self, config: Any, sites: Sequence[SiteSpec], *, dtype: torch.dtype) -> nn.Module | None:
        """Build the module that holds them, once for each adapter, before the modules of its sites; None for nothing."""
        ...


@runtime_checkable
class LinearInParameters(Protocol):
    """A method whose change is linear in its parameters, so that sums of adapters are sums of parameters.

    Attributes:
        neutral: What every parameter of an adapter that changes nothing is; sums are of differences to it.
    """

    neutral: float
