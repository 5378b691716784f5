"""Modules of one kind, each on its own rows, as one computation over their stacked weights.

`torch.vmap` runs one module's step over a batch of tensors: those of all the modules, stacked, one for each row. Any module
can be run so, without a formula of its own for rows; and nine adapters are as many kernels as one.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.shared import SHARED, borrowed
from ..site import AdapterSite
from ..steps import AddsToTensor, View, plus

__all__ = ["run_each", "stacking_key"]

# Attributes that say nothing of what a module computes. What is shared is looked at as a module below it. `training`
# counts: it decides whether dropout acts.
_OF_EVERY_MODULE = (frozenset(vars(nn.Module())) | {SHARED}) - {"training"}


def run_each(site: AdapterSite, host: nn.Module, view: View, at: Sequence[tuple[int, AddsToTensor, int]]) -> Tensor:
    """Return the tensor x with each of the rows `at` changed by its module. Shape: as `view.x`.

    Args:
        at: Rows, each with its step and the number of its `stacking_key`.
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
    """Return what `run_each` does, for modules that differ in their tensors alone: one step for each row of the view."""
    step, axis = steps[0], view.axis
    modules = {step.key: site.get_submodule(step.key) for step in steps}
    module = modules[step.key]
    if len(modules) == 1:
        return plus(view.x, step.delta(module, host, view))
    # One slice of each stacked tensor for each row: an adapter of several rows is there several times.
    own = {key: _tensors(module) for key, module in modules.items()}
    stacked = {name: torch.stack([own[step.key][name] for step in steps]) for name in own[step.key]}

    def run(tensors: Mapping[str, Tensor], x: Tensor, bare: Tensor, taken: Tensor | None, stream: Tensor | None) -> Tensor:
        streams = {} if stream is None else {step.key: stream}
        return plus(x, step.delta(_with_tensors(module, tensors), host, View(x, bare, taken, streams, axis)))

    # Rows become an axis of their own, (rows, indices of one row) or in turn the other way round, which vmap takes away:
    # inside `run` a row's tensor has as many axes as the whole, so that an axis that is counted from the front stays right.
    sizes, at = (view.row_count, view.per_row), axis
    if view.in_turn:
        sizes, at = (view.per_row, view.row_count), axis + 1
    by_row = view.map(lambda tensor: tensor.unflatten(axis, sizes))  # type: ignore[no-untyped-call]  # torch's
    given = (by_row.x, by_row.bare, by_row.taken, by_row.streams.get(step.key))  # modules of one kind read one stream
    axes = (0, *(None if tensor is None else at for tensor in given))
    # "different": each row draws its own dropout, as it would in a run of its own.
    changed: Tensor = torch.vmap(run, in_dims=axes, out_dims=at, randomness="different")(stacked, *given)
    return changed.flatten(axis, axis + 1)


def stacking_key(step: AddsToTensor, module: nn.Module) -> Hashable:
    """Return a value that is equal for two modules that differ in the values of their tensors alone.

    Those compute the same function of their tensors, so that one computation over stacked tensors runs both.
    """
    spec = step.spec
    shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(_tensors(module).items()))
    reads = (spec.reads, spec.input, spec.residual, spec.input_width)
    acts = (type(step), spec.at, spec.axis, spec.output, spec.width, *reads)
    return acts, type(module), shapes, _settings(module)


def _settings(thing: Any) -> Hashable:
    """Return an object's attributes as one hashable value, without those that every module has."""
    if isinstance(thing, (list, tuple)):
        return tuple(map(_settings, thing))
    if isinstance(thing, Mapping):
        return tuple(sorted((str(key), _settings(value)) for key, value in thing.items()))
    # A function is compared as itself: two adapters with "relu" hold the same one, and a closure is equal to no other.
    is_function = callable(thing) and not isinstance(thing, nn.Module)
    if is_function or isinstance(thing, (str, int, float, bool, type(None), torch.dtype)):
        return thing  # type: ignore[no-any-return]  # hashable, all of them
    if isinstance(thing, Tensor) or not hasattr(thing, "__dict__"):
        return type(thing), id(thing)  # equal to nothing else: what it is to the module is not known
    held = {name: value for name, value in vars(thing).items() if name not in _OF_EVERY_MODULE}
    below = _below_of(thing) if isinstance(thing, nn.Module) else {}
    return type(thing), _settings(held), _settings(below)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Map the names of a module's tensors to them; those that it shares with others of its adapter start with "shared."."""
    found: dict[str, Tensor] = {
        name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None
    }
    for name, child in _below_of(module).items():
        found |= {f"{name}.{below}": tensor for below, tensor in _tensors(child).items()}
    return found


def _below_of(module: nn.Module) -> dict[str, nn.Module]:
    """Map names to a module's children, and "shared" to what it shares with others of its adapter, whoever holds it."""
    # The first module of an adapter has what is shared for a child, and saves it. The others borrow it.
    shared = borrowed(module)
    children = {name: child for name, child in module._modules.items() if child is not None}
    return children if shared is None else {**children, SHARED: shared}


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow copy of a module that computes with other tensors; all else it shares with the module.

    A copy, since other threads may run the module itself at this moment: they would compute with what was put there, as
    `torch.func.functional_call` does.
    """
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
    """Return the tensors of the child `name`, by their names in it."""
    start = f"{name}."
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
