"""Proof that a model is adapted as its sites say: hooks there and firing, base unmoved, adapter trainable."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .base import base_parameters, base_tensors, digest
from .errors import AdapterKitError
from .hooks import InputHook, OutputHook, has_hook
from .record import Record
from .sites import AdapterSite, sites_of
from .structure.trace import ExampleInputs, observe

__all__ = ["Verification", "moved_tensors", "verify"]


@dataclass(frozen=True)
class Verification:
    """What `kit.verify` found.

    Attributes:
        problems: One sentence each; empty if all is well.
        fired: How often each host of the active adapter ran on the example inputs; None without them.
        base_is_unmoved: Whether every base tensor is bit-identical to when it was frozen; None if it is not frozen.
    """

    problems: tuple[str, ...]
    fired: dict[str, int] | None
    base_is_unmoved: bool | None

    @property
    def is_ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def require(self) -> None:
        """Raise AdapterKitError with every problem, if there are any."""
        if self.problems:
            raise AdapterKitError("verification failed: " + "; ".join(self.problems))


def verify(
    model: nn.Module,
    record: Record,
    example_inputs: ExampleInputs | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Verification:
    """Check the adapted model against what its sites say. Changes nothing.

    Args:
        example_inputs: Run the model on them and count how often each host of the active adapter runs.
        optimizer: Check that something trains, that the optimizer holds all of it, and that the base is frozen.
    """
    active = record.activation.active
    hosts = {path: (host, site) for path, host, site in sites_of(model)}
    problems = [*_missing_hooks(hosts)]
    fired = None
    if example_inputs is not None:
        active_hosts = [path for path, (_, site) in hosts.items() if active in site.entries]
        calls = observe(model, example_inputs, active_hosts, lambda *_: None)
        fired = {path: len(seen) for path, seen in calls.items()}
        problems += [f"{path!r} never ran on the example inputs" for path, count in fired.items() if not count]
    moved = moved_tensors(model, record)
    if moved:
        problems.append(f"the base moved since it was frozen: {', '.join(moved)}")
    if record.frozen is not None:
        problems += [f"{name!r} is frozen, yet requires grad" for name, p in base_parameters(model) if p.requires_grad]
    if optimizer is not None:
        problems += _optimizer_problems(model, record, optimizer)
    return Verification(tuple(problems), fired, None if moved is None else not moved)


def moved_tensors(model: nn.Module, record: Record) -> list[str] | None:
    """The names of base tensors that differ from when they were frozen, or are gone; None if the base is not frozen."""
    if record.frozen is None:
        return None
    now = {name: digest(tensor) for name, tensor in base_tensors(model)}
    then = record.frozen.digests
    return [name for name in then | now if now.get(name) != then.get(name)]


def _missing_hooks(hosts: dict[str, tuple[nn.Module, AdapterSite]]) -> Iterator[str]:
    for path, (host, site) in hosts.items():
        for name, entry in site.entries.items():
            kind = InputHook if entry.spec is not None and entry.spec.at == "input" else OutputHook
            if not has_hook(host, kind):
                yield f"the hook of adapter {name!r} on {path!r} is gone: someone removed it"


def _optimizer_problems(model: nn.Module, record: Record, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            yield f"{name!r} is to train, but the optimizer does not hold it"
    if not any(p.requires_grad for p in model.parameters()):
        yield "nothing is to train: call kit.train_adapter"
    if record.frozen is None:
        yield "the base is not frozen: call kit.train_adapter or kit.freeze"
