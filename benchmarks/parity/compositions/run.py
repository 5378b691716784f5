"""One case: the peer and ours, with the same tensors, against the formula and against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition.nodes import fusions_in, names_in

from ..measure import default_dtype, float_tensors, furthest, gradients_of, relative
from ..methods.adapters_peer import prepared
from ..methods.case import Key, Leaf
from ..methods.hosts import Host, host
from ..methods.ours import PlacesDifferError
from .case import ComposedCase
from .formula import outputs
from .known import faults, refusal
from .ours import ComposedOurs
from .peer import KEY_BIAS, ComposedPeer

__all__ = ["ComposedOutcome", "run_composed"]

T = TypeVar("T")
Differences = dict[str, float]


@dataclass
class ComposedOutcome:
    """What a case gave; differences are of outputs and gradients.

    Attributes:
        tolerance: Below which a difference is rounding.
        peer: How far the peer lies from the formula.
        ours: How far ours does.
        apart: How far ours lies from the peer.
        proven: How far a wrong peer's outputs lie from the formula with its known faults.
        refused: With what words the peer refuses.
        refused_here: The same of ours.
        key_bias: The largest gradient of the bias of a fusion's keys, which ours has not, in parts of their weights'.
    """

    case: ComposedCase
    tolerance: float
    peer: Differences = field(default_factory=dict)
    ours: Differences = field(default_factory=dict)
    apart: Differences = field(default_factory=dict)
    proven: float | None = None
    refused: str | None = None
    refused_here: str | None = None
    key_bias: float | None = None

    def verdict(self) -> str:
        """Of ours.

        "differs": ours is not what the formula gives, or not what a peer gives that is right, or the peer is wrong for an
        unknown reason. "explained": the peer is wrong or refuses, for a known reason, and ours equals the formula. "equal":
        to the peer and the formula.
        """
        if self.refused_here is not None or not self._is_within(self.ours):
            return "differs"
        if self.refused is not None:
            return "differs" if refusal(self.case) is None else "explained"
        if self._is_within(self.peer):
            return "equal" if self._is_within(self.apart) else "differs"
        if self.proven is None:
            return "explained" if faults(self.case) else "differs"
        return "explained" if self.proven <= self.tolerance else "differs"

    def reasons(self) -> list[str]:
        """Why it is not equal."""
        if self.verdict() != "explained":
            return []
        if self.refused is not None:
            return [known.reason for known in [refusal(self.case)] if known is not None]
        return [fault.reason for fault in faults(self.case)]

    def as_json(self) -> dict[str, Any]:
        """The outcome in plain values."""
        return {
            **{name: getattr(self.case, name) for name in ("kind", "method", "host", "setting")},
            "tolerance": self.tolerance,
            "verdict": self.verdict(),
            "ours_from_peer": self.apart,
            "ours_from_formula": self.ours,
            "peer_from_formula": self.peer,
            "peer_proven": self.proven,
            "peer_refused": self.refused,
            "ours_refused": self.refused_here,
            "key_bias_gradient": self.key_bias,
            "reasons": self.reasons(),
        }

    def _is_within(self, found: Differences) -> bool:
        return bool(found) and all(value <= self.tolerance for value in found.values())


@dataclass
class _Found:
    """What one side computes: outputs, and gradients in the order of the leaves."""

    outputs: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class _Sides:
    """A model with three adapters in both libraries, and bare for the formula."""

    host: Host
    plain: nn.Module
    peer: ComposedPeer
    ours: ComposedOurs


def run_composed(case: ComposedCase) -> ComposedOutcome:
    """Run a case."""
    with default_dtype(torch.float64):
        sides = _sides(case.host, case.method)
        if case.without:
            inputs = {name: value for name, value in sides.host.inputs.items() if name not in case.without}
            sides = replace(sides, host=replace(sides.host, inputs=inputs))
        outcome = ComposedOutcome(case, sides.host.tolerance)
        fuse = next(fusions_in(case.composition), None)
        try:
            if fuse is not None:
                leaves = sides.peer.add_fusion(case, fuse)
                sides.ours.add_fusion(case, fuse, {key: leaf.value() for key, leaf in leaves.items()})
            _measure(case, sides, outcome)
        finally:
            if fuse is not None:
                sides.peer.remove_fusion(fuse)
                sides.ours.remove_fusion(fuse)
        return outcome


def _measure(case: ComposedCase, sides: _Sides, outcome: ComposedOutcome) -> None:
    names = list(dict.fromkeys(names_in(case.composition)))
    tensors = {name: _values(sides.peer.leaves[name]) for name in names}
    expected = _expected(case, sides, tensors)
    there, outcome.refused = _attempt(lambda: _found(sides.peer, case, sides.host, names), Exception)
    here, outcome.refused_here = _attempt(
        lambda: _found(sides.ours, case, sides.host, names), ak.AdapterKitError, PlacesDifferError
    )
    if there is not None:
        outcome.peer = _differences(there, expected)
        outcome.key_bias = _key_bias(case, sides)
    if here is not None:
        outcome.ours = _differences(here, expected)
    if there is not None and here is not None:
        outcome.apart = _differences(here, there)
    known = frozenset(fault.name for fault in faults(case) if fault.name is not None)
    if there is not None and known and not outcome._is_within(outcome.peer):
        with torch.no_grad():
            outcome.proven = furthest(there.outputs, outputs(case, sides.host, sides.plain, tensors, known))


@lru_cache(maxsize=1)
def _sides(family: str, method: str) -> _Sides:
    """Both libraries' copies of a model, made once for all compositions of it."""
    it = host(family)
    case = ComposedCase("adapters", method, family, "", {"rank": 4, "alpha": 8} if method == "lora" else {})
    peer = ComposedPeer(case, it)
    tensors = {name: {key: leaf.value() for key, leaf in leaves.items()} for name, leaves in peer.leaves.items()}
    plain = prepared(case, it.model).double().eval() if case.is_bottleneck else it.model
    return _Sides(it, plain, peer, ComposedOurs(case, it, tensors))


