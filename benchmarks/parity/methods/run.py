"""One case: the peer and ours, with the same tensors, against the formula and against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

import adapterkit as ak

from ..measure import default_dtype, float_tensors, furthest, gradients_of, relative
from . import formula, theirs
from .adapters_peer import AdaptersPeer
from .case import Case, Key, Leaf, Peer
from .hosts import Host, host
from .known import known
from .ours import Ours, PlacesDifferError
from .outcome import Outcome
from .peft_peer import PeftPeer

__all__ = ["run"]

_PEERS: dict[str, Callable[[Case, nn.Module], Peer]] = {"adapters": AdaptersPeer, "peft": PeftPeer}
# Methods whose change is no change of weights, or of which one aspect is compared.
_NO_MERGE = {"compacter", "compacter++", "invertible", "union", "combine"}
# Of ours: what a peer cannot do is a result, whatever it raises.
_REFUSALS = (ak.AdapterKitError, PlacesDifferError)
Tensors = Mapping[Key, Tensor]
Outputs = list[Tensor]
T = TypeVar("T")


@dataclass
class _Found:
    """What one side computes: by aspect, outputs, or gradients in the order of the leaves that train."""

    outputs: Outputs | None = None
    gradients: Outputs | None = None
    merged: Outputs | None = None
    before: Outputs | None = None
    restored: Outputs | None = None

    def moved(self) -> dict[str, float]:
        """How far the outputs after merging and unmerging are from those before, if both went."""
        return {} if self.before is None or self.restored is None else {"restored": furthest(self.restored, self.before)}


def run(case: Case) -> Outcome:
    """Run a case."""
    with default_dtype(torch.float64):
        it = host(case.host)
        outcome = Outcome(case, it.tolerance)
        measure = _combining if case.method == "combine" else _adapting
        measure(case, it, outcome)
        return outcome


def _adapting(case: Case, it: Host, outcome: Outcome) -> None:
    """All aspects of one adapter."""
    peer = _attempt(lambda: _PEERS[case.peer](case, it.model), outcome.refused, Exception)
    there = _Found() if peer is None else _found(case, it, peer, outcome.refused, Exception)
    tensors = None if peer is None or "all" in outcome.refused else _tensors(peer.leaves)
    ours = _attempt(lambda: Ours(case, it, tensors), outcome.refused_here, *_REFUSALS)
    here = _Found() if ours is None else _found(case, it, ours, outcome.refused_here, *_REFUSALS)
    if tensors is None and ours is not None:
        tensors = _tensors(ours.leaves)
    if tensors is not None:
        expected = _expected(case, it, tensors)
        outcome.peer = _differences(there, expected) | there.moved()
        outcome.ours = _differences(here, expected) | here.moved()
        outcome.apart = _differences(here, there)
        _prove(case, it, tensors, there, outcome)


def _found(case: Case, it: Host, side: Peer, refused: dict[str, str], *refusals: type[Exception]) -> _Found:
    """What a side computes."""
    found = _Found()
    found.outputs = _attempt(lambda: _outputs(it, side), refused, *refusals)
    if found.outputs is None:
        return found
    leaves = [leaf for leaf in side.leaves.values() if leaf.is_trained]
    gradients = gradients_of(found.outputs, [leaf.parameter for leaf in leaves])
    found.gradients = [leaf.view(gradient) for leaf, gradient in zip(leaves, gradients, strict=True)]
    if case.method not in _NO_MERGE:
        with torch.no_grad():
            found.before = _outputs(it, side)
            found.merged = _attempt(lambda: (side.merge(), _outputs(it, side))[1], refused, *refusals, key="merged")
            if found.merged is not None:
                side.unmerge()
                found.restored = _outputs(it, side)
    return found


def _expected(case: Case, it: Host, tensors: Tensors) -> _Found:
    """What the formula gives; merging changes nothing."""
    outputs = formula.outputs(case, it, (1.0, tensors))
    with torch.no_grad():
        effect = furthest(float_tensors(it.model(**it.inputs)), outputs)
    if not effect > 1e-2:
        raise RuntimeError(f"{case}: the adapter changes the outputs by {effect:.1e} only: equality would say nothing")
    slopes = gradients_of(outputs, [tensor for tensor in tensors.values() if tensor.requires_grad])
    return _Found(outputs, slopes, outputs)


def _differences(these: _Found, those: _Found) -> dict[str, float]:
    """By aspect, how far apart two sides are, where both have something to say."""
    found = {}
    if these.outputs is not None and those.outputs is not None:
        found["outputs"] = furthest(these.outputs, those.outputs)
    if these.gradients is not None and those.gradients is not None:
        found["gradients"] = relative(these.gradients, those.gradients)
    if these.merged is not None and those.merged is not None:
        found["merged"] = furthest(these.merged, those.merged)
    return found


def _combining(case: Case, it: Host, outcome: Outcome) -> None:
    """The outputs of a combination of two adapters: that of the weighted sum of their changes."""
    peer, weights, how = _PEERS[case.peer](case, it.model), case.config["weights"], case.config["how"]
    adapters = {"parity": _tensors(peer.leaves), "other": _tensors(peer.add_other())}
    ours = Ours(case, it, adapters["parity"])
    ours.add_other(adapters["other"])
    with torch.no_grad():
        there = _attempt(lambda: (peer.combine(weights, how), _outputs(it, peer))[1], outcome.refused, Exception)
        expected = formula.combined(case, it, adapters)
        here = _attempt(lambda: (ours.combine(weights, how), _outputs(it, ours))[1], outcome.refused_here, *_REFUSALS)
        outcome.peer = _differences(_Found(there), _Found(expected))
        outcome.ours = _differences(_Found(here), _Found(expected))
        outcome.apart = _differences(_Found(here), _Found(there))
        if outcome.of_peer() in ("wrong", "unknown") and there is not None:
            outcome.proven["outputs"] = furthest(there, theirs.combined(case, it, adapters))


def _prove(case: Case, it: Host, tensors: Tensors, there: _Found, outcome: Outcome) -> None:
    """Where the peer is wrong for a known reason, compare it with what that makes of the formula."""
    for aspect, found in (("outputs", there.outputs), ("merged", there.merged)):
        entry = known(case, aspect)
        if entry is not None and found is not None and aspect in entry.theirs and outcome.is_wrong(aspect):
            outcome.proven[aspect] = furthest(found, entry.theirs[aspect](case, it, tensors))


def _attempt(act: Callable[[], T], refused: dict[str, str], *refusals: type[Exception], key: str = "all") -> T | None:
    """What an act gives, or None after noting how it was refused."""
    try:
        return act()
    except refusals as error:
        refused[key] = f"{type(error).__name__}: {error}".split("\n")[0]
        return None


def _tensors(leaves: Mapping[Key, Leaf]) -> dict[Key, Tensor]:
    return {key: leaf.value().requires_grad_(leaf.is_trained) for key, leaf in leaves.items()}


def _outputs(it: Host, side: Peer) -> Outputs:
    return float_tensors(side.model(**it.inputs))
