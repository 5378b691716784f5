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
    """Where a method's modules sit at their targets, and what they read.

    Example: LoRA is `Placement(level="projection", reads="own_input")`: at every targeted layer that applies a weight, and
    its modules read what the layer takes.

    Attributes:
        at: How the host is adapted: a name of `runtime.acting`, such as "output" or "input". Two more are resolved by the
            model's structure: "sum" is the target's residual addition, "normalised" the norm after it where there is one.
        reads: What the modules read, as `SiteSpec.reads` says; "own_input" is what the target itself takes.
        residual: A pattern for the module whose input they read; STREAM for the residual stream of the target's block.
        level: What a target is: a module whose tensors are adapted ("tensor"), a module that applies a weight to what
            it takes ("projection"; see `nn.functional.projections`), or a Parameter ("parameter").
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
        """Tell whether a site, read from a file, may come of this placement.

        A file names sites, its config names targets: this keeps a file from putting a module where its config never would.
        """
        if site.tag != self.tag:
            return False
        if self.level == "parameter" or site.at == "weight":  # what a projection's target names may be a bare Parameter
            return self.level != "tensor" and (site.at, site.reads) == ("weight", "weight") and bool(site.parameters)
        if self.level == "projection":
            return (site.at, site.reads, site.residual) == (self.at, self.reads, None)
        # These two become another `at` in each model, so a site never says them.
        if self.at in ("sum", "normalised"):
            return _can_be_a_sum(site)
        # An adapter that reads its target's own input finds it as any other stream: at the module that takes it.
        reads = "residual" if self.reads == "own_input" else self.reads
        has_stream = site.residual is not None
        return (site.at, site.reads) == (self.at, reads) and has_stream == (reads not in ("site", "norm"))


def _can_be_a_sum(site: SiteSpec) -> bool:
    """Tell whether a site may be that of a residual sum s = x + r, wherever the model lets s be adapted."""
    before_norm = (site.at, site.reads) == ("input", "norm")  # a post-norm block: s is what its norm takes
    at_output = (site.at, site.reads) == ("output", "site")  # a module returns s, or the norm of it
    at_branch = (site.at, site.reads) == ("output", "sum")  # no module returns s: x is adapted, x + r is read
    if site.residual is None:
        return before_norm or at_output
    return at_branch
