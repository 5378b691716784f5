"""One case of the comparison: the same weights in both libraries, and how far outputs and gradients lie apart."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import adapterkit as ak

from .explained import Explanation, explanation
from .families import make_inputs
from .measure import default_dtype, float_tensors, furthest, gradients_of, in_dtype, relative
from .peer import LEAVES, Factor, Peer

__all__ = ["TOLERANCE", "Case", "Difference", "Outcome", "compare"]

# Of outputs of order 1, and of gradients in parts of the largest entry of each tensor.
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}
TOLERANCE = _TOLERANCES[torch.float32]


class SitesDifferError(Exception):
    """The two libraries put different adapters into a block."""


@dataclass(frozen=True)
class Case:
    """One family with one preset and one reduction factor, a number or a map by layer."""

    family: str
    preset: str
    factor: Factor


@dataclass(frozen=True)
class Difference:
    """The greatest absolute difference of outputs, and that of gradients in parts of the largest entry."""

    outputs: float
    gradients: float

    def within(self, tolerance: float) -> bool:
        """Whether both are at most that much (and numbers)."""
        return self.outputs <= tolerance and self.gradients <= tolerance


@dataclass(frozen=True)
class Outcome:
    """What a case gave.

    Attributes:
        base: How far the other library moves the outputs of a model that has no adapter yet.
        difference: With adapters; None where both could not be given the same ones.
        verdict: "equal", "explained" (the reason is known, and with it put right the libraries agree) or "differs".
        reason: Why it is not equal.
        message: Why both could not be given the same adapters.
        check: The difference with the reason put right, in the explanation's dtype.
        dtype: That dtype.
    """

    case: Case
    base: float
    difference: Difference | None
    verdict: str
    reason: str | None = None
    message: str | None = None
    check: Difference | None = None
    dtype: str | None = None


def compare(case: Case, model: PreTrainedModel) -> Outcome:
    """Run a case on a model, which is not changed."""
    base, difference, message = _base_difference(model), None, None
    try:
        difference = _difference(case, model)
    except (SitesDifferError, ak.AdapterKitError) as error:
        message = str(error)
    if difference is not None and difference.within(TOLERANCE):
        return Outcome(case, base, difference, "equal")
    known = explanation(case.family, case.preset)
    if known is None:
        return Outcome(case, base, difference, "differs", message=message)
    with default_dtype(known.dtype):
        check = _difference(case, copy.deepcopy(model).to(known.dtype), known)
    verdict = "explained" if check.within(_TOLERANCES[known.dtype]) else "differs"
    dtype = str(known.dtype).removeprefix("torch.")
    return Outcome(case, base, difference, verdict, known.reason, message, check, dtype)


def _base_difference(model: PreTrainedModel) -> float:
    """How far the other library moves the outputs of a model that has no adapter yet."""
    inputs, peer = _inputs(model), Peer(model)
    with torch.no_grad():
        return furthest(float_tensors(peer.model(**inputs)), float_tensors(model(**inputs)))


def _difference(case: Case, model: PreTrainedModel, known: Explanation | None = None) -> Difference:
    """Adapt two copies, one with each library, and measure; with what is known to be wrong put right."""
    if known is not None and known.prepare is not None:
        model = copy.deepcopy(model)
        known.prepare(model)
    inputs = _inputs(model)
    peer = Peer(model)
    peer.add(case.preset, case.factor)
    if known is not None and known.correct is not None:
        known.correct(peer)
    kit = ak.wrap(copy.deepcopy(model), example_inputs=inputs)
    targets = {} if known is None or known.targets is None else {"targets": known.targets[case.preset]}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    kit.add("parity", case.preset, reduction_factor=case.factor, dtype=dtype, **targets)
    kit.train_adapter("parity")
    pairs = _pairs(peer, kit)
    for theirs, ours in pairs:
        ours.data.copy_(theirs.data)
    there = _run(peer.model, inputs, [theirs for theirs, _ in pairs])
    here = _run(kit.model, inputs, [ours for _, ours in pairs])
    _check_that_adapters_act(kit, inputs, here[0])
    return Difference(furthest(there[0], here[0]), relative(there[1], here[1]))


def _check_that_adapters_act(kit: ak.AdapterKit, inputs: Mapping[str, Any], adapted: list[Tensor]) -> None:
    """Raise unless the adapters change the outputs by far more than the tolerance: else equality would say nothing."""
    with kit.base(), torch.no_grad():
        effect = furthest(float_tensors(kit.model(**inputs)), adapted)
    if not effect > 1000 * TOLERANCE:
        raise RuntimeError(f"the adapters change the outputs by {effect:.1e} only")


def _pairs(peer: Peer, kit: ak.AdapterKit) -> list[tuple[Tensor, Tensor]]:
    """Their adapters' tensors with ours of the same place: the n-th adapter of each block, and by name in it.

    Raises:
        SitesDifferError: a block has more adapters in one library than in the other, or tensors of other shapes.
    """
    own: dict[str, dict[str, Tensor]] = {}
    for name, parameter in kit.named_parameters("parity"):
        host, _, rest = name.partition("_adapterkit.")
        own.setdefault(host, {})[rest.rpartition(".")[2]] = parameter
    pairs, left = [], set(own)
    blocks: dict[str, list[nn.Module]] = {}
    for site in sorted(peer.sites(), key=lambda site: ("attention", "crossattention", "feedforward").index(site.kind)):
        blocks.setdefault(site.block, []).append(site.module)
    for block, modules in blocks.items():
        hosts = [host for host in own if host.startswith(f"{block}.")]
        if len(hosts) != len(modules):
            raise SitesDifferError(f"{len(modules)} adapters in {block!r}, ours are at {hosts}")
        left -= set(hosts)
        for host, module in zip(hosts, modules, strict=True):
            theirs = {LEAVES[name]: parameter for name, parameter in module.named_parameters()}
            if {n: p.shape for n, p in theirs.items()} != {n: p.shape for n, p in own[host].items()}:
                raise SitesDifferError(f"the adapter in {block!r} and ours at {host!r} have other tensors")
            pairs += [(theirs[name], own[host][name]) for name in theirs]
    if left:
        raise SitesDifferError(f"ours alone has adapters at {sorted(left)}")
    return pairs


def _run(model: nn.Module, inputs: Mapping[str, Any], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of a random projection of them."""
    outputs = float_tensors(model(**inputs))
    return outputs, gradients_of(outputs, leaves)


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs in the model's dtype."""
    return in_dtype(make_inputs(model), next(model.parameters()).dtype)
