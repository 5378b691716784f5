"""Adapt any PyTorch model with small trained modules, and change nothing else about it.

import adapterkit as ak

kit = ak.wrap(model)
kit.add("sst2", ak.BottleneckConfig(targets=["output.dense"], bottleneck_size=48))
kit.train_adapter("sst2")
"""

from .config.bottleneck import BottleneckConfig
from .errors import (
    ActivationError,
    AdapterKitError,
    AdapterNameError,
    CompatibilityError,
    ConfigError,
    StoreError,
    TargetError,
)
from .kit import AdapterKit, wrap
from .sites import SiteSpec
from .store.load import BaseMismatchWarning
from .store.manifest import Metadata

__version__ = "0.1.0"

__all__ = [
    "ActivationError",
    "AdapterKit",
    "AdapterKitError",
    "AdapterNameError",
    "BaseMismatchWarning",
    "BottleneckConfig",
    "CompatibilityError",
    "ConfigError",
    "Metadata",
    "SiteSpec",
    "StoreError",
    "TargetError",
    "__version__",
    "wrap",
]
