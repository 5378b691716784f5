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
    from .adapterdrop import random_drop
    from .attention import FusionAttention, draw_attention
    from .composition import Average, BatchSplit, Drop, Fuse, Parallel, Rows, Split, Stack
    from .config.bitfit import BitFitConfig
    from .config.bottleneck import BottleneckConfig
    from .config.compacter import CompacterConfig
    from .config.fusion import FusionConfig
    from .config.heads import (
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
    from .config.ia3 import IA3Config
    from .config.invertible import InvertibleConfig
    from .config.lora import LoRAConfig
    from .config.norm_tuning import NormTuningConfig
    from .config.union import Union
    from .config.vera import VeRAConfig
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
    from .heads.output import HeadOutput
    from .kit import AdapterKit, wrap
    from .sites import SiteSpec
    from .store.load import BaseMismatchWarning
    from .store.manifest import Metadata
    from .store.places import PlacesNotCheckedWarning

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
    "PlacesNotCheckedWarning",
    "QuestionAnsweringHead",
    "RegressionHead",
    "Rows",
    "SiteSpec",
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
    **dict.fromkeys(("Average", "BatchSplit", "Drop", "Fuse", "Parallel", "Rows", "Split", "Stack"), ".composition"),
    **dict.fromkeys(("FusionAttention", "draw_attention"), ".attention"),
    **dict.fromkeys(
        (
            "CausalLMHead",
            "ClassificationHead",
            "CustomHead",
            "MaskedLMHead",
            "MultiLabelHead",
            "MultipleChoiceHead",
            "OwnHead",
            "QuestionAnsweringHead",
            "RegressionHead",
            "TaggingHead",
        ),
        ".config.heads",
    ),
    "AdapterKit": ".kit",
    "BaseMismatchWarning": ".store.load",
    "BitFitConfig": ".config.bitfit",
    "BottleneckConfig": ".config.bottleneck",
    "CompacterConfig": ".config.compacter",
    "FusionConfig": ".config.fusion",
    "HeadOutput": ".heads.output",
    "IA3Config": ".config.ia3",
    "InvertibleConfig": ".config.invertible",
    "LoRAConfig": ".config.lora",
    "Metadata": ".store.manifest",
    "NormTuningConfig": ".config.norm_tuning",
    "PlacesNotCheckedWarning": ".store.places",
    "SiteSpec": ".sites",
    "Union": ".config.union",
    "VeRAConfig": ".config.vera",
    "random_drop": ".adapterdrop",
    "wrap": ".kit",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, ".errors"), __name__), name)


def __dir__() -> list[str]:
    return __all__
