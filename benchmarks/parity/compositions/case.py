"""One composition of adapters in a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import adapterkit as ak

from ..methods.case import Case, Key

__all__ = ["BOTTLENECKS", "METHODS", "NAMES", "ComposedCase", "Tensors"]

NAMES = ("a", "b", "c")
BOTTLENECKS = ("seq_bn", "double_seq_bn", "par_bn")
METHODS = (*BOTTLENECKS, "lora", "ia3")
# By the name of an adapter or a fusion.
Tensors = Mapping[str, Mapping[Key, Tensor]]


@dataclass(frozen=True)
class ComposedCase(Case):
    """A composition of the adapters "a", "b" and "c", all of one method; the fields of `Case` say which, in which model.

    Attributes:
        kind: The row of the table.
        composition: In our words.
        fusion: Settings of the fusion in it, in our words; `there` has what else theirs takes.
        forwards: Which of several forwards in a row is compared.
        without: Inputs that are left out.
    """

    kind: str = ""
    composition: ak.Composition = "a"
    fusion: Mapping[str, Any] = field(default_factory=dict)
    forwards: int = 1
    without: tuple[str, ...] = ()

    @property
    def is_bottleneck(self) -> bool:
        """Whether the adapters are bottlenecks, and no changes of weights."""
        return self.method in BOTTLENECKS
