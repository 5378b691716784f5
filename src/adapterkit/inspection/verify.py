"""Proof that a model is adapted as its sites say: hooks there and firing, base unmoved, adapter trainable."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..composition.nodes import drops_in, names_in
from ..config.settings import AdapterConfig
from ..config.union import Union
from ..errors import AdapterKitError, CompatibilityError, TargetError
from ..heads.hook import LabelsHook
from ..lifecycle.add import find_sites, needs_structure
from ..lifecycle.merging.merge import changed_since_merging
from ..placement.layers import in_layers
from ..placement.spec import SiteSpec, located
from ..runtime.acting import acting_at
from ..runtime.hooks import has_hook
from ..runtime.lookup import adapters_in, sites_of
from ..runtime.originals import base_digests
from ..runtime.site import AdapterSite, HeadEntry, SiteEntry, root_of
from ..runtime.state import STATE, ModelState, without_adapters
from ..structure.base_tensors import base_parameters, owner_at, parameter_at
from ..structure.paths import SITE
from ..structure.tracing.forward import ExampleInputs, runs_around
from ..structure.tracing.inputs import tiny_inputs
from ..structure.tracing.reads import Holder, reads_around
from .proof import SiteProof, dead_parameters, prove_sites

__all__ = ["Verification", "moved_tensors", "verify"]


@dataclass(frozen=True)
class Verification:
    """What `kit.verify` found.

    Attributes:
        problems: One sentence each; empty if all is well.
        sites: What was seen at each site of the active adapter; None if the model could not be run.
        base_is_unmoved: Whether every base tensor is bit-identical to when it was frozen; None if it is not frozen.
    """

    problems: tuple[str, ...]
    sites: tuple[SiteProof, ...] | None
    base_is_unmoved: bool | None

    @property
    def is_ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @property
    def fired(self) -> dict[str, int] | None:
        """How often each host of the active adapter ran in eval mode; None if the model could not be run."""
        return None if self.sites is None else {proof.path: proof.fired_in_eval for proof in self.sites}

    def require(self) -> None:
        """Raise AdapterKitError with every problem, if there are any."""
        if self.problems:
            raise AdapterKitError("verification failed: " + "; ".join(self.problems))

    def __str__(self) -> str:
        rows = [("site", "place", "eval", "train", "shape", "dtype", "\N{GREEK SMALL LETTER EPSILON}-test")]
        rows += [_row(proof) for proof in self.sites or ()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        base = {None: "not frozen", True: "frozen, unmoved", False: "moved"}[self.base_is_unmoved]
        found = [f"problem: {problem}" for problem in self.problems] or ["no problems"]
        return "\n".join([*(lines if self.sites else ["no site was run"]), f"base: {base}", *found])


def verify(
    model: nn.Module,
    state: ModelState,
    example_inputs: ExampleInputs | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Verification:
    """Check the adapted model against what its sites say. Changes nothing.

    Args:
        example_inputs: Inputs to run the model on; tiny ones are made if there are none.
        optimizer: Check that something trains, that the optimizer holds all of it, and that the base is frozen.
    """
    active = state.activation.active
    hosts = {path: (host, site) for path, host, site in sites_of(model)}
    lost = list(_lost_hosts(model, state, hosts))
    problems = [*_missing_hooks(model, hosts), *lost, *_elsewhere(hosts)]
    inputs = _inputs(model) if example_inputs is None and active is not None else example_inputs
    sites: tuple[SiteProof, ...] | None = None if inputs is None else ()
    if active is not None and inputs is not None:
        names = list(dict.fromkeys(names_in(active)))
        sites = tuple(proof for name in names for proof in prove_sites(model, name, inputs))
        specs = [(held.path, entry.spec) for name in names for held, entry in adapters_in(model).sites(name)]
        problems += _site_problems(model, sites, specs, inputs)
        for name in names:
            problems += [*([] if lost else _elsewhere_now(model, name, inputs)), *_dead(model, state, name, inputs)]
    elif active is None and hosts:
        problems.append("no adapter is active, so that none could be proven: call kit.activate or kit.train_adapter")
    moved = moved_tensors(model, state)
    if moved:
        problems.append(f"the base moved since it was frozen: {', '.join(moved)}")
    changed = changed_since_merging(model)
    if changed:
        problems.append(f"weights changed since {list(state.merged)} were merged into them: {', '.join(changed)}")
    if state.frozen is not None:
        problems += [f"{name!r} is frozen, yet requires grad" for name, p in base_parameters(model) if p.requires_grad]
    if optimizer is not None:
        problems += _optimizer_problems(model, state, optimizer)
    return Verification(tuple(problems), sites, None if moved is None else not moved)


def moved_tensors(model: nn.Module, state: ModelState) -> list[str] | None:
    """The names of base tensors that differ from when they were frozen, or are gone; None if the base is not frozen.

    Of weights into which adapters are merged, the originals are compared.
    """
    if state.frozen is None:
        return None
    now, then = base_digests(model), state.frozen.digests
    return [name for name in then | now if now.get(name) != then.get(name)]


def _missing_hooks(model: nn.Module, hosts: dict[str, tuple[nn.Module, AdapterSite]]) -> Iterator[str]:
    for path, (host, site) in hosts.items():
        for name, entries in site.entries.items():
            ways = {acting_at(entry.spec.at if isinstance(entry, SiteEntry) else "output") for entry in entries}
            kinds = [kind for acting in ways for kind in (acting.before, acting.after) if kind is not None]
            if not all(has_hook(host, kind) for kind in kinds):
                yield f"the hook of adapter {name!r} on {path!r} is gone: someone removed it"
            heads = [entry for entry in entries if isinstance(entry, HeadEntry) and entry.spec.above is not None]
            roots = {root_of(path, entry) for entry in heads}
            if not all(has_hook(model.get_submodule(root), LabelsHook) for root in roots):
                yield f"the hook that takes labels for the heads of adapter {name!r} is gone: someone removed it"


def _lost_hosts(model: nn.Module, state: ModelState, hosts: dict[str, tuple[nn.Module, AdapterSite]]) -> Iterator[str]:
    """Modules that were put in place of a host: the adapter went with it."""
    if model.__dict__.get(STATE) is not state:  # a part of a wrapped model: its paths are others
        return
    for name, paths in state.hosts.items():
        for path in paths:
            if path not in hosts or name not in hosts[path][1].entries:
                yield f"{path!r} was replaced since adapter {name!r} was added: remove the adapter, and add it anew"


def _elsewhere(hosts: dict[str, tuple[nn.Module, AdapterSite]]) -> Iterator[str]:
    """Adapters on another device than their hosts."""
    for path, (host, site) in hosts.items():
        devices = {p.device for name, p in host.named_parameters() if SITE not in name.split(".") and not p.is_meta}
        for name in site.entries:
            own = {p.device for _, module in site.modules_of(name) for p in module.parameters()}
            wrong = own - devices if len(devices) == 1 else set()
            if wrong and not hasattr(host, "_hf_hook"):
                yield f"adapter {name!r} at {path!r} is on {wrong.pop()}, its host on {devices.pop()}"


def _elsewhere_now(model: nn.Module, name: str, inputs: ExampleInputs) -> Iterator[str]:
    """Where the adapter's config, read anew, asks for other places: the model computes otherwise than when it was added."""
    config = adapters_in(model).configs.get(name)
    if not isinstance(config, AdapterConfig | Union) or not needs_structure(config):
        return
    try:
        wanted = {_where(spec) for spec in find_sites(model, config, inputs)}
    except TargetError as error:
        yield f"the places that adapter {name!r} was added at are not found any more: {error}"
        return
    there = {_where(located(entry.spec, held.path)) for held, entry in adapters_in(model).sites(name)}
    changed = sorted({path for path, *_ in wanted ^ there})
    if changed:
        yield (
            f"the model computes otherwise than when adapter {name!r} was added: its config now asks for other places than "
            f"{changed}; remove the adapter, and add it anew"
        )


