"""One case: the peer against the formula, and ours against both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import default_dtype, float_tensors, furthest, gradients_of, relative
from . import formula, theirs
from .adapters_peer import AdaptersPeer
from .case import ASPECTS, Case, Key, Leaf
from .hosts import Host, host
from .known import known
from .peft_peer import PeftPeer

__all__ = ["Outcome", "run"]

_PEERS: dict[str, Callable[[Case, nn.Module], AdaptersPeer | PeftPeer]] = {"adapters": AdaptersPeer, "peft": PeftPeer}
# Methods whose change is no change of weights.
_NO_MERGE = {"compacter", "compacter++", "invertible", "union", "combine"}


@dataclass
class Outcome:
    """What a case gave.

    Attributes:
        tolerance: Below which a difference is rounding.
        peer: By aspect, how far the peer lies from the formula.
        refused: By aspect, with what words the peer refuses; "all" where it cannot even adapt the model.
        proven: By aspect, how far a wrong peer lies from what its known fault makes of the formula.
    """

    case: Case
    tolerance: float
    peer: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    proven: dict[str, float] = field(default_factory=dict)

    def wrong(self) -> list[str]:
        """In which aspects the peer differs from the formula."""
        return [name for name in ASPECTS if name in self.peer and not self.peer[name] <= self.tolerance]

    def verdict(self) -> str:
        """How the peer did: "right", "wrong" for reasons that are known and proven, "refused", or "unknown"."""
        reasons = [known(self.case, aspect) for aspect in self.wrong()]
        if None in reasons or not all(value <= self.tolerance for value in self.proven.values()):
            return "unknown"
        return "wrong" if reasons else "refused" if "all" in self.refused else "right"

    def as_json(self) -> dict[str, Any]:
        """The outcome in plain values."""
        reasons = {aspect: known(self.case, aspect) for aspect in self.wrong()}
        return {
            **{name: getattr(self.case, name) for name in ("peer", "method", "host", "setting")},
            "tolerance": self.tolerance,
            "verdict": self.verdict(),
            "peer_differs": self.peer,
            "proven": self.proven,
            "refused": self.refused,
            "reasons": {aspect: entry and entry.reason for aspect, entry in reasons.items()},
        }


def run(case: Case) -> Outcome:
    """Run a case."""
    with default_dtype(torch.float64):
        it = host(case.host)
        outcome = Outcome(case, it.tolerance)
        try:  # whatever a peer cannot do is a result
            peer = _PEERS[case.peer](case, it.model)
        except Exception as error:
            outcome.refused["all"] = _told(error)
            return outcome
        if case.method == "combine":
            _measure_combining(case, it, peer, outcome)
        else:
            _measure(case, it, peer, outcome)
        return outcome


def _measure(case: Case, it: Host, peer: AdaptersPeer | PeftPeer, outcome: Outcome) -> None:
    """All aspects of one adapter."""
    try:
        found = _outputs(it, peer)
    except Exception as error:
        outcome.refused["all"] = _told(error)
        return
    tensors = _tensors(peer.leaves)
    trained = [key for key, leaf in peer.leaves.items() if leaf.is_trained]
    expected = formula.outputs(case, it, (1.0, tensors))
    slopes = dict(zip(trained, gradients_of(expected, [tensors[key] for key in trained]), strict=True))
    _check_that_it_acts(case, it, expected)
    outcome.peer["outputs"] = furthest(found, expected)
    _prove("outputs", case, it, tensors, found, outcome)
    leaves = [peer.leaves[key] for key in trained]
    own = dict(zip(trained, gradients_of(found, [leaf.parameter for leaf in leaves]), strict=True))
    views = [leaf.view(own[key]) for key, leaf in zip(trained, leaves, strict=True)]
    outcome.peer["gradients"] = relative(views, [slopes[key] for key in trained])
    if case.method not in _NO_MERGE:
        _measure_merging(case, it, peer, outcome, tensors, expected)


def _measure_merging(
    case: Case,
    it: Host,
    peer: AdaptersPeer | PeftPeer,
    outcome: Outcome,
    tensors: Mapping[Key, Tensor],
    expected: list[Tensor],
) -> None:
    """The outputs when merged, and those when unmerged again, against the ones before."""
    with torch.no_grad():
        before = _outputs(it, peer)
        try:
            peer.merge()
            merged = _outputs(it, peer)
            outcome.peer["merged"] = furthest(merged, expected)
            _prove("merged", case, it, tensors, merged, outcome)
            peer.unmerge()
            outcome.peer["restored"] = furthest(_outputs(it, peer), before)
        except Exception as error:
            outcome.refused["merged"] = _told(error)


def _measure_combining(case: Case, it: Host, peer: AdaptersPeer | PeftPeer, outcome: Outcome) -> None:
    """The outputs of a combination of two adapters: that of the weighted sum of their changes."""
    adapters = {"parity": _tensors(peer.leaves), "other": _tensors(peer.add_other())}
    weights = case.config["weights"]
    with torch.no_grad():
        expected = formula.outputs(case, it, *((weight, adapters[name]) for name, weight in weights.items()))
        try:
            peer.combine(weights, case.config["how"])
            found = _outputs(it, peer)
            outcome.peer["outputs"] = furthest(found, expected)
            if outcome.wrong():
                outcome.proven["outputs"] = furthest(found, theirs.combined(case, it, adapters))
        except Exception as error:
            outcome.refused["all"] = _told(error)


def _prove(aspect: str, case: Case, it: Host, tensors: Mapping[Key, Tensor], found: list[Tensor], outcome: Outcome) -> None:
    """Where the peer is wrong for a known reason, compare it with what that makes of the formula."""
    entry = known(case, aspect)
    if aspect in outcome.wrong() and entry is not None and aspect in entry.theirs:
        outcome.proven[aspect] = furthest(found, entry.theirs[aspect](case, it, tensors))


def _tensors(leaves: Mapping[Key, Leaf]) -> dict[Key, Tensor]:
    return {key: leaf.value().requires_grad_(leaf.is_trained) for key, leaf in leaves.items()}


def _outputs(it: Host, peer: AdaptersPeer | PeftPeer) -> list[Tensor]:
    return float_tensors(peer.model(**it.inputs))


def _check_that_it_acts(case: Case, it: Host, adapted: list[Tensor]) -> None:
    """Raise unless the adapter changes the outputs by far more than rounding: else equality would say nothing."""
    with torch.no_grad():
        effect = furthest(float_tensors(it.model(**it.inputs)), adapted)
    if not effect > 1e-2:
        raise RuntimeError(f"{case}: the adapter changes the outputs by {effect:.1e} only")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
