"""From a spec to a model that runs, and inputs for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..weights import randomise
from .containers import INPUTS, Model
from .parts import LAYOUTS, TOKENS, WIDTH
from .spec import Spec

__all__ = ["Wild", "build"]


@dataclass
class Wild:
    """A generated model.

    Attributes:
        model: As adapterkit gets it.
        twin: The same without wrappers, of the same weights: what the truth is computed with.
        inputs: Keyword arguments for either.
    """

    spec: Spec
    model: Model
    twin: Model
    inputs: dict[str, Tensor]


def build(spec: Spec) -> Wild:
    """Build the model of a spec, always the same one."""
    model = _seeded(spec)
    twin = model if spec.wrapper == "none" else _seeded(replace(spec, wrapper="none"))
    draw = torch.Generator().manual_seed(1)
    shape = LAYOUTS[spec.layout].shape
    inputs = {"x": torch.randn(shape(TOKENS, INPUTS), generator=draw)}
    if spec.stream == "two" or spec.attention in ("cross", "cross_one"):
        length = 1 if spec.attention == "cross_one" else TOKENS - 2
        inputs["memory"] = torch.randn(shape(length, WIDTH), generator=draw)
    return Wild(spec, model, twin, inputs)


def _seeded(spec: Spec) -> Model:
    torch.manual_seed(0)
    return randomise(Model(spec).eval())
