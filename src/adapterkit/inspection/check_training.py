"""Check what trains: the base must not, and the optimizer must hold all that does."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..runtime.lookup import adapters_in
from ..runtime.state import ModelState
from ..structure.base_tensors import base_parameters
from .table import in_short

__all__ = ["base_is_open", "inactive_problem", "open_base_problems", "optimizer_problems"]


def base_is_open(model: nn.Module) -> bool:
    """Tell whether a parameter of the base requires a gradient."""
    return any(p.requires_grad for _, p in base_parameters(model))


def inactive_problem(model: nn.Module, state: ModelState, names: Sequence[str]) -> str:
    """Say that adapters are there and none is active; and what training would do then, if the base is open.

    Args:
        model: The model.
        state: Its state.
        names: The adapters.
    """
    base = [p for _, p in base_parameters(model)]
    trained = sum(p.numel() for p in base if p.requires_grad)
    # With a closed base, `backward` raises by itself. An open one would train, and nobody would notice.
    if state.frozen is not None or not trained:
        return "no adapter is active, so that none could be proven: call kit.activate or kit.train_adapter"
    there = f"adapter {names[0]!r} is" if len(names) == 1 else f"adapters {in_short([repr(name) for name in names])} are"
    total = sum(p.numel() for p in base)
    share = f"all {total:,}" if trained == total else f"{trained:,} of the {total:,}"
    return (
        f"{there} there but not active, so that nothing could be proven, and the base is open: training now would train "
        f"{share} base parameters; call kit.train_adapter({names[0]!r})"
    )


def open_base_problems(model: nn.Module, state: ModelState) -> Iterator[str]:
    """Yield a sentence if parameters of a frozen base are open."""
    opened = [repr(name) for name, p in base_parameters(model) if p.requires_grad] if state.frozen is not None else []
    if opened:
        requires = "requires" if len(opened) == 1 else "require"
        yield f"the base is frozen, yet {len(opened)} of its parameters {requires} grad: {in_short(opened)}"


def optimizer_problems(
    model: nn.Module, state: ModelState, optimizer: torch.optim.Optimizer, *, base_is_said: bool
) -> Iterator[str]:
    """Yield what is wrong with the optimizer of the training to come: one sentence for the base, one for each adapter.

    Args:
        model: The model.
        state: Its state.
        optimizer: The optimizer.
        base_is_said: Whether another problem says already that the base is open.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    for owner, parameters in _trained_by_owner(model).items():
        lacking = [repr(name) for name, p in parameters if id(p) not in held]
        # An open base is a problem of its own, and adding it to the optimizer would not mend that.
        if lacking and (owner is not None or state.frozen is not None):
            yield f"{_lacking(owner, len(lacking), len(parameters))}: {in_short(lacking)}"
    if not any(p.requires_grad for p in model.parameters()):
        yield "nothing is to train: call kit.train_adapter"
    if state.frozen is None and not base_is_said:
        yield "the base is not frozen: call kit.train_adapter or kit.freeze"


def _lacking(owner: str | None, lacking: int, trained: int) -> str:
    """Say how many parameters of an adapter, or of the base (None), train and are not in the optimizer."""
    whose = "the base" if owner is None else f"adapter {owner!r}"
    mend = "" if owner is None else f" (kit.parameters({owner!r}) gives all)"
    # None at all points at an optimizer that was built too early; some, at a list that was put together by hand.
    if lacking == trained:
        return f"{trained} parameters of {whose} train, but the optimizer holds none of them{mend}"
    return f"{trained} parameters of {whose} train, but the optimizer does not hold {lacking} of them{mend}"


def _trained_by_owner(model: nn.Module) -> dict[str | None, list[tuple[str, nn.Parameter]]]:
    """Map each adapter, and None for the base, to those of its parameters that train, with their names in the model."""
    adapters = adapters_in(model)
    owners: dict[int, str] = {}
    for name in adapters.names:
        owners |= {id(p): name for held in adapters.modules(name) for p in held.module.parameters()}
    found: dict[str | None, list[tuple[str, nn.Parameter]]] = {}
    # Each Parameter once, so a tied one is counted once. What no adapter owns is the base's.
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(owners.get(id(parameter)), []).append((key, parameter))
    return found
