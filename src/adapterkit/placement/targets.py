"""From targets (patterns, roles, predicates) to locations: which tensor of which module an adapter acts on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..config.settings import AdapterConfig, TensorConfig
from ..errors import TargetError
from ..structure.anatomy.description import ModuleOutput, Sublayer
from ..structure.anatomy.discover import Discovery
from ..structure.anatomy.roles import check_whole, role_places
from ..structure.hosts import resolve_host
from ..structure.paths import nearest_to
from ..structure.pytree import Argument, Path
from .match import match
from .patterns import is_role
from .rule import STREAM, Placement
from .spec import Location

__all__ = ["Found", "argument_of", "asks_for_structure", "find_locations"]


class Found(NamedTuple):
    """A location that targets lead to, before the width of its tensor is known.

    Attributes:
        location: Where the module of an adapter goes, and what it reads.
        axis: The axis of the features there, where tracing found it.
        reads_own_input: Whether `location.residual` is the target itself, beside which the adapter sits.
    """

    location: Location
    axis: int | None = None
    reads_own_input: bool = False


def asks_for_structure(config: AdapterConfig, placement: Placement) -> bool:
    """Whether a config's places depend on what the model computes, not on the names of its modules alone."""
    placed = placement.at in ("sum", "normalised") or placement.residual == STREAM
    targets = config.targets if placement.targets is None else placement.targets
    return placed or any(map(is_role, (*targets, *config.exclude)))


def find_locations(
    model: nn.Module, modules: dict[str, nn.Module], config: TensorConfig, placement: Placement, discovery: Discovery
) -> dict[str, Found]:
    """Find the locations that a config's targets name: map each host's path to one, in the model's order.

    Raises:
        TargetError: a target matches nothing, or what it matches cannot be adapted as the placement says.
    """
    matched = match(model, config.targets, config.exclude, discovery=discovery)
    excluded = set(match(model, config.exclude, discovery=discovery)) if config.exclude else set()
    outputs: dict[str, ModuleOutput] = {}
    for role in filter(is_role, config.targets):
        if config.layers is None:
            check_whole(str(role), discovery.anatomy, excluded)
        for found in role_places(str(role), discovery.anatomy):
            held = outputs.setdefault(found.path, found)
            if held.output != found.output and config.output is None:
                raise TargetError(
                    f"{role!r}: {found.path!r} yields two branches, at {held.output} and {found.output} of its output; an "
                    f"adapter can sit at one: set output={list(held.output)} for that one, or exclude={[found.path]}"
                )
    at_hosts: dict[str, Found] = {}
    for path in matched:
        place = outputs.get(path)
        output = _as_path(config.output) or (place.output if place else ()) or None
        if placement.at in ("sum", "normalised"):
            here = _at_sum(_sublayer_of(path, modules, discovery), placement, modules)
        else:
            here = _at_module(path, output, placement, config, model, modules, discovery)
            if place is not None and here.location.at == "output" and output == (place.output or None):
                here = here._replace(axis=place.axis)
        host = here.location.path
        if at_hosts.setdefault(host, here) != here:
            raise TargetError(
                f"two targets lead to {host!r} (parallel branches have one sum); exclude {path!r} or target another"
            )
    kept = {host: here for host, here in at_hosts.items() if host not in excluded}  # a host may be another than the target
    if not kept:
        raise TargetError(
            f"every module that would be adapted ({list(at_hosts)}) is excluded by exclude={list(config.exclude)}"
        )
    return kept


def _at_module(
    path: str,
    output: Path | None,
    placement: Placement,
    config: TensorConfig,
    model: nn.Module,
    modules: dict[str, nn.Module],
    discovery: Discovery,
) -> Found:
    """Find the location at a target's own output or input."""
    at_input = placement.at == "input"
    host = resolve_host(path, modules, at_input=at_input)
    if placement.reads == "own_input":
        beside = resolve_host(path, modules, at_input=True)  # a Sequential's input is its first layer's
        argument = argument_of(modules[host], config.input)
        return Found(Location(host, "output", "residual", output, argument, beside), reads_own_input=True)
    argument, residual = argument_of(modules[host], config.input), None
    if placement.residual == STREAM:
        port = _sublayer_of(path, modules, discovery).stream
        if port is None:
            raise TargetError(
                f"no module of its block takes the residual stream that enters {path!r} before it ends, so that an "
                "adapter could not read it; name another module's input with residual=, or use a sequential adapter"
            )
        residual, argument = port.path, port.argument
    elif placement.residual is not None:
        residual = _nearest(host, placement.residual, model, modules)
    return Found(Location(host, placement.at, placement.reads, output, argument, residual))


