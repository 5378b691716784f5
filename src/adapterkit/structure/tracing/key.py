"""Make a key of what decides which operations a forward runs: models with the same key have the same anatomy.

Tracing takes a forward, and a model is often wrapped again with other weights. So everything counts that may change the
*operations*: code, shapes, settings, which tensors are shared. The values of parameters do not.

The danger is a key that is too coarse: it gives one model another's roles. Where it is in doubt, a value counts.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..hosts import table_version
from ..paths import modules_by_path
from .tensors import shape_of

__all__ = ["structure_key"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple, list, dict, set, frozenset)
_LONGEST = 10_000  # characters of one value that count
_TORCHS = frozenset(vars(nn.Module()))  # attributes of every module: its mode, tensors, children, hooks


def structure_key(model: nn.Module, inputs: Any) -> str:
    """Return a hash over types and their code, shared modules and tensors, shapes, attributes, configs and inputs."""
    digest = hashlib.sha256(f"{table_version()}".encode())  # a layer described since then may be seen otherwise
    first_met: dict[
        int, int
    ] = {}  # id of a module or tensor -> its number, in the order of meeting: tells which are shared
    types: dict[type, str] = {}
    for path, module in modules_by_path(model).items():
        kind = type(module)
        if kind not in types:
            types[kind] = _hash_of_type(kind)
        digest.update(f"\n{path} {types[kind]} {first_met.setdefault(id(module), len(first_met))}".encode())
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                number = first_met.setdefault(id(tensor), len(first_met))
                digest.update(f" {name} {shape_of(tensor)} {tensor.dtype} {tensor.is_meta} {number}".encode())
        for line in _settings(module, set()):
            digest.update(line.encode())
    for line in _inputs(inputs):
        digest.update(line.encode())
    return digest.hexdigest()


def _inputs(value: Any, where: str = "") -> Iterator[str]:
    """Yield the shapes of the tensors in a value, and all else in it as text."""
    if isinstance(value, Tensor):
        yield f"\n{where} {shape_of(value)} {value.dtype}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inputs(item, f"{where}.{key}")
    elif isinstance(value, (tuple, list)):
        yield f"\n{where} {type(value).__qualname__}"
        for index, item in enumerate(value):
            yield from _inputs(item, f"{where}.{index}")
    elif isinstance(value, _PLAIN):
        yield f"\n{where} {_text(value)}"
    else:
        yield f"\n{where} {type(value).__qualname__}"
        yield from _settings(value, set())


def _settings(holder: Any, seen: set[int]) -> Iterator[str]:
    """Yield the plain attributes of an object, and of objects in them (a config), as text; of functions, their code.

    Args:
        seen: The `id`s of objects that were gone through: they may lead back to one another.
    """
    seen.add(id(holder))
    for name, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
        if name in _TORCHS or name.startswith("_adapterkit"):
            continue
        if isinstance(value, _PLAIN):
            yield f" {name}={_text(value)}"[:_LONGEST]
        elif function := list(_function(value, set())):
            yield f" {name}:"
            yield from function
        elif callable(value):
            kind = value if isinstance(value, type) else type(value)
            # Two callables of one class may differ in what cannot be read here, so their identity counts.
            yield f" {name}:{getattr(value, '__qualname__', kind.__qualname__)}:{_hash_of_type(kind)}:{id(value)}"
        elif isinstance(value, Mapping):
            yield from _inputs(value, name)
        elif id(value) not in seen and not isinstance(value, (Tensor, nn.Module)):
            yield f" {name}:{type(value).__qualname__}"
            yield from _settings(value, seen)


def _text(value: Any) -> str:
    """Return a value as text; one that cannot be written, or holds such a one, is equal to no other."""
    try:
        return repr(value)
    except Exception:  # somebody else's class may raise anything
        return f"{type(value).__qualname__} {id(value)}"


def _hash_of_type(kind: type) -> str:
    """Return a hash over the names, functions and plain attributes of a class and its bases.

    Not over its identity: methods may be replaced, and a new class may come to lie where a forgotten one lay.
    """
    digest, seen = hashlib.sha256(), set[int]()  # what several methods call is written once
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        digest.update(f"\n{base.__module__}.{base.__qualname__}".encode())
        for name, value in vars(base).items():
            if name.startswith("__") and name != "__call__":
                continue
            lines = [f"={_text(value)}"[:_LONGEST]] if isinstance(value, _PLAIN) else _function(value, seen)
            digest.update("".join((f"\n{name} ", *lines)).encode())
    return digest.hexdigest()


def _function(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield the code of a function, or of those inside a method, property or partial; nothing for any other value."""
    if id(value) in seen:
        yield f" {getattr(value, '__qualname__', '')} again"
        return
    seen.add(id(value))
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        yield from _function(value.__func__, seen)
    elif isinstance(value, (property, functools.cached_property)):
        for function in (value.fget, value.fset) if isinstance(value, property) else (value.func,):
            yield from _function(function, seen)
    elif isinstance(value, (functools.partial, functools.partialmethod)):
        yield from _function(value.func, seen)
        yield from (f" {_text(given)}"[:_LONGEST] for given in (value.args, value.keywords))
    elif isinstance(value, FunctionType):
        yield from _code(value.__code__)
        yield from _globals(value, seen)
        yield from _held(value, seen)


def _globals(function: FunctionType, seen: set[int]) -> Iterator[str]:
    """Yield the functions and settings of its file that a function names: what it calls beside its class's methods."""
    for name in _names(function.__code__):
        value = function.__globals__.get(name)  # most names are attributes, and no globals: those are not in question here
        if isinstance(value, FunctionType) and not str(value.__module__).startswith("torch."):
            yield from _function(value, seen)
        elif isinstance(value, (bool, int, float, str)):
            yield f" {name}={_text(value)}"[:_LONGEST]


def _held(function: FunctionType, seen: set[int]) -> Iterator[str]:
    """Yield what a function carries with it: its defaults, and what it closes over."""
    closed_over = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *closed_over):
        if isinstance(value, _PLAIN):
            yield f" {_text(value)}"[:_LONGEST]
        else:
            yield f" {getattr(value, '__qualname__', type(value).__qualname__)}"
            yield from _function(value, seen)


def _code(code: CodeType) -> Iterator[str]:
    """Yield all that a code object does. Its own hash would take the constants -1 and -2 for the same."""
    yield f" {code.co_name} {code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield f" {constant!r}"


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a code object, or one in it, looks up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    """Tell whether a variable that a function closes over has a value: asking one that has none raises."""
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a cell that nothing was put into yet
        return False
