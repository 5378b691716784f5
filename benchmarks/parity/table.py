"""The page for the docs and the table for the terminal, from the JSON of a run alone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .compositions import table as compositions
from .methods import table as methods

__all__ = ["page", "table"]

Cases = Sequence[Mapping[str, Any]]

_HEAD = """# Parity with the `adapters` and `peft` libraries

Does adapterkit compute what the libraries that people use today compute? `nox -s parity` compares them number by number:
[bottlenecks](#bottlenecks) with `adapters`, [every other method](#every-other-method) with `adapters` and `peft`, and
[compositions](#compositions) with `adapters`. Where they differ, this page says why.

## Bottlenecks

Compared with `adapters` {adapters} on transformers {transformers}: all of its {families} families of models, each with
{presets} presets and {factors} reduction factors (one for all layers, and maps by layer).

- Each model is tiny. Every weight is random, norms and biases too.
- That library adapts one copy of the model, adapterkit another. The adapters' weights are copied over.
- Both run in float32 in eval mode on the same inputs, with padding if the family takes a mask.
- Compared are all floating-point outputs, and the gradients of every adapter tensor for a random projection of the outputs.

The run writes `benchmarks/results/parity.json`.

**{equal} of {cases} cases are equal within {tolerance:g}; {explained} differ for a known reason, {differ} for an unknown.**
A reason counts as known if the two agree once it, and nothing else, is put right.

Each cell has the largest difference over the reduction factors: of outputs / of gradients, as a fraction of the largest
entry of their tensor. A number in brackets names the reason below.

"""
_DEFAULTS = """
### Default settings that differ

Each preset was used as such; only the reduction factor was set. (In that library AdapterPlus' stochastic depth was off: it
needs torchvision, and acts in training alone.) Of the other default settings, these differ:

"""
_MAPS = """
Maps of reduction factors count layers from 0 in each stack of blocks. That library counts on from the encoder to the
decoder (BART, T5, Whisper), and from CLIP's text blocks to its vision blocks, but not in `EncoderDecoderModel`.
"""
_REASONS = """
### Differences explained

"""
_METHODS = """
## Every other method

Compared with `adapters` {adapters} and `peft` {peft} (the "peers"), in float64:

- on tiny models of the families of `adapters`;
- on layers of every geometry: linear, Conv1D, convolutions of 1 to 3 dimensions with any padding, dilation and groups,
  embeddings, torch's attention, stacked experts.

A peer adapts one copy of a model, adapterkit another. The peer's tensors are drawn at random and copied over to the same
sites. Compared are outputs, the gradient of every tensor, and outputs when merged. When unmerged again, our outputs have to
be what they were, bit for bit.

A peer is no judge of itself. So both are also compared with the papers' formulas, written out by hand
(`benchmarks/parity/methods/formula.py`). The run writes `benchmarks/results/parity_methods.json`, and this page from both.

Of {cases} cases:

- **{equal} are equal to the peer.** Equal is within 1e-09, or within 1e-05 in models that compute in float32 whatever their
  dtype is (DeBERTa, Llama, Mistral, T5 and mT5).
- **In {explained} the peer is wrong in something, or refuses it**, for a known reason, and ours equals the formula.
- **{absent} ours does not do.**
- **{differ} differ for an unknown reason.**

The number after a semicolon is the largest difference from the peer where the peer is right: of outputs, merged outputs and
gradients, as a fraction of the largest entry of their tensor. Numbers in brackets name the reasons below.

"""
_METHOD_REASONS = """
### Where a peer differs, and why

"""
_LIMITS = """
### What ours does not do

"""
_PLACES = """
### Where the presets go

Above, ours was put where the peer had adapted. By themselves, the presets `lora` and `ia3` of `adapters` and ours go to the
same sites, with the exceptions below. The paper of IA3 scales what enters the feed-forward's last projection, after the
non-linearity.

"""
_COMPOSITIONS = """
## Compositions

Compared with `adapters` {adapters}, in float64 on tiny models: fusions in {fusion_families} families, every other
composition in {families}. Each is over one to three bottlenecks (`seq_bn`, `double_seq_bn`, `par_bn`), LoRAs or IA3s, alone
and one in another. That library adapts one copy of a model, adapterkit another. Both have the same tensors, drawn at
random, those of fusions, too. Compared are outputs, and the gradients of all tensors of the adapters and the fusion.

That library is no judge of itself. So both are also compared with the definitions, computed row by row, one composition
without rows in it at a time (`benchmarks/parity/compositions/formula.py`). `BatchSplit`, `Rows` (its `MultiTask`) and
`Parallel` are compared in this way with each adapter alone on its rows. The run writes
`benchmarks/results/parity_compositions.json`.

Of {cases} cases:

- **{equal} are equal to that library and to the formula.** Equal is within 1e-09, or within 1e-05 in models that compute in
  float32 whatever their dtype is.
- **In {explained} that library is wrong in something, or refuses it**, for a known reason, and ours equals the formula.
- **{differ} differ for an unknown reason.**

The number after a semicolon is the largest difference where both are right: of outputs and of gradients, as a fraction of
the largest entry of their tensor.

"""
_FUSIONS = """
### Fusions

- **Keys.** That library's keys have a bias, ours have none. A bias adds the same to the score of each child, and the
  softmax takes it out. Theirs was drawn at random, and outputs are equal without it; its largest gradient is
  {key_bias:.0e} of that of the weights.
- **How Wv starts.** Theirs starts at the identity plus {values_start:.0e} beside the diagonal, ours at the identity.
- **Where Wv stands.** In that library it stands before or after the sum over children, as `value_before_softmax` says. Ours
  has it after the sum. The cases with either are equal to ours.
"""
_COMPOSITION_REASONS = """
### Where that library composes otherwise, and why

"""


def page(result: Mapping[str, Any], of_methods: Mapping[str, Any], of_compositions: Mapping[str, Any]) -> str:
    """The docs page, of the presets of bottlenecks, of every other method, and of compositions."""
    return _bottlenecks(result) + _methods(of_methods) + _compositions(of_compositions)


def _bottlenecks(result: Mapping[str, Any]) -> str:
    cases: Cases = result["cases"]
    verdicts = [case["verdict"] for case in cases]
    head = _HEAD.format(
        **result["peer"],
        families=len(_names(cases, "family")),
        presets=len(_names(cases, "preset")),
        factors=len(_names(cases, "factor")),
        cases=len(cases),
        equal=verdicts.count("equal"),
        explained=verdicts.count("explained"),
        differ=verdicts.count("differs"),
        tolerance=result["tolerance"],
    )
    return head + table(cases) + _REASONS + _reasons(cases) + _DEFAULTS + _defaults(result["defaults"]) + _MAPS


def _methods(result: Mapping[str, Any]) -> str:
    cases: Cases = result["cases"]
    verdicts = [case["verdict"] for case in cases]
    head = _METHODS.format(
        **result["peers"],
        cases=len(cases),
        equal=verdicts.count("equal"),
        explained=verdicts.count("explained"),
        absent=verdicts.count("n.a."),
        differ=verdicts.count("differs"),
    )
    return (
        head
        + methods.table(cases)
        + _METHOD_REASONS
        + methods.reasons(cases)
        + _LIMITS
        + methods.limits(cases)
        + _PLACES
        + methods.places(result["places"])
    )


def _compositions(result: Mapping[str, Any]) -> str:
    cases: Cases = result["cases"]
    verdicts = [case["verdict"] for case in cases]
    fusions = [case for case in cases if case["kind"].startswith("Fuse")]
    head = _COMPOSITIONS.format(
        adapters=result["peer"]["adapters"],
        fusion_families=len(_names(fusions, "host")),
        families=len(_names([case for case in cases if case["kind"] == "Stack"], "host")),
        cases=len(cases),
        equal=verdicts.count("equal"),
        explained=verdicts.count("explained"),
        differ=verdicts.count("differs"),
    )
    notes = _FUSIONS.format(key_bias=compositions.key_bias(cases), values_start=result["values_start"])
    return head + compositions.table(cases) + notes + _COMPOSITION_REASONS + compositions.reasons(cases)


def table(cases: Cases) -> str:
    """Families by presets, in Markdown."""
    presets, marks = _names(cases, "preset"), _marks(cases)
    lines = [f"| family | {' | '.join(f'`{preset}`' for preset in presets)} |", "|---" * (len(presets) + 1) + "|"]
    for family in _names(cases, "family"):
        cells = [_cell([c for c in cases if (c["family"], c["preset"]) == (family, p)], marks) for p in presets]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(cases: Cases, marks: Mapping[str, int]) -> str:
    """The largest differences of some cases, or why they are not equal."""
    if not cases:
        return ""
    wrong = [case for case in cases if case["verdict"] == "differs"]
    if wrong:
        return "**differs**"
    reasons = sorted({marks[case["reason"]] for case in cases if case["reason"]})
    if reasons:
        return ", ".join(f"[{n}]" for n in reasons)
    return " / ".join(_number(max(case[name] for case in cases)) for name in ("outputs", "gradients"))


def _reasons(cases: Cases) -> str:
    """The numbered reasons, each with the difference that is left once it is put right."""
    lines = []
    for reason, n in _marks(cases).items():
        given = [case for case in cases if case["reason"] == reason]
        where = f"**{', '.join(_names(given, 'family'))}** ({', '.join(f'`{p}`' for p in _names(given, 'preset'))})"
        found = [case["outputs"] for case in given if case["outputs"] is not None]
        apart = f" Outputs differ by up to {_number(max(found))}." if found else ""
        left = " / ".join(_number(max(case["check"][name] for case in given)) for name in ("outputs", "gradients"))
        text = f"{n}. {where}: {reason}.{apart} Put right: {left}, in {given[0]['dtype']}."
        lines.append(textwrap.fill(text, 120, subsequent_indent="   ", break_on_hyphens=False, break_long_words=False))
    return "\n".join(lines) + "\n"


def _defaults(defaults: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = ["| preset | setting | `adapters` | adapterkit |", "|---|---|---|---|"]
    lines += [
        f"| `{preset}` | `{name}` | `{values['theirs']}` | `{values['ours']}` |"
        for preset, settings in defaults.items()
        for name, values in settings.items()
    ]
    return "\n".join(lines) + "\n"


def _marks(cases: Cases) -> dict[str, int]:
    """A number for each reason, in the order that they are met."""
    return {reason: n for n, reason in enumerate((r for r in _names(cases, "reason") if r), start=1)}


def _names(cases: Cases, key: str) -> list[Any]:
    """The distinct values of a field, in order."""
    found: list[Any] = []
    for case in cases:
        if case[key] not in found:
            found.append(case[key])
    return found


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value < 0.1 else f"{value:.2g}"
