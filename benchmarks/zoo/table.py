"""The page for the docs, from the JSON of each catalogue's last full run; `python -m benchmarks.zoo.table` writes it."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["CATALOGUES", "PAGE", "RESULTS", "load", "page", "summary"]

Reports = Mapping[str, Mapping[str, Any]]
Run = Mapping[str, Any]

RESULTS = Path(__file__).parent.parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
# By the module that lists and builds them: the title on the page, what they are, what one of them is called.
CATALOGUES = {
    "transformers_models": ("transformers", "every type of `AutoModel`, each config shrunk by rules", "types"),
    "vision_models": ("Vision", "each family in timm; torchvision's transformers, some CNNs", "models"),
    "diffusers_models": ("diffusers", "UNets and transformers of images, videos and sound; some autoencoders", "models"),
    "handwritten_models": ("Hand-written", "blocks of every build, the kinds of whose sub-layers are known", "models"),
}
_TEMPLATE = re.compile(
    r"(?P<place>.*) (?P<kind>attention|crossattention|feedforward|convolution|mixer)(?P<moe> moe)? "
    r"(?P<norm>\w+)(?P<parallel> parallel)?(?P<scaled> scaled)? x(?P<count>\d+)"
)
_KINDS = {
    "attention": "attention",
    "crossattention": "cross-attention",
    "feedforward": "feed-forward",
    "convolution": "convolution",
    "mixer": "mixer",
}
_HEAD = """# The zoo

Does "any PyTorch model" hold? `nox -s zoo` builds every architecture that it can build offline, small and with random
weights, and puts each through the same gates. adapterkit knows nothing of any of them: sites are found by tracing.

The gates of one architecture:

1. **It runs.** Sub-layers are found, and blocks of one build have equally many.
2. **The ε-test** proves that what each site returns is added to the stream, as it is or times a declared factor.
3. **Identity and gradients.** A new Pfeiffer and a new Houlsby adapter leave the output as it was, bit for bit. With random
   weights they change it. Each of their tensors gets a gradient.
4. **Copies and files.** A deep copy, a state dict, and a saved and loaded adapter give the same output, bit for bit.
5. **Removal.** After it the output, the keys and the hooks are as before.
6. **Two adapters in one batch** (`Rows`, `BatchSplit`, `Parallel`). Each row is what its adapter alone gives it, or a typed
   error says why not. Some base models give a row something else in a batch than alone; that is not compared.

Beside these there is the *wild* zoo, which is judged another way. A grammar puts models together of parts: norms,
attentions, feed-forwards, streams, containers, layouts, each in the ways that people write them. Where adapters belong is
known there by construction: a model computes its own output with adapters from the definition of a preset. What adapterkit
computes must equal that, or be refused with a reason. `nox -s "zoo(catalogue='wild')"` judges some 150 chosen models and
many that are drawn, and writes `benchmarks/results/zoo_wild_models.json`.

A CNN is told by what its branches do. Its gate is that the presets refuse it and leave it alone.

The run writes `benchmarks/results/zoo_*.json`, and from them this page. It also writes a list of all sites,
`zoo_*_sites.json`. `nox -s zoo -- --check` compares with that list: a site that a new release of a library moves is a
difference.

