"""From targets (patterns, roles, predicates) to locations: which tensor of which module an adapter acts on."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..config.settings import AdapterConfig, TensorConfig
from ..errors import TargetError
from ..structure.anatomy.description import ModuleOutput, Sublayer
from ..structure.anatomy.discover import Discovery
from ..structure.anatomy.roles import check_whole, role_places, role_products
from ..structure.anatomy.unknown import check_known
from ..structure.hosts import resolve_host
from ..structure.paths import nearest_to
from ..structure.pytree import Argument, Path
from .match import match
from .patterns import is_role
from .projections import projection_of
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


@dataclass(frozen=True)
class _Search:
    """What a target's location depends on, beside the target."""

    model: nn.Module
    modules: dict[str, nn.Module]
    config: TensorConfig
    placement: Placement
    discovery: Discovery


def asks_for_structure(config: AdapterConfig, placement: Placement) -> bool:
    """Tell whether a config's sites depend on what the model computes, not on the names of its modules alone."""
    placed = _is_at_sum(placement) or placement.residual == STREAM
    targets = config.targets if placement.targets is None else placement.targets
    return placed or any(map(is_role, (*targets, *config.exclude)))


def _is_at_sum(placement: Placement) -> bool:
    """Tell whether an adapter sits behind the addition, not at the branch."""
    return placement.at in ("sum", "normalised")


def find_locations(
    model: nn.Module, modules: dict[str, nn.Module], config: TensorConfig, placement: Placement, discovery: Discovery
) -> dict[str, Found]:
    """Find the locations that a config's targets name: map each host's path to one, in the model's order.

    Raises:
        TargetError: a target matches nothing, or what it matches cannot be adapted as the placement says.
    """
    search = _Search(model, modules, config, placement, discovery)
    try:
        excluded = set(match(model, config.exclude, discovery=discovery)) if config.exclude else set()
    except TargetError as error:
        raise TargetError(f"exclude: {error}") from None
    for role in filter(is_role, config.targets):
        check_known(role, discovery.anatomy, excluded)
    matched = match(model, config.targets, config.exclude, discovery=discovery, at_sum=_is_at_sum(placement))
    outputs = _role_outputs(search, excluded)
    at_hosts: dict[str, Found] = {}
    # Two targets may lead to one host: a Sequential and its last layer do. That is fine if they mean the same there.
    for path in matched:
        here = _location(path, outputs.get(path), search)
        host = here.location.path
        if at_hosts.setdefault(host, here) != here:
            raise TargetError(_two_at_one(host, path, at_hosts[host].location, here.location))
    kept = {host: here for host, here in at_hosts.items() if host not in excluded}  # a host may be another than the target
    if not kept:
        raise TargetError(
            f"every module that would be adapted ({list(at_hosts)}) is excluded by exclude={list(config.exclude)}"
        )
    return kept


def _two_at_one(host: str, path: str, one: Location, other: Location) -> str:
    """Write the message for two targets that lead to one module, where they mean different things."""
    if one.output != other.output and one.reads == other.reads == "site":
        return (
            f"{host!r} returns the sums of two streams, at {list(one.output or ())} and {list(other.output or ())} of its "
            "output, and an adapter sits at one; their branches are scaled before they are added, so that it cannot sit "
            f"there either. Exclude {path!r}, or use a preset that adapts the branches themselves, such as 'houlsby'"
        )
    return f"two targets lead to {host!r} (parallel branches have one sum); exclude {path!r} or target another"


def _role_outputs(search: _Search, excluded: Collection[str]) -> dict[str, ModuleOutput]:
    """Map the path of each module that a role names → which tensor of its output has that role.

    Raises:
        TargetError: a role would leave out part of the model in silence, or names two tensors of one module.
    """
    outputs: dict[str, ModuleOutput] = {}
    for role in filter(is_role, search.config.targets):
        if search.config.layers is None:  # who names layers leaves out others on purpose
            check_whole(role, search.discovery.anatomy, {*excluded})
        _check_layers(role, search, excluded)
        for found in role_places(role, search.discovery.anatomy):
            before = outputs.setdefault(found.path, found)
            if before.output != found.output and search.config.output is None:
                raise TargetError(
                    f"{role!r}: {found.path!r} yields two branches, at {before.output} and {found.output} of its output; "
                    f"an adapter can sit at one: set output={list(before.output)} for that one, or exclude={[found.path]}"
                )
    return outputs