def _where(spec: SiteSpec) -> tuple[str, object]:
    """The host, and all else that is not a matter of the example inputs' shapes."""
    return spec.path, (spec.at, spec.reads, spec.output, spec.residual, spec.parameters, spec.slices, spec.tag, spec.member)


def _dead(model: nn.Module, state: ModelState, name: str, inputs: ExampleInputs) -> list[str]:
    """Parameters that no gradient reaches, but for those that are dropped, or why none can be computed."""
    dropped = tuple(_dropped(model, state, name))
    try:
        dead = [key for key in dead_parameters(model, name, inputs) if not key.startswith(dropped)]
    except (RuntimeError, ValueError) as error:
        return [f"no gradients can be computed: {str(error).splitlines()[0]}"]
    return [f"no gradient of the model's output reaches {', '.join(dead)}"] if dead else []


def _dropped(model: nn.Module, state: ModelState, name: str) -> Iterator[str]:
    """How the names of an adapter's parameters begin that rest, since a Drop holds them back in their layer."""
    layers = [layer for drop in drops_in(state.activation.active) for layer in drop.dropped_layers]
    for path, _, site in sites_of(model):
        acting = {key for steps in site.steps.values() for step in steps for key in step.module_keys}
        for entry in site.entries.get(name, ()):
            if isinstance(entry, SiteEntry) and in_layers(entry.spec.layer, layers) and entry.key not in acting:
                yield f"{path}.{SITE}.{entry.key}.".lstrip(".")


