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
    from .composition.nodes import Average, BatchSplit, Drop, Fuse, Parallel, Rows, Split, Stack
    from .composition.random_drop import random_drop
    from .config.fusion import FusionConfig
    from .config.union import Union
    from .errors import (
        ActivationError,
        AdapterKitError,
        AdapterNameError,
        CompatibilityError,
        ConfigError,
        MissingExtraError,
        StoreError,
        TargetError,
    )
    from .heads.config import (
        CausalLMHead,
        ClassificationHead,
        CustomHead,
        MaskedLMHead,
        MultiLabelHead,
        MultipleChoiceHead,
        OwnHead,
        QuestionAnsweringHead,
        RegressionHead,
        TaggingHead,
    )
    from .heads.rows import HeadOutput
    from .inspection.fusion_attention import FusionAttention, draw_attention
    from .kit import AdapterKit, wrap
    from .methods.bitfit import BitFitConfig
    from .methods.bottleneck import BottleneckConfig
    from .methods.compacter import CompacterConfig
    from .methods.ia3 import IA3Config
    from .methods.invertible import InvertibleConfig
    from .methods.lora import LoRAConfig
    from .methods.norm_tuning import NormTuningConfig
    from .methods.vera import VeRAConfig
    from .placement.spec import SiteSpec
    from .store.check_base import BaseMismatchWarning
    from .store.check_sites import SitesNotCheckedWarning
    from .store.manifest import Metadata

__version__ = "0.1.0"

__all__ = [
    "ActivationError",
    "AdapterKit",
    "AdapterKitError",
    "AdapterNameError",
    "Average",
    "BaseMismatchWarning",
    "BatchSplit",
    "BitFitConfig",
    "BottleneckConfig",
    "CausalLMHead",
    "ClassificationHead",
    "CompacterConfig",
    "CompatibilityError",
    "ConfigError",
    "CustomHead",
    "Drop",
    "Fuse",
    "FusionAttention",
    "FusionConfig",
    "HeadOutput",
    "IA3Config",
    "InvertibleConfig",
    "LoRAConfig",
    "MaskedLMHead",
    "Metadata",
    "MissingExtraError",
    "MultiLabelHead",
    "MultipleChoiceHead",
    "NormTuningConfig",
    "OwnHead",
    "Parallel",
    "QuestionAnsweringHead",
    "RegressionHead",
    "Rows",
    "SiteSpec",
    "SitesNotCheckedWarning",
    "Split",
    "Stack",
    "StoreError",
    "TaggingHead",
    "TargetError",
    "Union",
    "VeRAConfig",
    "__version__",
    "draw_attention",
    "random_drop",
    "wrap",
]

# Where each public name lives; the others are errors.
_HOMES = {
    "AdapterKit": ".kit",
    "Average": ".composition.nodes",
    "BaseMismatchWarning": ".store.check_base",
    "BatchSplit": ".composition.nodes",
    "BitFitConfig": ".methods.bitfit",
    "BottleneckConfig": ".methods.bottleneck",
    "CausalLMHead": ".heads.config",
    "ClassificationHead": ".heads.config",
    "CompacterConfig": ".methods.compacter",
    "CustomHead": ".heads.config",
    "Drop": ".composition.nodes",
    "Fuse": ".composition.nodes",
    "FusionAttention": ".inspection.fusion_attention",
    "FusionConfig": ".config.fusion",
    "HeadOutput": ".heads.rows",
    "IA3Config": ".methods.ia3",
    "InvertibleConfig": ".methods.invertible",
    "LoRAConfig": ".methods.lora",
    "MaskedLMHead": ".heads.config",
    "Metadata": ".store.manifest",
    "MultiLabelHead": ".heads.config",
    "MultipleChoiceHead": ".heads.config",
    "NormTuningConfig": ".methods.norm_tuning",
    "OwnHead": ".heads.config",
    "Parallel": ".composition.nodes",
    "SitesNotCheckedWarning": ".store.check_sites",
    "QuestionAnsweringHead": ".heads.config",
    "RegressionHead": ".heads.config",
    "Rows": ".composition.nodes",
    "SiteSpec": ".placement.spec",
    "Split": ".composition.nodes",
    "Stack": ".composition.nodes",
    "TaggingHead": ".heads.config",
    "Union": ".config.union",
    "VeRAConfig": ".methods.vera",
    "draw_attention": ".inspection.fusion_attention",
    "random_drop": ".composition.random_drop",
    "wrap": ".kit",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, ".errors"), __name__), name)


def __dir__() -> list[str]:
    return __all__