def _check_layers(role: str, search: _Search, excluded: Collection[str]) -> None:
    """Raise TargetError where a role speaks of a product that no module returns, so that a hook there sees another tensor.

    Example: experts whose weights are one Parameter of three axes, which the module around them multiplies by.
    """
    inside = [
        product.weight or product.path
        for product in role_products(role, search.discovery.anatomy)
        if not product.is_output and projection_of(search.modules[product.path]) is None and product.path not in excluded
    ]
    if inside:
        raise TargetError(
            f"{role!r}: {inside[:4]} have no layer of their own: a module around them multiplies by these inside itself, "
            "where no hook sees the product. A method that changes weights can adapt them (such as 'lora'); else target "
            "the branch ('@feedforward.out'), or exclude the modules that hold them"
        )


def _location(path: str, role_output: ModuleOutput | None, search: _Search) -> Found:
    """Find the location that one target leads to.

    Args:
        path: The module that the target names.
        role_output: Which tensor of its output is meant, if a role named it.
    """
    if _is_at_sum(search.placement):
        return _at_sum(_sublayer_of(path, search), search)
    if role_output is not None:
        _check_added_as_returned(path, search)
    # What the config says comes before what the role says; () is the whole output.
    output = _as_path(search.config.output) or (role_output.output if role_output else ()) or None
    here = _at_module(path, output, search)
    # The trace knows the axis of the tensor that has the role. The config may name another tensor of the same module.
    is_as_traced = role_output is not None and output == (role_output.output or None)
    if role_output is not None and is_as_traced and here.location.at == "output":
        return here._replace(axis=role_output.axis)
    return here


def _check_added_as_returned(path: str, search: _Search) -> None:
    """Raise TargetError if a function normalises what a branch's module returns: then no hook sees what is added."""
    for sublayer in search.discovery.anatomy.sublayers:
        if sublayer.is_end_by_hand and sublayer.out is not None and sublayer.out.path == path:
            raise TargetError(
                f"what {path!r} returns is normalised by a function before it is added in {sublayer.addition[0]!r}, and no "
                "hook sees the result; name the module by its path to adapt it before that norm, or use a preset that sits "
                "after the addition, such as 'pfeiffer'"
            )


def _at_module(path: str, output: Path | None, search: _Search) -> Found:
    """Find the location at a target's own output or input."""
    placement, modules = search.placement, search.modules
    at_input = placement.at == "input"
    host = resolve_host(path, modules, at_input=at_input)
    argument = argument_of(modules[host], search.config.input)
    if placement.reads == "own_input":
        beside = resolve_host(path, modules, at_input=True)  # a Sequential's input is its first layer's
        return Found(Location(host, "output", "residual", output, argument, beside), reads_own_input=True)
    residual = None
    if placement.residual == STREAM:
        port = _sublayer_of(path, search).stream
        if port is None:
            raise TargetError(
                f"no module of its block takes the residual stream that enters {path!r} before it ends, so that an "
                "adapter could not read it; name another module's input with residual=, or use a sequential adapter"
            )
        residual, argument = port.path, port.argument
    elif placement.residual is not None:
        residual = _nearest(host, placement.residual, search)
    return Found(Location(host, placement.at, placement.reads, output, argument, residual))


def _at_sum(sublayer: Sublayer, search: _Search) -> Found:
    """Find the location after a sub-layer's sum s = x + r: in a post-norm block at its norm, else where s is returned.

    Where no module returns s, it is at the branch x, reading x + r, which is s.
    """
    norm, total = sublayer.post_norm, sublayer.sum
    _check_norm_can_run_again(sublayer)
    # LN(s) + f(LN(s))
    if norm is not None and search.placement.at == "normalised":
        return Found(Location(norm.path, "output", "site", norm.output or None, None, None), norm.axis)
    if norm is not None:
        return Found(Location(norm.path, "input", "norm", None, None, None))
    # s + f(s), where a module returns s.
    is_alone = total is not None and not _returns_another_sum(total, search)
    if total is not None and (is_alone or not _can_read_sum(sublayer)):
        host = resolve_host(total.path, search.modules, at_input=False)
        return Found(Location(host, "output", "site", total.output or None, None, None), total.axis)
    out, skip = sublayer.out, sublayer.skip
    if out is None or skip is None or not _can_read_sum(sublayer):
        raise TargetError(_no_place_for_sum(sublayer))
    # x + f(x + r) + r: what is added to the branch reaches the sum.
    host = resolve_host(out.path, search.modules, at_input=False)
    return Found(Location(host, "output", "sum", out.output or None, skip.argument, skip.path), out.axis)