def _inputs(model: nn.Module) -> ExampleInputs | None:
    """Tiny inputs, if any can be made."""
    try:
        with without_adapters():
            return tiny_inputs(model)
    except CompatibilityError:
        return None


def _site_problems(
    model: nn.Module, sites: Sequence[SiteProof], specs: Sequence[tuple[str, SiteSpec]], inputs: ExampleInputs
) -> Iterator[str]:
    """What is wrong at the sites, each with its path and spec."""
    # A tied Parameter is adapted wherever it is read; not all that hold it need to run.
    held = [
        parameter_at(model.get_submodule(path), spec.parameters[0]) if spec.parameters else None for path, spec in specs
    ]
    read = {id(p) for p, proof in zip(held, sites, strict=True) if p is not None and proof.fired_in_eval}
    idle = [
        (proof.path, spec)
        for proof, (_, spec), parameter in zip(sites, specs, held, strict=True)
        if not proof.fired_in_eval and id(parameter) not in read
    ]
    yield from _idle_parameters(model, [(path, spec) for path, spec in idle if spec.parameters], inputs)
    modules = [path for path, spec in idle if not spec.parameters]
    for path, around in (runs_around(model, inputs, modules) if modules else {}).items():
        yield (
            f"{path!r} never ran on the example inputs (skipped, or its weights are read around it); adapt "
            f"{repr(around) if around else 'the model itself'}, which does"
        )
    for proof in sites:
        if not proof.fired_in_eval:
            continue
        if not proof.fired_in_training:
            yield f"{proof.path!r} ran in eval mode, but never in training mode (does the model run in it on these inputs?)"
        if not proof.agrees:
            yield f"the \N{GREEK SMALL LETTER EPSILON}-test of {proof.path!r} ({proof.place}) fails: {proof.moved}"


def _idle_parameters(model: nn.Module, idle: Sequence[tuple[str, SiteSpec]], inputs: ExampleInputs) -> Iterator[str]:
    """What is wrong where a Parameter is adapted whose host never runs, so that nobody reads the changed one."""
    owners = [owner_at(model.get_submodule(path), spec.parameters[0]) for path, spec in idle]
    held = [
        (path, spec.parameters[0], Holder(owner, leaf, model.get_submodule(path)))
        for (path, spec), (owner, leaf) in zip(idle, owners, strict=True)
        if owner is not None
    ]
    with without_adapters():
        reads = reads_around(model, [holder for _, _, holder in held], inputs) if held else []
    for (path, name, _), stacks in zip(held, reads, strict=True):
        reader = None if not stacks else stacks[0][-1][0] if stacks[0] else ""
        if reader is None:
            yield (
                f"{path!r} never ran on the example inputs, and nothing else read its {name!r}, which is adapted there: "
                "verify with inputs that run it, or exclude it"
            )
        else:
            who = repr(reader) if reader else type(model).__name__
            yield (
                f"{path!r} never ran on the example inputs: {who} reads its {name!r} around it, as it was before the "
                "adapter. Wrap the model with the inputs, ak.wrap(model, example_inputs=batch), and add it anew"
            )


def _row(proof: SiteProof) -> tuple[str, str, str, str, str, str, str]:
    """A line of the table."""
    moved = proof.moved
    factor = "" if moved is None else "inexact"
    if moved is not None and moved.factor is not None:
        factor = "exact" if moved.is_exact else f"times {moved.factor[0]:.4g} to {moved.factor[1]:.4g}"
    shape = "" if proof.shape is None else " x ".join(map(str, proof.shape))
    dtype = str(proof.dtype or "").removeprefix("torch.")
    return proof.path, proof.place, str(proof.fired_in_eval), str(proof.fired_in_training), shape, dtype, factor


def _optimizer_problems(model: nn.Module, state: ModelState, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            yield f"{name!r} is to train, but the optimizer does not hold it"
    if not any(p.requires_grad for p in model.parameters()):
        yield "nothing is to train: call kit.train_adapter"
    if state.frozen is None:
        yield "the base is not frozen: call kit.train_adapter or kit.freeze"
