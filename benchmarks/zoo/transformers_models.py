"""Tiny models with random weights, and inputs for them, of every type that transformers' AutoModel knows."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from .make_inputs import completed, inputs_that_run
from .own_inputs import INPUTS
from .settings import CONFIGS, EXPLAINED, IRREGULAR, SETTINGS, UNRUNNABLE
from .shrink import WAYS, override, set_as_given
from .weights import randomise

__all__ = ["EXPLAINED", "IRREGULAR", "LIBRARIES", "build", "check_builds", "names"]

LIBRARIES = ("transformers",)
LARGEST = 120_000_000  # parameters

transformers.logging.set_verbosity_error()


def names() -> list[str]:
    """Every type, sorted."""
    return sorted(MODEL_MAPPING_NAMES)


def check_builds(model_type: str) -> None:
    """Build the default config without memory for weights; raises whatever that raises."""
    with torch.device("meta"):
        AutoModel.from_config(CONFIG_MAPPING[model_type]())


def build(model_type: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model in eval mode, and keyword inputs that it runs on.

    Raises:
        RuntimeError: no way of shrinking it gives a model that runs; it says what each came to.
    """
    if model_type in UNRUNNABLE:
        raise RuntimeError(UNRUNNABLE[model_type])
    errors = []
    for shrink in (set_as_given(CONFIGS[model_type]),) if model_type in CONFIGS else WAYS:
        try:
            config = shrink(CONFIG_MAPPING[model_type]())
            override(config, SETTINGS.get(model_type, {}))
            model = _tiny(config)
            if model_type in INPUTS:
                return model, completed(model, INPUTS[model_type](model))
            return model, inputs_that_run(model)
        except Exception as error:  # whatever a model raises: the next way may do
            errors.append(f"{type(error).__name__}: {error}".replace("\n", " ")[:160])
    raise RuntimeError("; ".join(dict.fromkeys(errors)))


def _tiny(config: PretrainedConfig) -> nn.Module:
    """The model of a config, with random weights, if it is small; else ValueError."""
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModel.from_config(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters are not a tiny model")
    torch.manual_seed(0)
    return randomise(AutoModel.from_config(config).float().eval())