def _returns_another_sum(total: ModuleOutput, search: _Search) -> bool:
    """Tell whether a module returns the sums of two streams, as a block of two streams does: one adapter sits at one."""
    last = (other.sum for other in search.discovery.anatomy.sublayers if other.is_last and other.sum is not None)
    return any(other.path == total.path and other.output != total.output for other in last)


def _can_read_sum(sublayer: Sublayer) -> bool:
    """Tell whether a branch is added as it is, by itself, to what some module takes: then an adapter there has the sum."""
    is_added = sublayer.out is not None and sublayer.skip is not None
    return is_added and not sublayer.scales and not sublayer.is_parallel


def _check_norm_can_run_again(sublayer: Sublayer) -> None:
    """Raise TargetError unless the norm after a sub-layer, if there is one, is a module of this sub-layer alone."""
    norm = sublayer.post_norm
    if norm is not None and sublayer.shares_norm:
        raise TargetError(
            f"the norm {norm.path!r} after the {sublayer.kind} runs on other tensors of its block, too, and an adapter "
            "there would change them all; use at='output' on a branch (such as '@feedforward.out'), or target '@block.out'"
        )
    if norm is None and sublayer.is_normalised_by_hand:
        raise TargetError(
            f"the norm after the {sublayer.kind} in {sublayer.addition[0]!r} is no module of that block, but a function, "
            "written by hand, or the next block's, so that no hook can run it again or adapt what it returns; use "
            "at='output' on a branch (such as '@feedforward.out')"
        )


def _no_place_for_sum(sublayer: Sublayer) -> str:
    """Write the message for a sum that no hook can reach."""
    scaled = "is scaled before it is added" if sublayer.scales else "is one of two that are added at once"
    is_branch = sublayer.out is not None and sublayer.skip is not None
    reason = f"the branch {scaled}" if is_branch else "no module takes or yields what it is the sum of"
    return (
        f"the sum after the {sublayer.kind} in {sublayer.addition[0]!r} can be adapted nowhere: no module returns it, and "
        f"{reason}; use at='output' there, or target '@block.out'"
    )


def _sublayer_of(path: str, search: _Search) -> Sublayer:
    """Find the residual sub-layer whose branch a module yields, or whose last projection it is."""
    anatomy = search.discovery.anatomy
    every = (*anatomy.sublayers, *anatomy.others)
    for sublayer in every:
        out = sublayer.out
        if out is not None and path in (out.path, resolve_host(out.path, search.modules, at_input=False)):
            return sublayer
    # After all of them: a last projection may itself yield the branch of another sub-layer.
    for sublayer in every:
        if path in sublayer.last:
            return sublayer
    raise TargetError(
        f"{path!r} yields no branch of a residual addition; target a role such as '@feedforward.out', or the module whose "
        "output is added"
    )


def _nearest(path: str, pattern: str, search: _Search) -> str:
    """Return the module that a pattern names nearest to the host at `path`."""
    # e.g. "norm" matches one module in each block: the one in the block of this host is meant.
    near = nearest_to(path, match(search.model, [pattern]))
    if len(near) != 1:
        raise TargetError(f"residual={pattern!r} names {near} for the site {path!r}; make it name one near that site")
    return resolve_host(near[0], search.modules, at_input=True)


def argument_of(host: nn.Module, which: int | str | None) -> Argument | None:
    """Return an argument of the host as (position, keyword), both as far as its signature tells.

    Args:
        which: The argument, by position or keyword; None for none.
    """
    if which is None:
        return None
    try:
        # Of the bound method, so without `self`: position 0 is the first argument.
        names = list(inspect.signature(host.forward).parameters)
    except ValueError:  # built in, without a signature: the position, or the keyword, has to do
        names = []
    if isinstance(which, int):
        return which, names[which] if which < len(names) else None
    return names.index(which) if which in names else None, which


def _as_path(output: int | str | Sequence[int | str] | None) -> Path | None:
    """Return the setting `output` as a path into what a module returns."""
    if output is None:
        return None
    return (output,) if isinstance(output, (int, str)) else tuple(output)
