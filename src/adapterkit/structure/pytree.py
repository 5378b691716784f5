"""Find a tensor inside what a module takes or returns, and put another in its place, out of place.

A module may return a tensor, a tuple, a named tuple, a list, a mapping, a dataclass (Hugging Face's ModelOutput is both
of the last two) or any nesting of these. A `Path` is the list of keys that leads to one tensor inside; `()` is the value
itself.

    value = (hidden, {"cache": past})      find(value) == (0,)      get(value, (1, "cache")) is past

These are ours, and not `torch.utils._pytree`'s, since that does not know a dataclass unless it was registered.
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
    """Return the path of the first floating-point tensor of any axes, depth first; None if there is none.

    A number, such as a loss that a module returns before its features, has none.
    """
    if isinstance(value, Tensor):
        return () if value.is_floating_point() and value.dim() else None
    for key, item in _items(value):
        below = find(item)
        if below is not None:
            return (key, *below)
    return None


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield every tensor with its path, depth first."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, item in _items(value):
        yield from tensors(item, (*path, key))


def keys(value: Any) -> list[int | str]:
    """Return the keys of a container's items, in order. In a `Path` the position among them may stand for a key."""
    return [key for key, _ in _items(value)]


def get(value: Any, path: Path) -> Any:
    """Return what lies at the path.

    Raises:
        LookupError: nothing lies there.
    """
    for key in path:
        value = dict(_items(value))[_name_of(value, key)]
    return value


def put(value: Any, path: Path, tensor: Any) -> Any:
    """Return a copy of the value, of the same type, with a tensor (or another) at the path. The value is not changed."""
    if not path:
        return tensor
    key, rest = _name_of(value, path[0]), path[1:]
    return _with_item(value, key, put(dict(_items(value))[key], rest, tensor))


def argument_path(call: tuple[Any, ...], argument: Argument) -> Path:
    """Return where `(args, kwargs)` hold the argument with this position and keyword.

    Raises:
        LookupError: the call does not have it.
    """
    position, keyword = argument
    if keyword is not None and keyword in call[1]:
        return (1, keyword)
    if position is not None and position < len(call[0]):
        return (0, position)
    raise LookupError(keyword if keyword is not None else position)


def _with_item(value: Any, key: int | str, new: Any) -> Any:
    """Return a copy of a container, of the same type, with another item at a key."""
    if isinstance(value, tuple):
        items = [new if name == key else item for name, item in _items(value)]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)  # named tuples take items one by one
    if dataclasses.is_dataclass(value):
        return _with_field(value, str(key), new)
    # Exact lists and dicts are spelled out, for torch.compile does not know how to copy them.
    if type(value) is list:
        return [new if i == key else item for i, item in enumerate(value)]
    if type(value) is dict:
        return {**value, key: new}
    changed = copy.copy(value)
    changed[key] = new
    return changed


def _with_field(value: Any, name: str, new: Any) -> Any:
    """Return a copy of a dataclass with another value in a field."""
    if all(field.init for field in dataclasses.fields(value)):
        return dataclasses.replace(value, **{name: new})
    changed = copy.copy(value)  # `replace` would lose what `__init__` does not take
    object.__setattr__(changed, name, new)  # a frozen one, too
    return changed


def _name_of(value: Any, key: int | str) -> int | str:
    """Return the key that a key or a position stands for: named tuples and ModelOutputs allow both."""
    names = keys(value)
    return names[key] if isinstance(key, int) and key not in names else key


def _items(value: Any) -> Iterator[tuple[int | str, Any]]:
    """Yield the items of a container with their keys; nothing for any other value."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    # Before mappings: a ModelOutput is both, and as a mapping it leaves out the fields that are None.
    elif dataclasses.is_dataclass(value):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        yield from value.items()
