"""Describe layers of your own, so that they are adapted as torch's are: what a package needs that does, in one place.

    from adapterkit.placement.hosts import HostShape, HostType, Projection, register_host

The guide, with a whole layer: docs/hosts.md.
"""

from ..nn.functional.projections import Projection
from ..structure.hosts import HostShape, HostType, register_host

__all__ = ["HostShape", "HostType", "Projection", "register_host"]
