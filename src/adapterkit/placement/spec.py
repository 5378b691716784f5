"""A site as a value: which module, which of its tensors, and what an adapter there reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..nn.functional.slices import Slices
from ..structure.anatomy.description import Norm
from ..structure.pytree import Path
from ..structure.tracing.row_layout import Layouts, RowLayout

__all__ = ["Location", "Reads", "SiteSpec", "layout_of", "located"]

Reads = Literal["site", "norm", "residual", "sum", "own_input", "weight"]


@dataclass(frozen=True)
class Location:
    """Where one module of an adapter sits and what it reads: two modules with equal locations adapt the same tensor.

    The fields are those of `SiteSpec`.
    """

    path: str
    at: str
    reads: Reads
    output: Path | None
    input: tuple[int | None, str | None] | None
    residual: str | None


@dataclass(frozen=True)
class SiteSpec:
    """A site: one module (the host) and one of its tensors or Parameters, which one module of an adapter adapts.

    Attributes:
        path: The host module's path in the model.
        host: Name of the host's type, as in torch.nn where it derives from there.
        at: How the host is adapted: at its "output", its "input" or a Parameter ("weight"); see `runtime.acting`.
        reads: What the adapter reads: the tensor at the site ("site"), that tensor through the host ("norm"), what enters
            the module `residual` ("residual"), the tensor at the site plus that ("sum"), what the host takes
            ("own_input"), or the Parameter ("weight").
        width: Features of the tensor at the site; of a Parameter, its size on the first axis.
        input_width: Features of what the adapter reads; of a Parameter, its size on the last axis.
        axis: The axis they lie on.
        layer: (index, count) of the repeated block that the host lies in, if any.
        output: Which tensor of the host's output; the first floating one if None.
        input: Which argument, of the host or of `residual`, as (position, keyword); the first floating one if None.
        residual: Path of the module whose input the adapter reads: the residual stream or, beside the host, its own.
        norm: Where a block normalises around the branch that the host yields, as `Sublayer.norm`; None where the host
            yields none, or the config did not need the model's structure.
        parameters: Names, from the host on, of the Parameter that is adapted; several where the host reads it under
            several. Of a tied Parameter each host that reads it is a site; one module serves them all.
        slices: Which features of the output (rows of the Parameter) are adapted; () for all of them.
        tag: Which of a method's placements it came of.
        member: Which config of a union it came of.
    """

    path: str
    host: str
    at: str
    reads: Reads
    width: int
    input_width: int
    axis: int = -1
    layer: tuple[int, int] | None = None
    output: Path | None = None
    input: tuple[int | None, str | None] | None = None
    residual: str | None = None
    norm: Norm | None = None
    parameters: tuple[str, ...] = ()
    slices: Slices = ()
    tag: str = ""
    member: int = 0

    @property
    def location(self) -> Location:
        """Return where the site is, without what its tensors look like and what it came of."""
        return Location(self.path, self.at, self.reads, self.output, self.input, self.residual)


def layout_of(layouts: Layouts, spec: SiteSpec) -> RowLayout | None:
    """Return the row layout observed for the tensor that `spec` adapts, or None."""
    if spec.at == "output":
        # e.g. ("output", 0) for the first tensor of a tuple; ("output",) is the first floating-point one.
        ways: list[Path] = [("output", *(spec.output or ()))]
    else:
        # A call is (args, kwargs): 1 leads to keywords, 0 to positions. ("input", 1, "hidden_states"), ("input", 0, 0)
        position, keyword = spec.input or (None, None)
        ways = [("input", side, key) for side, key in ((1, keyword), (0, position)) if key is not None] or [("input",)]
    return next((layouts[way] for way in ways if way in layouts), None)


def located(spec: SiteSpec, path: str) -> SiteSpec:
    """Return the spec with paths as they are in this model.

    The spec may have been made in a larger model, of which this is a part, or in a part of this one: paths then differ at
    their start.

    Args:
        path: The host's path in this model.
    """
    if path == spec.path:
        return spec
    residual = spec.residual
    if residual is not None and spec.path.endswith(f".{path}" if path else ""):
        # From the whole into a part: "bert.layer.0" is "layer.0" here, so "bert." goes from the residual's path, too.
        beginning = _beginning(spec.path, path)
        residual = "" if f"{residual}." == beginning else residual.removeprefix(beginning)
    elif residual is not None and path.endswith(f".{spec.path}" if spec.path else ""):
        # From a part into the whole: the residual's path gets the same beginning. Of "", the part itself, a dot is left.
        residual = f"{_beginning(path, spec.path)}{residual}".rstrip(".")
    return replace(spec, path=path, residual=residual)


def _beginning(path: str, end: str) -> str:
    """Return what stands before the end of a path, with its dot: "bert." of "bert.layer.0" and "layer.0", or of "bert"."""
    return path[: len(path) - len(end)] if end else f"{path}."
