"""Adapt any PyTorch model with small trained modules, and change nothing else about it.

    import adapterkit as ak

    kit = ak.wrap(model)
    kit.add("sst2", ak.BottleneckConfig(targets=["output.dense"], bottleneck_size=48))
    kit.train_adapter("sst2")

Names are loaded when they are first used: pydantic alone would double what the import may cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .composition.nodes import Average as Average
    from .composition.nodes import BatchSplit as BatchSplit
    from .composition.nodes import Drop as Drop
    from .composition.nodes import Fuse as Fuse
    from .composition.nodes import Parallel as Parallel
    from .composition.nodes import Rows as Rows
    from .composition.nodes import Split as Split
    from .composition.nodes import Stack as Stack
    from .composition.random_drop import random_drop as random_drop
    from .config.fusion import FusionConfig as FusionConfig
    from .config.union import Union as Union
    from .errors import ActivationError as ActivationError
    from .errors import AdapterKitError as AdapterKitError
    from .errors import AdapterNameError as AdapterNameError
    from .errors import CompatibilityError as CompatibilityError
    from .errors import ConfigError as ConfigError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import StoreError as StoreError
    from .errors import TargetError as TargetError
    from .heads.config import CausalLMHead as CausalLMHead
    from .heads.config import ClassificationHead as ClassificationHead
    from .heads.config import CustomHead as CustomHead
    from .heads.config import MaskedLMHead as MaskedLMHead
    from .heads.config import MultiLabelHead as MultiLabelHead
    from .heads.config import MultipleChoiceHead as MultipleChoiceHead
    from .heads.config import OwnHead as OwnHead
    from .heads.config import QuestionAnsweringHead as QuestionAnsweringHead
    from .heads.config import RegressionHead as RegressionHead
    from .heads.config import TaggingHead as TaggingHead
    from .heads.rows import HeadOutput as HeadOutput
    from .inspection.fusion_attention import FusionAttention as FusionAttention
    from .inspection.fusion_attention import draw_attention as draw_attention
    from .kit import AdapterKit as AdapterKit
    from .kit import wrap as wrap
    from .methods.in_tree import *  # noqa: F403  # the configs of all methods, which have one line each there
    from .placement.spec import SiteSpec as SiteSpec
    from .store.check_base import BaseMismatchWarning as BaseMismatchWarning
    from .store.check_sites import SitesNotCheckedWarning as SitesNotCheckedWarning
    from .store.manifest import Metadata as Metadata

__version__ = "0.1.0"

# Where each public name lives. The configs of methods are not here: each has its one line in `methods/in_tree.py`.
_NAMES_IN = {
    ".composition.nodes": "Average BatchSplit Drop Fuse Parallel Rows Split Stack",
    ".composition.random_drop": "random_drop",
    ".config.fusion": "FusionConfig",
    ".config.union": "Union",
    ".errors": (
        "ActivationError AdapterKitError AdapterNameError CompatibilityError ConfigError "
        "MissingExtraError StoreError TargetError"
    ),
    ".heads.config": (
        "CausalLMHead ClassificationHead CustomHead MaskedLMHead MultiLabelHead MultipleChoiceHead "
        "OwnHead QuestionAnsweringHead RegressionHead TaggingHead"
    ),
    ".heads.rows": "HeadOutput",
    ".inspection.fusion_attention": "FusionAttention draw_attention",
    ".kit": "AdapterKit wrap",
    ".placement.spec": "SiteSpec",
    ".store.check_base": "BaseMismatchWarning",
    ".store.check_sites": "SitesNotCheckedWarning",
    ".store.manifest": "Metadata",
}
_HOMES = {name: home for home, names in _NAMES_IN.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    # `__all__` lists the configs, too, and is made when it is asked for: by then they have to be imported.
    if name == "__all__":
        return __dir__()
    # No other name leads to the configs, so that a misspelt one, or a submodule's, does not import them all.
    if name not in _HOMES and name.endswith("Config") and name in _configs():
        return _configs()[name]
    if name not in _HOMES:
        raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES, *_configs()])


def _configs() -> dict[str, Any]:
    """Return the configs of this package's methods by their names."""
    in_tree = vars(import_module(".methods.in_tree", __name__))
    return {name: config for name, config in in_tree.items() if name.endswith("Config")}
