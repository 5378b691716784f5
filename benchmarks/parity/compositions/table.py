"""The table and the reasons of compositions for the page and the terminal, from the JSON of a run alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods.table import fill, listed, number
from .case import METHODS

__all__ = ["key_bias", "reasons", "table"]

Cases = Sequence[Mapping[str, Any]]


def table(cases: Cases) -> str:
    """Compositions by methods, in Markdown: how many cases are equal, by how much, and why others are not."""
    marks, methods = _marks(cases), [m for m in METHODS if any(case["method"] == m for case in cases)]
    lines = [f"| composition | {' | '.join(f'`{method}`' for method in methods)} |", "|---" * (len(methods) + 1) + "|"]
    for kind in dict.fromkeys(case["kind"] for case in cases):
        cells = [_cell([c for c in cases if (c["kind"], c["method"]) == (kind, method)], marks) for method in methods]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def reasons(cases: Cases) -> str:
    """The numbered reasons, each with how far that library is off, how far ours is, and how well the reason is proven."""
    return "\n".join(fill(f"{n}. {_reason(reason, cases)}", "   ") for reason, n in _marks(cases).items()) + "\n"


def key_bias(cases: Cases) -> float:
    """The largest gradient of a bias of a fusion's keys, in parts of that of their weights."""
    return max((case["key_bias_gradient"] for case in cases if case["key_bias_gradient"] is not None), default=0.0)


def _cell(cases: Cases, marks: Mapping[str, int]) -> str:
    """The counts of some cases by verdict, the largest difference where both are right, and the numbers of the reasons."""
    found = {v: [case for case in cases if case["verdict"] == v] for v in ("equal", "explained", "differs")}
    apart = [max(case["ours_from_peer"].values()) for case in found["equal"]]
    used = sorted({marks[reason] for case in found["explained"] for reason in case["reasons"]})
    parts = [f"{len(found['equal'])} equal" if found["equal"] else ""]
    parts += [f"{len(found['explained'])} explained {', '.join(f'[{n}]' for n in used)}" if found["explained"] else ""]
    parts += [f"**{len(found['differs'])} differ**" if found["differs"] else ""]
    return ", ".join(filter(None, parts)) + (f"; {number(max(apart))}" if apart else "")


def _reason(reason: str, cases: Cases) -> str:
    """One reason, with its compositions, methods, models and numbers."""
    given = [case for case in cases if reason in case["reasons"]]
    kinds, methods = listed(case["kind"] for case in given), listed(f"`{case['method']}`" for case in given)
    off = [case["peer_from_formula"]["outputs"] for case in given if case["peer_from_formula"]]
    proven = [case["peer_proven"] for case in given if case["peer_proven"] is not None]
    ours = number(max(max(case["ours_from_formula"].values()) for case in given))
    apart = f"Outputs are off by up to {number(max(off))}, ours by {ours}." if off else f"Ours is off by {ours}."
    left = f" The formula with this fault is what it computes, within {number(max(proven))}." if proven else ""
    words = reason[0].upper() + reason[1:]
    return f"{kinds} ({methods}; {listed(case['host'] for case in given)}): {words}. {apart}{left}"


def _marks(cases: Cases) -> dict[str, int]:
    """A number for each reason, in the order that they are met."""
    found = dict.fromkeys(reason for case in cases for reason in case["reasons"])
    return {reason: n for n, reason in enumerate(found, start=1)}
