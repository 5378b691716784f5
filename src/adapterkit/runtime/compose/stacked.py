"""Modules of one kind, each on its own rows, as one computation over their stacked weights."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.shared import SHARED, borrowed
from ..site import AdapterSite
from ..steps import AddsToTensor, View, plus

__all__ = ["kind_of", "run_each"]

_OF_EVERY_MODULE = (frozenset(vars(nn.Module())) | {SHARED}) - {"training"}


def run_each(site: AdapterSite, host: nn.Module, view: View, at: Sequence[tuple[int, AddsToTensor, int]]) -> Tensor:
    """The tensor x with each of these rows changed by its module. Shape: as `view.x`.

    Args:
        at: Rows, each with its step and a number for what `kind_of` says of it.
    """
    groups: dict[int | str, list[tuple[int, AddsToTensor]]] = {}
    for row, step, kind in at:
        # A compiler follows no shallow copies of modules: there each adapter is a group, and one call, of its own.
        group = step.key if torch.compiler.is_compiling() else kind
        groups.setdefault(group, []).append((row, step))
    result = view
    for members in groups.values():
        rows = [row for row, _ in members]
        where = None if rows == list(range(view.row_count)) else view.indices(rows)
        part = view if where is None else view.select(where)
        changed = _run_group(site, host, part, [step for _, step in members])
        result = result._replace(x=changed if where is None else result.put(where, changed))
    return result.x


def _run_group(site: AdapterSite, host: nn.Module, view: View, steps: Sequence[AddsToTensor]) -> Tensor:
    """`run_each` of modules that differ in their tensors alone, one for each row of the view."""
    step, axis = steps[0], view.axis
    modules = {step.key: site.get_submodule(step.key) for step in steps}
    module = modules[step.key]
    if len(modules) == 1:
        return plus(view.x, step.delta(module, host, view))
    own = {key: _tensors(module) for key, module in modules.items()}
    stacked = {name: torch.stack([own[step.key][name] for step in steps]) for name in own[step.key]}

    def run(tensors: Mapping[str, Tensor], x: Tensor, bare: Tensor, taken: Tensor | None, stream: Tensor | None) -> Tensor:
        streams = {} if stream is None else {step.key: stream}
        return plus(x, step.delta(_with_tensors(module, tensors), host, View(x, bare, taken, streams, axis)))

    by_row = view.map(lambda tensor: tensor.unflatten(axis, (view.row_count, view.per_row)))  # type: ignore[no-untyped-call]  # torch's
    given = (by_row.x, by_row.bare, by_row.taken, by_row.streams.get(step.key))  # modules of one kind read one stream
    axes = (0, *(None if tensor is None else axis for tensor in given))
    changed: Tensor = torch.vmap(run, in_dims=axes, out_dims=axis, randomness="different")(stacked, *given)
    return changed.flatten(axis, axis + 1)


def kind_of(step: AddsToTensor, module: nn.Module) -> Hashable:
    """What two modules have in common that differ in the values of their tensors alone."""
    spec = step.spec
    shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(_tensors(module).items()))
    reads = (spec.reads, spec.input, spec.residual, spec.input_width)
    place = (type(step), spec.at, spec.axis, spec.output, spec.width, *reads)
    return place, type(module), shapes, _settings(module)


def _settings(thing: Any) -> Hashable:
    """An object's attributes as one hashable value, but for those that every module has."""
    if isinstance(thing, (list, tuple)):
        return tuple(map(_settings, thing))
    if isinstance(thing, Mapping):
        return tuple(sorted((str(key), _settings(value)) for key, value in thing.items()))
    is_function = callable(thing) and not isinstance(thing, nn.Module)
    if is_function or isinstance(thing, (str, int, float, bool, type(None), torch.dtype)):
        return thing  # type: ignore[no-any-return]  # hashable, all of them
    if isinstance(thing, Tensor) or not hasattr(thing, "__dict__"):
        return type(thing), id(thing)  # a kind of its own: nothing is known of it
    held = {name: value for name, value in vars(thing).items() if name not in _OF_EVERY_MODULE}
    below = _below_of(thing) if isinstance(thing, nn.Module) else {}
    return type(thing), _settings(held), _settings(below)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by name; those that it shares with others of its adapter under "shared."."""
    found: dict[str, Tensor] = {
        name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None
    }
    for name, child in _below_of(module).items():
        found |= {f"{name}.{below}": tensor for below, tensor in _tensors(child).items()}
    return found


def _below_of(module: nn.Module) -> dict[str, nn.Module]:
    """A module's children, and what it shares with others of its adapter, whether it holds that or another does."""
    shared = borrowed(module)
    children = {name: child for name, child in module._modules.items() if child is not None}
    return children if shared is None else {**children, SHARED: shared}


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy of a module that computes with other tensors: swapped in the module, other threads would see them."""
    clone = copy.copy(module)
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    clone.__dict__["_parameters"] = {name: own.get(name) for name in module._parameters}
    clone.__dict__["_buffers"] = {name: own.get(name) for name in module._buffers}
    clone.__dict__["_modules"] = {name: _with_tensors(m, _below(name, tensors)) for name, m in module._modules.items() if m}
    shared = borrowed(module)
    if shared is not None:
        clone.__dict__[SHARED] = _with_tensors(shared, _below(SHARED, tensors))
    return clone


def _below(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{name}."
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
