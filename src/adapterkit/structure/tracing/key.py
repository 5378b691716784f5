"""A key for what decides which operations a forward runs: models with the same key have the same anatomy."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..hosts import table_version
from ..paths import modules_by_path

__all__ = ["structure_key"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple, list, dict, set, frozenset)
_LONGEST = 10_000  # characters of one value that count
_TORCHS = frozenset(vars(nn.Module()))  # attributes of every module: its mode, tensors, children, hooks


def structure_key(model: nn.Module, inputs: Any) -> str:
    """A hash over types and their code, which modules and tensors are shared, shapes, plain attributes, configs, inputs."""
    digest = hashlib.sha256(f"{table_version()}".encode())  # a layer described since then may be seen otherwise
    places: dict[int, int] = {}  # of each module and tensor: where it was first met
    types: dict[type, str] = {}
    for path, module in modules_by_path(model).items():
        kind = type(module)
        if kind not in types:
            types[kind] = _hash_of_type(kind)
        digest.update(f"\n{path} {types[kind]} {places.setdefault(id(module), len(places))}".encode())
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                place = places.setdefault(id(tensor), len(places))
                digest.update(f" {name} {tuple(tensor.shape)} {tensor.dtype} {tensor.is_meta} {place}".encode())
        for line in _settings(module, set()):
            digest.update(line.encode())
    for line in _inputs(inputs):
        digest.update(line.encode())
    return digest.hexdigest()


def _inputs(value: Any, where: str = "") -> Iterator[str]:
    """Shapes of tensors and values of all else."""
    if isinstance(value, Tensor):
        yield f"\n{where} {tuple(value.shape)} {value.dtype}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inputs(item, f"{where}.{key}")
    elif isinstance(value, (tuple, list)):
        yield f"\n{where} {type(value).__qualname__}"
        for index, item in enumerate(value):
            yield from _inputs(item, f"{where}.{index}")
    elif isinstance(value, _PLAIN):
        yield f"\n{where} {value!r}"
    else:
        yield f"\n{where} {type(value).__qualname__}"
        yield from _settings(value, set())


def _settings(holder: Any, seen: set[int]) -> Iterator[str]:
    """The plain attributes of an object, and of objects in them (a config), as text; of functions, their code."""
    seen.add(id(holder))
    for name, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
        if name in _TORCHS or name.startswith("_adapterkit"):
            continue
        if isinstance(value, _PLAIN):
            yield f" {name}={value!r}"[:_LONGEST]
        elif function := list(_function(value, set())):
            yield f" {name}:"
            yield from function
        elif callable(value):
            kind = value if isinstance(value, type) else type(value)
            yield f" {name}:{getattr(value, '__qualname__', kind.__qualname__)}:{_hash_of_type(kind)}:{id(value)}"
        elif isinstance(value, Mapping):
            yield from _inputs(value, name)
        elif id(value) not in seen and not isinstance(value, (Tensor, nn.Module)):
            yield f" {name}:{type(value).__qualname__}"
            yield from _settings(value, seen)


def _hash_of_type(kind: type) -> str:
    """A hash over the names, functions and plain attributes of a class and its bases.

    Not over its identity: methods may be replaced, and a new class may come to lie where a forgotten one lay.
    """
    digest = hashlib.sha256()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        digest.update(f"\n{base.__module__}.{base.__qualname__}".encode())
        for name, value in vars(base).items():
            if name.startswith("__") and name != "__call__":
                continue
            lines = [f"={value!r}"[:_LONGEST]] if isinstance(value, _PLAIN) else _function(value, set())
            digest.update("".join((f"\n{name} ", *lines)).encode())
    return digest.hexdigest()


def _function(value: Any, seen: set[int]) -> Iterator[str]:
    """The code of a function, or of those inside a method, property, partial or wrapper; nothing for anything else."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        yield from _function(value.__func__, seen)
    elif isinstance(value, (property, functools.cached_property)):
        for part in (value.fget, value.fset) if isinstance(value, property) else (value.func,):
            yield from _function(part, seen)
    elif isinstance(value, (functools.partial, functools.partialmethod)):
        yield from _function(value.func, seen)
        yield from (f" {part!r}"[:_LONGEST] for part in (value.args, value.keywords))
    elif isinstance(value, FunctionType):
        yield from _code(value.__code__)
        for name in _names(value.__code__):  # what it calls beside its class's methods
            part = value.__globals__.get(name)
            if isinstance(part, FunctionType) and not part.__module__.startswith("torch."):
                yield from _function(part, seen)
            elif isinstance(part, (bool, int, float, str)):
                yield f" {name}={part!r}"[:_LONGEST]
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        for part in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *held):
            if isinstance(part, _PLAIN):
                yield f" {part!r}"[:_LONGEST]
            else:
                yield f" {getattr(part, '__qualname__', type(part).__qualname__)}"
                yield from _function(part, seen)


def _code(code: CodeType) -> Iterator[str]:
    """All that a code object does. Its own hash would take the constants -1 and -2 for the same."""
    yield f" {code.co_name} {code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield f" {constant!r}"


def _names(code: CodeType) -> Iterator[str]:
    """The names that a code object, or one in it, looks up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a cell that nothing was put into yet
        return False