def _at_sum(sublayer: Sublayer, placement: Placement, modules: dict[str, nn.Module]) -> Found:
    """Find the location after a sub-layer's sum s = x + r: in a post-norm block at its norm, else where s is returned.

    Where no module returns s, at the branch x, reading x + r, which is s.
    """
    norm, total, out, stream = sublayer.post_norm, sublayer.sum, sublayer.out, sublayer.stream
    if norm is not None and sublayer.shares_norm:
        raise TargetError(
            f"the norm {norm.path!r} after the {sublayer.kind} runs on other tensors of its block, too, and an adapter "
            "there would change them all; use at='output' on a branch (such as '@feedforward.out'), or target '@block.out'"
        )
    if norm is None and sublayer.norm == "post":
        raise TargetError(
            f"the norm after the {sublayer.kind} in {sublayer.addition[0]!r} is a function, not a module, so that no hook "
            "can run it again or adapt what it returns; use at='output' on a branch (such as '@feedforward.out')"
        )
    if norm is not None and placement.at == "normalised":
        return Found(Location(norm.path, "output", "site", norm.output or None, None, None), norm.axis)
    if norm is not None:
        return Found(Location(norm.path, "input", "norm", None, None, None))
    if total is not None:
        host = resolve_host(total.path, modules, at_input=False)
        return Found(Location(host, "output", "site", total.output or None, None, None), total.axis)
    if out is None or stream is None or sublayer.scales or sublayer.is_parallel:
        found = "is scaled before it is added" if sublayer.scales else "is one of two that are added at once"
        raise TargetError(
            f"the sum after the {sublayer.kind} in {sublayer.addition[0]!r} can be adapted nowhere: no module returns it, "
            + (f"and the branch {found}" if out and stream else "and no module takes or yields what it is the sum of")
            + "; use at='output' there, or target '@block.out'"
        )
    host = resolve_host(out.path, modules, at_input=False)
    return Found(Location(host, "output", "sum", out.output or None, stream.argument, stream.path), out.axis)


def _sublayer_of(path: str, modules: dict[str, nn.Module], discovery: Discovery) -> Sublayer:
    """The residual sub-layer whose branch a module yields, or whose last projection it is."""
    anatomy = discovery.anatomy
    every = (*anatomy.sublayers, *anatomy.others)
    for sublayer in every:
        if sublayer.out is not None and path in (
            sublayer.out.path,
            resolve_host(sublayer.out.path, modules, at_input=False),
        ):
            return sublayer
    for sublayer in every:
        if path in sublayer.last:
            return sublayer
    raise TargetError(
        f"{path!r} yields no branch of a residual addition; target a role such as '@feedforward.out', or the module whose "
        "output is added"
    )


def _nearest(path: str, pattern: str, model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """The module that the pattern names nearest to the host."""
    near = nearest_to(path, match(model, [pattern]))
    if len(near) != 1:
        raise TargetError(f"residual={pattern!r} names {near} for the site {path!r}; make it name one near that site")
    return resolve_host(near[0], modules, at_input=True)


def argument_of(host: nn.Module, which: int | str | None) -> Argument | None:
    """An argument of the host by position and keyword both, as far as its signature tells."""
    if which is None:
        return None
    try:
        names = list(inspect.signature(host.forward).parameters)
    except ValueError:
        names = []
    if isinstance(which, int):
        return which, names[which] if which < len(names) else None
    return names.index(which) if which in names else None, which


def _as_path(output: int | str | Sequence[int | str] | None) -> Path | None:
    if output is None:
        return None
    return (output,) if isinstance(output, (int, str)) else tuple(output)