def _expected(case: ComposedCase, sides: _Sides, tensors: Mapping[str, dict[Key, Tensor]]) -> _Found:
    """What the formula gives."""
    found = outputs(case, sides.host, sides.plain, tensors)
    copies = len(found[0]) // len(float_tensors(sides.host.model(**sides.host.inputs))[0])
    with torch.no_grad():
        bare = [torch.cat([tensor] * copies) for tensor in float_tensors(sides.host.model(**sides.host.inputs))]
    if not furthest(bare, found) > 1e-2:
        raise RuntimeError(f"{case}: the composition changes the outputs by less than 0.01: equality would say nothing")
    leaves = [tensor for own in tensors.values() for key, tensor in own.items() if key.name != KEY_BIAS]
    return _Found(found, gradients_of(found, leaves, may_be_unused=True))


def _found(side: ComposedPeer | ComposedOurs, case: ComposedCase, it: Host, names: list[str]) -> _Found:
    """What a side computes."""
    found = side.run(case, it)
    leaves = [leaf for name in names for key, leaf in side.leaves[name].items() if key.name != KEY_BIAS]
    slopes = gradients_of(found, [leaf.parameter for leaf in leaves], may_be_unused=True)
    return _Found(found, [leaf.view(slope) for leaf, slope in zip(leaves, slopes, strict=True)])


def _key_bias(case: ComposedCase, sides: _Sides) -> float | None:
    """The largest gradient of the bias of a fusion's keys, in parts of the largest of their weights."""
    fuse = next(fusions_in(case.composition), None)
    leaves = {} if fuse is None else sides.peer.leaves[fuse.fusion]
    biases = [leaf.parameter for key, leaf in leaves.items() if key.name == KEY_BIAS]
    weights = [leaf.parameter for key, leaf in leaves.items() if key.name == "key_weight"]
    if not biases or case.forwards > 1:
        return None
    slopes = gradients_of(sides.peer.run(case, sides.host), biases + weights)
    largest = [float(slope.abs().max()) for slope in slopes]
    return max(largest[: len(biases)]) / max(largest[len(biases) :])


def _differences(these: _Found, those: _Found) -> Differences:
    return {
        "outputs": furthest(these.outputs, those.outputs),
        "gradients": relative(these.gradients, those.gradients),
    }


def _values(leaves: Mapping[Key, Leaf]) -> dict[Key, Tensor]:
    return {key: leaf.value().requires_grad_(True) for key, leaf in leaves.items()}


def _attempt(act: Callable[[], T], *refusals: type[Exception]) -> tuple[T | None, str | None]:
    """What an act gives, or the words that refuse it."""
    try:
        return act(), None
    except refusals as error:
        return None, f"{type(error).__name__}: {error}".split("\n")[0]
