"""What a host multiplies its input by: torch's layers, and those that other packages describe."""

from torch import nn

from ..errors import ConfigError
from ..nn.functional import projections as torchs
from ..nn.functional.projections import Projection
from ..structure.hosts import described_projection

__all__ = ["projection_of"]


def projection_of(module: nn.Module) -> Projection | None:
    """Return the geometry of the weight that a module applies; None if it applies none that is known.

    A package's own description comes first: its subclass of `nn.Linear` may store the weight in another shape.

    Raises:
        ConfigError: the description gives something else.
    """
    described = described_projection(module)
    if described is None:
        return torchs.projection_of(module)
    if not isinstance(described, Projection):
        raise ConfigError(
            f"the HostType of {type(module).__name__} must give an adapterkit.placement.hosts.Projection as its projection; "
            f"found {described!r}"
        )
    return described