| | there are | build | of these run | have sub-layers | of these pass each gate | rows as alone | CNNs, refused | seconds |
|---|---|---|---|---|---|---|---|---|
"""
_LISTS = {
    "failed": "These do not pass",
    "does not run": "These do not run",
    "does not build": "These do not build",
}
_NONE = "No repeated block adds to a stream what it computes from it (they concatenate, or replace)"
_LONGEST = 240  # of a reason


def load(folder: Path = RESULTS) -> dict[str, tuple[Run, Mapping[str, list[str]]]]:
    """By catalogue, the reports of its last full run and the templates of its places; those that there are."""
    return {
        catalogue: (json.loads(path.read_text()), json.loads((folder / f"zoo_{catalogue}_sites.json").read_text()))
        for catalogue in CATALOGUES
        if (path := folder / f"zoo_{catalogue}.json").exists()
    }


def page(runs: Mapping[str, tuple[Run, Mapping[str, list[str]]]]) -> str:
    """The docs page."""
    rows = "".join(_row(catalogue, run) for catalogue, (run, _) in runs.items())
    sections = (_section(catalogue, run["types"], templates) for catalogue, (run, templates) in runs.items())
    return "\n".join((_HEAD + rows, *sections))


def summary(reports: Reports) -> str:
    """The three numbers of the zoo, in a sentence."""
    n = _numbers(reports)
    return (
        f"{len(reports)} types, {n['built']} build, {n['ran']} of these run ({_share(n['ran'], n['built'])}); "
        f"{n['with']} have residual sub-layers, {n['passed']} of these pass every gate ({_share(n['passed'], n['with'])}); "
        f"each row is as alone in {n['alone']}, {n['rows refused']} refuse, {n['rows not comparable']} cannot be compared; "
        f"{n['convolutional']} are CNNs"
    )


def _numbers(reports: Reports) -> dict[str, int]:
    counts = Counter(report["outcome"] for report in reports.values())
    built = len(reports) - counts["does not build"]
    rows = Counter(_rows_of(report) for report in reports.values() if "rows" in report)
    return {
        "built": built,
        "ran": built - counts["does not run"],
        "with": counts["passed"] + counts["failed"],
        "passed": counts["passed"],
        "convolutional": counts["convolutional"],
        "alone": rows["alone"],
        "rows refused": rows["refused"],
        "rows not comparable": rows["not comparable"],
    }


def _rows_of(report: Mapping[str, Any]) -> str:
    """What came of two adapters in one batch."""
    if report["rows"] == "each as alone":
        return "alone"
    return "refused" if report["rows"].startswith("refused") else "not comparable"


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def _row(catalogue: str, run: Run) -> str:
    """A line of the first table."""
    n, title = _numbers(run["types"]), CATALOGUES[catalogue][0]
    cells = (
        f"[{title}](#{title.lower()})",
        len(run["types"]),
        n["built"],
        f"{n['ran']} ({_share(n['ran'], n['built'])})",
        n["with"],
        f"{n['passed']} (**{_share(n['passed'], n['with'])}**)",
        f"{n['alone']} of {n['alone'] + n['rows refused']}",
        n["convolutional"],
        run["seconds"],
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def _section(catalogue: str, reports: Reports, templates: Mapping[str, list[str]]) -> str:
    """What a catalogue's architectures are made of, then those that do not pass, with the reasons."""
    title, what, several = CATALOGUES[catalogue]
    lines = [f"## {title}", "", _wrapped(f"{what[0].upper()}{what[1:]}."), ""]
    lines += [f"| the sub-layers of a block | norm | added | {several} |", "|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in _of(reports, "passed"):
        groups.setdefault(_build(reports[name], templates.get(name, [])), []).append(name)
    for build, names in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
        lines.append(f"| {' | '.join(build)} | {_codes(names)} |")
    for outcome, start in _LISTS.items():
        lines += _with_reasons(start, {name: reports[name] for name in _of(reports, outcome)})
    divided = {name: {"reason": r["rows"]} for name, r in reports.items() if _rows_of({"rows": "", **r}) == "refused"}
    lines += _with_reasons("These refuse two adapters in one batch", divided)
    refused, without = _of(reports, "convolutional"), _of(reports, "no sub-layers")
    if refused:
        lines += ["", _wrapped(f"**These are CNNs** ({len(refused)}), and refused: {_codes(refused)}.")]
    if without:
        lines += ["", _wrapped(f"**{_NONE}** ({len(without)}): {_codes(without)}.")]
    return "\n".join(lines) + "\n"


def _build(report: Mapping[str, Any], templates: Iterable[str]) -> tuple[str, str, str]:
    """What kinds of sub-layers there are, where they are normalised, and how they are added."""
    found = [match for line in templates if (match := _TEMPLATE.fullmatch(line))]
    kinds = {m["kind"] for m in found}
    names = [name for kind, name in _KINDS.items() if kind in kinds]
    extras = {"experts": "moe", "parallel": "parallel"}
    names += [f"*{name}*" for name, group in extras.items() if any(m[group] for m in found)]
    norms = [norm for norm in ("pre", "post", "sandwich", "end", "none") if any(m["norm"] == norm for m in found)]
    return ", ".join(names), ", ".join(norms), "scaled" if report.get("epsilon") == "declared factor" else "exactly"


def _with_reasons(start: str, reports: Reports) -> list[str]:
    """A list of architectures by the reason, the same reason once."""
    if not reports:
        return []
    reasons: dict[str, list[str]] = {}
    for name, report in reports.items():
        reasons.setdefault(_reason(report), []).append(name)
    items = (f"- {_codes(names)}: {reason}" for reason, names in reasons.items())
    return ["", f"**{start}** ({len(reports)}):", "", *(_wrapped(item, indent="  ") for item in items)]


def _reason(report: Mapping[str, Any]) -> str:
    """Why an architecture does not pass, as someone explained it and as the gate says."""
    said = _shortened(report.get("reason", "no reason is known"))
    return f"{report['explained']} ({said})" if "explained" in report else said


def _of(reports: Reports, outcome: str) -> list[str]:
    return [name for name, report in reports.items() if report["outcome"] == outcome]


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name.partition(':')[2] or name}`" for name in names)


def _shortened(reason: str) -> str:
    reason = " ".join(reason.split())
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST].rpartition(' ')[0]} …"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    PAGE.write_text(page(load()))
