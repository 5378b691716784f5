"""What a case gave, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .case import ASPECTS, Case
from .known import known, limit

__all__ = ["Outcome", "Verdict"]

Verdict = Literal["equal", "explained", "n.a.", "differs"]


@dataclass
class Outcome:
    """What a case gave; differences are by aspect.

    Attributes:
        tolerance: Below which a difference is rounding.
        peer: How far the peer lies from the formula.
        ours: How far ours does.
        apart: How far ours lies from the peer.
        proven: How far a wrong peer lies from what its known fault makes of the formula.
        refused: With what words the peer refuses; "all" where it cannot even run the adapted model.
        refused_here: The same of ours.
    """

    case: Case
    tolerance: float
    peer: dict[str, float] = field(default_factory=dict)
    ours: dict[str, float] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    proven: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    refused_here: dict[str, str] = field(default_factory=dict)

    def of_peer(self) -> str:
        """How the peer did: "right", "wrong" for reasons that are known and proven, "refused", or "unknown"."""
        wrong = [aspect for aspect in ASPECTS if self.is_wrong(aspect)]
        if any(known(self.case, aspect) is None for aspect in wrong) or not self._is_proven():
            return "unknown"
        return "wrong" if wrong else "refused" if "all" in self.refused else "right"

    def is_wrong(self, aspect: str) -> bool:
        """Whether the peer differs from the formula in an aspect."""
        return aspect in self.peer and not self.peer[aspect] <= self.tolerance

    def by_aspect(self) -> dict[str, Verdict]:
        """Of each aspect that there is: see `verdict`."""
        there = [a for a in ASPECTS if a in self.peer or a in self.ours or a in self.refused or a in self.refused_here]
        return {aspect: self._of(aspect) for aspect in there or ASPECTS[:1]}

    def verdict(self) -> Verdict:
        """Of ours: the first of these that an aspect is.

        "differs": ours is not what the formula gives, or not what a peer gives that is right, or restores other bits, or
        something is so for an unknown reason. "explained": the peer is wrong or refuses, for a known reason, and ours
        equals the formula. "equal": to the peer. "n.a.": neither of the two does it, or not ours, and that is known.
        """
        found = self.by_aspect().values()
        order: tuple[Verdict, ...] = ("differs", "explained", "equal", "n.a.")
        return next(verdict for verdict in order if verdict in found)

    def reasons(self) -> dict[str, str]:
        """Why each aspect that is not equal is not."""
        found = {
            aspect: known(self.case, self._key(aspect, self.refused))
            if verdict == "explained"
            else limit(self.case, self._key(aspect, self.refused_here))
            for aspect, verdict in self.by_aspect().items()
            if verdict in ("explained", "n.a.")
        }
        return {aspect: entry.reason for aspect, entry in found.items() if entry is not None}

    def as_json(self) -> dict[str, Any]:
        """The outcome in plain values."""
        return {
            **{name: getattr(self.case, name) for name in ("peer", "method", "host", "setting")},
            "tolerance": self.tolerance,
            "verdict": self.verdict(),
            "aspects": self.by_aspect(),
            "ours_from_peer": self.apart,
            "ours_from_formula": self.ours,
            "peer_from_formula": self.peer,
            "peer_verdict": self.of_peer(),
            "peer_proven": self.proven,
            "peer_refused": self.refused,
            "ours_refused": self.refused_here,
            "reasons": self.reasons(),
        }

    def _of(self, aspect: str) -> Verdict:
        if _refuses(aspect, self.refused_here):
            return "differs" if limit(self.case, self._key(aspect, self.refused_here)) is None else "n.a."
        if not self.ours[aspect] <= (0 if aspect == "restored" else self.tolerance):
            return "differs"
        if _refuses(aspect, self.refused) or self.is_wrong(aspect):
            is_known = known(self.case, self._key(aspect, self.refused)) is not None
            return "explained" if is_known and self._is_proven() else "differs"
        return "equal" if aspect == "restored" or self.apart[aspect] <= self.tolerance else "differs"

    def _key(self, aspect: str, refused: Mapping[str, str]) -> str:
        """Under which aspect it is known why a side does not do this one."""
        return "all" if "all" in refused else "merged" if _refuses(aspect, refused) else aspect

    def _is_proven(self) -> bool:
        return all(value <= self.tolerance for value in self.proven.values())


def _refuses(aspect: str, refused: Mapping[str, str]) -> bool:
    """Whether a side refuses an aspect; what cannot be merged cannot be restored."""
    return "all" in refused or ("merged" in refused and aspect in ("merged", "restored"))
