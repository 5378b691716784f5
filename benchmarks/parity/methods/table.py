"""The table of methods, from the JSON of a run alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["table"]

Cases = Sequence[Mapping[str, Any]]
PEERS = ("adapters", "peft")


def table(cases: Cases) -> str:
    """Methods by peers, in Markdown: how many cases are as in the papers, and how far apart these are at most."""
    lines = ["| method | `adapters` | `peft` |", "|---|---|---|"]
    for method in dict.fromkeys(case["method"] for case in cases):
        cells = [_cell([case for case in cases if (case["method"], case["peer"]) == (method, peer)]) for peer in PEERS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(cases: Cases) -> str:
    """The counts of some cases, and the largest difference of those that are right."""
    if not cases:
        return "n.a."
    right = [case for case in cases if case["verdict"] == "right"]
    parts = [f"{len(right)} right ({_number(max(max(case['peer_differs'].values()) for case in right))})"] if right else []
    for verdict in ("wrong", "refused", "unknown"):
        found = [case for case in cases if case["verdict"] == verdict]
        parts += [f"{len(found)} {verdict}"] if found else []
    return ", ".join(parts)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value < 0.1 else f"{value:.2g}"
