"""A weight that a role names: of which module, and which of its features."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .parts import Lora

__all__ = ["Weight", "part_of", "whole"]

Slices = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


class Weight(NamedTuple):
    """A weight, as a site of a LoRA tells it.

    Attributes:
        module: What holds it.
        name: Of the Parameter, where the module is no projection itself.
        slices: Which features of it are meant, and whose they are; () for all.
    """

    module: nn.Module
    name: str = ""
    slices: Slices = ()


def whole(projection: nn.Module) -> Weight:
    """All of a projection, without what a low-rank branch adds to it."""
    return Weight(projection.base if isinstance(projection, Lora) else projection)


def part_of(projection: nn.Module, part: str, span: tuple[int, int]) -> Weight:
    """Queries ("q"), keys or values of a projection that makes more."""
    return whole(projection)._replace(slices=((part, (span,)),))
