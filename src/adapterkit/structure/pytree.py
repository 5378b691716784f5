"""Find a tensor inside what a module takes or returns, and put another in its place, out of place.

A module may return a tensor, a tuple, a named tuple, a list, a mapping, a dataclass (Hugging Face's ModelOutput is both
of the last two) or any nesting of these. A `Path` is the list of keys that leads to one tensor inside; `()` is the value
itself.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Argument", "Path", "argument_path", "find", "get", "keys", "put", "tensors"]

Path = tuple[int | str, ...]
Argument = tuple[int | None, str | None]  # of a call: its position and its keyword


def find(value: Any) -> Path | None:
    """The path of the first floating-point tensor, depth first; None if there is none."""
    if isinstance(value, Tensor):
        return () if value.is_floating_point() else None
    for key, item in _items(value):
        below = find(item)
        if below is not None:
            return (key, *below)
    return None


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor with its path, depth first."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, item in _items(value):
        yield from tensors(item, (*path, key))


def keys(value: Any) -> list[int | str]:
    """The keys of its parts, in order: a part may be given by its position among them, too."""
    return [key for key, _ in _items(value)]


def get(value: Any, path: Path) -> Any:
    """What lies at the path.

    Raises:
        LookupError: nothing lies there.
    """
    for key in path:
        value = dict(_items(value))[_name_of(value, key)]
    return value


def put(value: Any, path: Path, tensor: Tensor) -> Any:
    """A copy of the value, of the same type, with the tensor at the path."""
    if not path:
        return tensor
    key, rest = _name_of(value, path[0]), path[1:]
    new = put(dict(_items(value))[key], rest, tensor)
    if isinstance(value, tuple):
        items = [new if name == key else item for name, item in _items(value)]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if dataclasses.is_dataclass(value):
        if all(f.init for f in dataclasses.fields(value)):
            return dataclasses.replace(value, **{str(key): new})  # type: ignore[type-var]  # a dataclass, as tested above
        changed = copy.copy(value)  # `replace` would lose what `__init__` does not take
        object.__setattr__(changed, str(key), new)
        return changed
    # Exact lists and dicts are spelled out, for torch.compile does not know how to copy them.
    if type(value) is list:
        return [new if i == key else item for i, item in enumerate(value)]
    if type(value) is dict:
        return {**value, key: new}
    changed = copy.copy(value)
    changed[key] = new
    return changed


def argument_path(call: tuple[Any, ...], argument: Argument) -> Path:
    """Where `(args, kwargs)` hold the argument with this position and keyword.

    Raises:
        LookupError: the call does not have it.
    """
    position, keyword = argument
    if keyword is not None and keyword in call[1]:
        return (1, keyword)
    if position is not None and position < len(call[0]):
        return (0, position)
    raise LookupError(keyword if keyword is not None else position)


def _name_of(value: Any, key: int | str) -> int | str:
    """The key of a part that may be given by its position, too, as named tuples and ModelOutputs allow."""
    names = keys(value)
    return names[key] if isinstance(key, int) and key not in names else key


def _items(value: Any) -> Iterator[tuple[int | str, Any]]:
    """The parts of a container with their keys; nothing for any other value."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        yield from value.items()
