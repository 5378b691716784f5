"""Ask adapterkit for the presets and roles of a generated model, and compare with the truth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import adapterkit as ak

from .build import Wild, build
from .spec import Spec
from .truth import PRESETS, ROLES, SIZE, may_refuse, numbers, outputs_of, weights_of

__all__ = ["OUTCOMES", "Verdict", "judge"]

OUTCOMES = ("right", "refused", "wrong")
# By question, the outcome and the reason.
Verdict = dict[str, tuple[str, str]]
_PLAIN = {"bottleneck_size": SIZE, "non_linearity": "tanh", "scaling": 1.0, "reduction_factor": None}


def judge(spec: Spec) -> Verdict:
    """Return what adapterkit makes of a model, by question."""
    wild = build(spec)
    with torch.no_grad():
        base = wild.model(**wild.inputs)
        kit = ak.wrap(wild.model, example_inputs=wild.inputs)
        try:
            return {question: _outcome(question, kit, wild, base) for question in _questions(wild)}
        finally:
            kit.unwrap()


def _questions(wild: Wild) -> Iterator[str]:
    """Yield what is asked: roles of kinds that are there, and one that is not."""
    yield from PRESETS
    kinds = {kind for sublayer in wild.model.sublayers for kind in sublayer.place.kinds}
    yield from (f"@{kind}.out" for kind in ("attention", "crossattention", "feedforward", "convolution", "mixer"))
    yield from (role for role in ROLES if role[1:].partition(".")[0] in kinds)


def _outcome(question: str, kit: ak.AdapterKit, wild: Wild, base: Tensor) -> tuple[str, str]:
    try:
        wrong = _weights(question, kit, wild) if question in ROLES else _output(question, kit, wild, base)
    except ak.AdapterKitError as error:
        return "right" if may_refuse(question, wild) else "refused", _short(error)
    except Exception as error:  # anything but an error of its own is a fault
        return "wrong", f"{type(error).__name__}: {_short(error)}"
    return ("wrong", wrong) if wrong else ("right", "")


def _output(question: str, kit: ak.AdapterKit, wild: Wild, base: Tensor) -> str:
    """Add adapters as a preset or at a role, and say what is wrong with the output; nothing if it is right."""
    config: Any = question
    if question.startswith("@"):
        config = ak.BottleneckConfig(targets=[question], **_PLAIN)
        kit.add("zoo", config)
    else:
        kit.add("zoo", question, **_PLAIN)
    try:
        for i, parameter in enumerate(kit.parameters("zoo")):
            parameter.copy_(numbers(tuple(parameter.shape), i % 4))
        with kit.active("zoo"):
            found = wild.model(**wild.inputs)
        places = sorted({name.partition("._adapterkit")[0] for name, _ in kit.named_parameters("zoo")})
    finally:
        kit.remove("zoo")
    right = list(outputs_of(question, wild))
    if any(torch.allclose(found, one, rtol=1e-3, atol=1e-4) for one in right):
        return ""
    if all(torch.equal(one, base) for one in right):
        return f"found {places}, and there is nothing of the kind"
    return f"computes something else, with adapters at {places}"


def _weights(role: str, kit: ak.AdapterKit, wild: Wild) -> str:
    """Say what is wrong with the weights that a LoRA at a role adapts; nothing if they are right."""
    sites = kit.sites("lora", targets=[role], rank=2)
    found = {(site.path, name, site.slices) for site in sites for name in site.parameters or ("",)}
    right = list(weights_of(role, wild))
    if any(found == one for one in right):
        return ""
    more, less = sorted(found - {*right[0]}), sorted({*right[0]} - found)
    return f"{f'not meant: {more}' if more else ''}{f' missing: {less}' if less else ''}".strip()


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]
