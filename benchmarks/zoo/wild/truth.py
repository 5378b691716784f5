"""What is right in a generated model, by definition.

Presets and roles of outputs (f: the bottleneck, x: a branch, r: the stream that it comes of, s: the sum that it goes into):

    houlsby               x + f(x)           at each branch but a cross-attention's
    @KIND.out             x + f(x)           at each branch of that kind
    pfeiffer              s + f(norm(s))     after the last sub-layer of each block, if a norm follows the sum (post-norm)
                          s + f(s)           there, if none does
    parallel              x + f(r)           at the last sub-layer of each block

They are computed by the model itself (`taps`), so that the truth is a tensor: the model's output with these adapters. All
adapters have the same weights, so it does not matter which module of the kit goes to which place.

Roles of projections are the projections that each part says are its (`weights`): `@attention.q`, `@feedforward.first`, ….

Where two answers are fair (of a reversible block r is what the branch reads, or what it is added to), any of them is right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from .build import Wild
from .spec import Spec
from .taps import Formula, Place, trying
from .weights import Slices

__all__ = ["PRESETS", "ROLES", "SIZE", "may_refuse", "numbers", "outputs_of", "weights_of"]

SIZE = 4  # of the bottleneck
PRESETS = ("houlsby", "pfeiffer", "parallel")
ROLES = (
    *(f"@{kind}.{part}" for kind in ("attention", "crossattention") for part in "qkv"),
    "@feedforward.first",
    "@feedforward.last",
)
Weights = Collection[tuple[str, str, Slices]]


def numbers(shape: tuple[int, ...], index: int) -> Tensor:
    """Return the values of a bottleneck's Parameter: the same for every bottleneck of its width."""
    draw = torch.Generator().manual_seed(index)
    return 0.5 * torch.randn(shape, generator=draw)


def bottleneck(x: Tensor, axis: int) -> Tensor:
    """Return f(x) = up(tanh(down(x))) over the features, whichever axis they are on."""
    x = x.movedim(axis, -1)
    width = x.shape[-1]
    down, up = numbers((SIZE, width), 0), numbers((width, SIZE), 2)
    out = torch.tanh(x @ down.T + numbers((SIZE,), 1)) @ up.T + numbers((width,), 3)
    return out.movedim(-1, axis)


class AtBranches(Formula):
    """x + f(x) at some branches."""

    def __init__(self, is_meant: Callable[[Place], bool]) -> None:
        self.is_meant = is_meant

    def branch(self, place: Place, x: Tensor, reads: tuple[Tensor, ...]) -> Tensor:
        """Return the adapted branch."""
        return x + bottleneck(x, place.axis) if self.is_meant(place) else x


class AtSums(Formula):
    """s + f(norm(s)) after the last sub-layer of each block. `stage`: of two sums, the one that is meant."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def total(self, place: Place, s: Tensor, norm: Callable[[Tensor], Tensor] | None, stage: str) -> Tensor:
        """Return the adapted sum."""
        if not place.is_last or stage not in ("", self.stage):
            return s
        return s + bottleneck(s if norm is None else norm(s), place.axis)


class Beside(Formula):
    """x + f(r) at the last sub-layer of each block. `which`: of two ways of saying what r is, the one that is meant."""

    def __init__(self, which: int) -> None:
        self.which = which

    def branch(self, place: Place, x: Tensor, reads: tuple[Tensor, ...]) -> Tensor:
        """Return the adapted branch."""
        if not place.is_last:
            return x
        return x + bottleneck(reads[min(self.which, len(reads) - 1)], place.axis)


def formulas(question: str) -> Iterator[Formula]:
    """Yield every formula that a preset or a role of outputs may fairly be read as."""
    if question == "houlsby":
        yield AtBranches(lambda place: place.kinds[0] != "crossattention")
    elif question == "pfeiffer":
        yield from (AtSums("handed on"), AtSums("added"))
    elif question == "parallel":
        yield from (Beside(0), Beside(1))
    else:
        kind = question[1:].removesuffix(".out")
        yield AtBranches(lambda place: place.kinds[0] == kind)
        yield AtBranches(lambda place: kind in place.kinds)


def outputs_of(question: str, wild: Wild) -> Iterator[Tensor]:
    """Yield the outputs that are right with adapters of a preset, or at a role."""
    for formula in formulas(question):
        with torch.no_grad(), trying(formula):
            yield wild.twin(**wild.inputs)


def weights_of(role: str, wild: Wild) -> Iterator[Weights]:
    """Yield the sets of weights that are right for a role: (module, Parameter in it or "", slices)."""
    kind, _, part = role[1:].partition(".")
    paths = {id(module): path for path, module in wild.model.named_modules()}
    for is_meant in (lambda place: place.kinds[0] == kind, lambda place: kind in place.kinds):
        meant = [s.part for s in wild.model.sublayers if is_meant(s.place)]
        found = (weight for one in meant for weight in one.weights.get(part, []))
        yield {(paths[id(weight.module)], weight.name, weight.slices) for weight in found}


def may_refuse(question: str, wild: Wild) -> bool:
    """Tell whether an error is as right as an answer: there is nothing to find, or no hook can be there."""
    spec, sublayers = wild.spec, wild.model.sublayers
    if question.startswith("@"):
        kind = question[1:].partition(".")[0]
        if not any(sublayer.place.kinds[0] == kind for sublayer in sublayers):
            return True  # there is no such sub-layer
    return any(is_so for is_so, _reason in _impossible(question, spec))


def _impossible(question: str, spec: Spec) -> Iterator[tuple[bool, str]]:
    """Yield what no hook can do, in a spec: (whether it is so, why)."""
    is_function = spec.norm_by in ("torch", "hand") and spec.norm != "none"
    is_unseen = is_function and spec.norm in ("pre", "sandwich") and spec.unit != "residual"
    is_no_output = is_function and spec.norm in ("sandwich", "end")
    if question == "pfeiffer":
        yield spec.norm == "post" and is_function, "the norm that has to run again is no module"
        yield spec.stream == "hyper", "there is no one sum"
        if spec.container in ("pairs", "dicts", "columns", "stages", "flat") and spec.unit != "residual":
            # No module returns the sum. An adapter at the branch has to read the stream, and add to the branch itself.
            yield is_unseen or is_no_output, "a function takes the stream, or makes the branch"
            yield (
                spec.stream in ("parallel", "half", "macaron", "scaled"),
                "the sum is not that of the branch and the stream",
            )
    if question == "parallel":
        yield is_unseen, "no module takes the stream that a function normalises"
    if question in ("houlsby", "parallel") or question.endswith(".out"):
        yield is_no_output, "no module returns what a function makes of a branch"
