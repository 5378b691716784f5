"""Proof that a model is adapted as its sites say: hooks there and firing, base unmoved, adapter trainable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..composition.nodes import names_in
from ..errors import AdapterKitError, CompatibilityError
from ..lifecycle.merging.merge import changed_since_merging
from ..runtime.lookup import adapters_in, sites_of
from ..runtime.originals import base_digests
from ..runtime.state import ModelState, without_adapters
from ..structure.tracing.forward import ExampleInputs
from ..structure.tracing.inputs import tiny_inputs
from .check_hosts import lost_hosts, missing_hooks, on_other_devices
from .check_sites_run import in_other_places, site_problems, without_gradients
from .check_training import base_is_open, inactive_problem, open_base_problems, optimizer_problems
from .proof import SiteProof, prove_sites
from .table import in_short, table

__all__ = ["Verification", "moved_tensors", "verify"]


@dataclass(frozen=True)
class Verification:
    """What `kit.verify` found; `print` it for a report.

    Attributes:
        problems: One sentence each; empty if all is well.
        sites: What was seen at each site of the active adapter; None if the model could not be run.
        base_is_unmoved: Whether every base tensor is bit-identical to when it was frozen; None if it is not frozen.
        note: Why the model could not be run, if it could not.
    """

    problems: tuple[str, ...]
    sites: tuple[SiteProof, ...] | None
    base_is_unmoved: bool | None
    note: str | None = None

    @property
    def is_ok(self) -> bool:
        """Tell whether there are no problems."""
        return not self.problems

    @property
    def fired(self) -> dict[str, int] | None:
        """Map each host of the active adapter to how often it ran in eval mode; None if the model could not be run."""
        return None if self.sites is None else {proof.path: proof.fired_in_eval for proof in self.sites}

    def require(self) -> Verification:
        """Return this report, or raise AdapterKitError with every problem if there are any."""
        if self.problems:
            raise AdapterKitError("verification failed: " + "; ".join(self.problems))
        return self

    def __str__(self) -> str:
        heading = ("site", "place", "eval", "train", "shape", "dtype", "\N{GREEK SMALL LETTER EPSILON}-test")
        seen = table([heading, *map(_cells, self.sites)]) if self.sites else "no site was run"
        base = {None: "not frozen", True: "frozen, unmoved", False: "moved"}[self.base_is_unmoved]
        found = [f"problem: {problem}" for problem in self.problems] or ["no problems"]
        return "\n".join([f"{seen}: {self.note}" if self.note else seen, f"base: {base}", *found])


def verify(
    model: nn.Module,
    state: ModelState,
    example_inputs: ExampleInputs | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Verification:
    """Check the adapted model against what its sites say. Changes nothing.

    Args:
        model: The model.
        state: Its state.
        example_inputs: Inputs to run the model on; tiny ones are made if there are none.
        optimizer: Check that something trains, that the optimizer holds all of it, and that the base is frozen.
    """
    hosts = {path: (host, site) for path, host, site in sites_of(model)}
    is_active = state.activation.active is not None
    lost = list(lost_hosts(model, state, hosts))
    problems = [*missing_hooks(model, hosts), *lost, *on_other_devices(hosts)]
    # Where nothing is active nothing is to be proven, so no inputs are made, which would cost runs of the model.
    inputs, note = (example_inputs, None) if example_inputs is not None or not is_active else _inputs(model)
    # None: there is nothing to run it on. (): there is, but nothing is active whose sites could be seen.
    sites: tuple[SiteProof, ...] | None = None if inputs is None else ()
    if is_active and inputs is not None:
        sites, found = _run(model, state, inputs, hosts_are_lost=bool(lost))
        problems += found
    nothing_runs = not is_active and bool(hosts)
    if nothing_runs:
        problems.append(inactive_problem(model, state, adapters_in(model).names))
    moved = moved_tensors(model, state)
    problems += [*_changed_weights(model, state, moved or []), *open_base_problems(model, state)]
    if optimizer is not None:
        problems += optimizer_problems(model, state, optimizer, base_is_said=nothing_runs and base_is_open(model))
    return Verification(tuple(problems), sites, None if moved is None else not moved, note)


def _run(
    model: nn.Module, state: ModelState, inputs: ExampleInputs, *, hosts_are_lost: bool
) -> tuple[tuple[SiteProof, ...], list[str]]:
    """Run the model, and return what was seen at each site of what is active, and what is wrong with it."""
    names = list(dict.fromkeys(names_in(state.activation.active)))
    sites = tuple(proof for name in names for proof in prove_sites(model, name, inputs))
    specs = [(held.path, entry.spec) for name in names for held, entry in adapters_in(model).sites(name)]
    problems = list(site_problems(model, sites, specs, inputs))
    for name in names:
        # A host that was replaced is a problem of its own: that the config asks for its place again says nothing more.
        problems += [] if hosts_are_lost else in_other_places(model, name, inputs)
        problems += without_gradients(model, state, name, inputs)
    return sites, problems


def _changed_weights(model: nn.Module, state: ModelState, moved: Sequence[str]) -> list[str]:
    """Return a sentence if the base moved, and one if weights changed while adapters were merged into them."""
    changed = changed_since_merging(model)
    problems = [f"the base moved since it was frozen: {in_short(moved)}"] if moved else []
    if changed:
        problems.append(f"weights changed since {list(state.merged)} were merged into them: {in_short(changed)}")
    return problems


def moved_tensors(model: nn.Module, state: ModelState) -> list[str] | None:
    """Return the names of base tensors that differ from when they were frozen, or are gone; None if it is not frozen.

    Of weights into which adapters are merged, the originals are compared.
    """
    if state.frozen is None:
        return None
    now, then = base_digests(model), state.frozen.digests
    # The names of both: for a tensor that is gone, or new, one side gives None.
    return [name for name in then | now if now.get(name) != then.get(name)]


def _inputs(model: nn.Module) -> tuple[ExampleInputs | None, str | None]:
    """Return tiny inputs; or None, and why none can be made."""
    try:
        with without_adapters():
            return tiny_inputs(model), None
    except CompatibilityError as error:
        return None, str(error)


def _cells(proof: SiteProof) -> tuple[str, ...]:
    """Return the texts of a line of the report."""
    moved = proof.moved
    # e.g. "exact", "times 0.1 to 0.1" (LayerScale), "inexact"; "" where no branch is moved.
    factor = "" if moved is None else "inexact"
    if moved is not None and moved.factor is not None:
        factor = "exact" if moved.is_exact else f"times {moved.factor[0]:.4g} to {moved.factor[1]:.4g}"
    shape = "" if proof.shape is None else " x ".join(map(str, proof.shape))
    dtype = str(proof.dtype or "").removeprefix("torch.")
    return proof.path, proof.place, str(proof.fired_in_eval), str(proof.fired_in_training), shape, dtype, factor
