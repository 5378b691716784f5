"""Placement: the rule by which a method chooses its sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..config.settings import Target
from .spec import Reads, SiteSpec

__all__ = ["STREAM", "Placement"]


# As a `residual`: the stream that enters the target's sub-layer, wherever the model keeps it.
STREAM = "@stream"


def any_parameter(_owner: nn.Module, _name: str, _parameter: nn.Parameter) -> bool:
    """Accept every Parameter."""
    return True


@dataclass(frozen=True)
class Placement:
    """Where a method's modules sit at their targets, and what they read: see `SiteSpec`; "input" is the target's own.

    With `at="sum"` the target's residual addition is adapted, with `at="normalised"` the norm after it where there is
    one: which tensor of which module that is, the model's structure decides.

    Attributes:
        level: What a target is: a module whose tensors are adapted ("tensor"), a module that applies a weight to what
            it takes ("projection"; see `ops.projections`), or a Parameter ("parameter").
        targets: Patterns, roles or predicates in place of those of the config.
        is_optional: Whether they may match nothing.
        accepts: Of the Parameters that are matched, or lie in matched modules, those that the method can train:
            `(module that holds it, its name there, the Parameter) -> bool`.
        tag: A name for the method to tell its placements apart by.
    """

    at: str = "output"
    reads: Reads = "site"
    residual: str | None = None
    level: Literal["tensor", "projection", "parameter"] = "tensor"
    targets: tuple[Target, ...] | None = None
    is_optional: bool = False
    accepts: Callable[[nn.Module, str, nn.Parameter], bool] = any_parameter
    tag: str = ""

    def allows(self, site: SiteSpec) -> bool:
        """Whether a site may come of this placement."""
        if site.tag != self.tag:
            return False
        if self.level == "parameter" or site.at == "weight":
            return self.level != "tensor" and (site.at, site.reads) == ("weight", "weight") and bool(site.parameters)
        if self.level == "projection":
            return (site.at, site.reads, site.residual) == (self.at, self.reads, None)
        if self.at in ("sum", "normalised"):
            found = (site.at, site.reads, site.residual is None)
            return found in {("input", "norm", True), ("output", "site", True), ("output", "sum", False)}
        reads = "residual" if self.reads == "own_input" else self.reads
        return (site.at, site.reads) == (self.at, reads) and (site.residual is None) == (reads in ("site", "norm"))
