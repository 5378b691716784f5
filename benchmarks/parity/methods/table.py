"""The tables and lists of methods for the page and the terminal, from the JSON of a run alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["fill", "limits", "listed", "number", "places", "reasons", "table"]

Cases = Sequence[Mapping[str, Any]]
PEERS = ("adapters", "peft")


def table(cases: Cases) -> str:
    """Methods by peers, in Markdown: how many cases are equal, by how much, and why others are not."""
    marks = _marks(cases)
    lines = ["| method | `adapters` | `peft` |", "|---|---|---|"]
    for method in dict.fromkeys(case["method"] for case in cases):
        cells = [_cell([c for c in cases if (c["method"], c["peer"]) == (method, peer)], marks) for peer in PEERS]
        lines.append(f"| {method.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def reasons(cases: Cases) -> str:
    """The numbered reasons, each with how far the peer is off, how far ours is, and how well the reason is proven."""
    return "\n".join(fill(f"{n}. {_reason(key, cases)}", "   ") for key, n in _marks(cases).items()) + "\n"


def limits(cases: Cases) -> str:
    """What ours does not do."""
    found = dict.fromkeys(r for case in cases for a, r in case["reasons"].items() if case["aspects"][a] == "n.a.")
    return "\n".join(fill(f"- {_capital(reason)}.", "  ") for reason in found) + "\n"


def places(found: Cases) -> str:
    """Presets by what differs in where they go, in Markdown."""
    lines = ["| preset | `adapters` alone | adapterkit alone | families |", "|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        key = (one["preset"], ", ".join(one["theirs_alone"]), ", ".join(one["ours_alone"]))
        groups.setdefault(key, []).append(one["family"])
    lines += [
        f"| `{preset}` | {theirs or 'none'} | {ours or 'none'} | {', '.join(names)} |"
        for (preset, theirs, ours), names in groups.items()
    ]
    return "\n".join(lines) + "\n"


def _cell(cases: Cases, marks: Mapping[tuple[str, str], int]) -> str:
    """The counts of some cases by verdict, the largest difference from a right peer, and the numbers of the reasons."""
    if not cases:
        return "n.a."
    found = {v: [case for case in cases if case["verdict"] == v] for v in ("equal", "explained", "n.a.", "differs")}
    apart = [case["ours_from_peer"][a] for case in cases for a, v in _aspects(case) if v == "equal" and a != "restored"]
    used = sorted({marks[case["peer"], r] for case in found["explained"] for r in _explained(case)})
    parts = [f"{len(found['equal'])} equal" if found["equal"] else ""]
    parts += [f"{len(found['explained'])} explained {', '.join(f'[{n}]' for n in used)}" if found["explained"] else ""]
    parts += [f"{len(found['n.a.'])} n.a." if found["n.a."] else ""]
    parts += [f"**{len(found['differs'])} differ**" if found["differs"] else ""]
    return ", ".join(filter(None, parts)) + (f"; {number(max(apart))}" if apart else "")


def _reason(key: tuple[str, str], cases: Cases) -> str:
    """One reason, with its methods, models and numbers."""
    peer, reason = key
    own = [case for case in cases if case["peer"] == peer]
    given = [(case, a) for case in own for a, v in _aspects(case) if v == "explained" and case["reasons"][a] == reason]
    methods = listed(f"{case['method'].replace('_', ' ')}" for case, _ in given)
    hosts = listed(case["host"] for case, _ in given)
    off = [case["peer_from_formula"][aspect] for case, aspect in given if aspect in case["peer_from_formula"]]
    ours = max(case["ours_from_formula"][aspect] for case, aspect in given)
    proven = [case["peer_proven"][aspect] for case, aspect in given if aspect in case["peer_proven"]]
    apart = f"It is off by up to {number(max(off))}, ours by {number(ours)}." if off else f"Ours is off by {number(ours)}."
    left = f" The formula with this fault is what it computes, within {number(max(proven))}." if proven else ""
    return f"**`{peer}`**, {methods} ({hosts}; {listed(a for _, a in given)}): {reason}. {apart}{left}"


def _aspects(case: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    return [(aspect, verdict) for aspect, verdict in case["aspects"].items()]


def _explained(case: Mapping[str, Any]) -> list[str]:
    return [case["reasons"][aspect] for aspect, verdict in _aspects(case) if verdict == "explained"]


def _marks(cases: Cases) -> dict[tuple[str, str], int]:
    """A number for each peer's reason, in the order that they are met."""
    found = dict.fromkeys((case["peer"], reason) for case in cases for reason in _explained(case))
    return {key: n for n, key in enumerate(found, start=1)}


def listed(words: Iterable[str]) -> str:
    """Different words, in order, with commas."""
    return ", ".join(dict.fromkeys(words))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def fill(text: str, indent: str) -> str:
    """A paragraph in lines."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def number(value: float) -> str:
    """A difference, to its first digit."""
    return "0" if value == 0 else f"{value:.0e}" if value < 0.1 else f"{value:.2g}"
