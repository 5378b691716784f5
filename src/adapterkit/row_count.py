"""Whether the rows that are divided at a place can be those of the batch that the model was called with.

A place may have other rows, such as the tokens of all sequences (batch * seq) or those that an expert sees. In eager mode a
hook on the model keeps the sizes of its call while it runs, if rows run different adapters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CompatibilityError
from .hooks import KitHook, has_hook, remove_hooks, set_hook
from .record import RECORD, Record

__all__ = ["check_count", "set_counting"]


class _Thread(threading.local):
    """The sizes of the calls that this thread is in, by the `id` of the model's record; the innermost last."""

    def __init__(self) -> None:
        self.sizes: dict[int, list[frozenset[int]]] = {}


_thread = _Thread()


class CountHook(KitHook):
    """Keep the sizes of the model's call."""

    is_pre = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Leave the call alone. Shape: any."""
        if not torch.compiler.is_compiling():
            sizes = frozenset(size for value in (*args, *kwargs.values()) for size in _sizes_in(value))
            _thread.sizes.setdefault(id(module.__dict__[RECORD]), []).append(sizes)


class CountEndHook(KitHook):
    """Forget them, after an exception, too."""

    always = True

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Leave the output alone. Shape: any."""
        key = id(module.__dict__[RECORD])
        calls = [] if torch.compiler.is_compiling() else _thread.sizes.get(key, [])
        if calls:
            calls.pop()
        if not calls:
            _thread.sizes.pop(key, None)


def check_count(record: Record, path: str, tensor: Tensor, axis: int) -> None:
    """Raise CompatibilityError if the model runs, and was called with nothing of the size of this axis."""
    if torch.compiler.is_compiling():
        return
    calls = _thread.sizes.get(id(record))
    if calls and calls[-1] and tensor.shape[axis] not in calls[-1]:
        raise CompatibilityError(
            f"{path!r} has a tensor of shape {tuple(tensor.shape)}, with {tensor.shape[axis]} rows on axis {axis}, and the "
            f"model was called with sizes {sorted(calls[-1])}: that is not the batch whose rows are divided. Leave this "
            "place out with exclude="
        )


def set_counting(model: nn.Module, record: Record, wanted: bool) -> None:
    """Have these hooks or not. What is compiled runs without them, so that it need not be made anew."""
    if wanted == has_hook(model, CountHook):
        return
    for kind in (CountHook, CountEndHook):
        if wanted:
            set_hook(model, kind, True, record)
        else:
            remove_hooks(model, kind)


def _sizes_in(value: Any) -> Iterator[int]:
    """The sizes of what may be rows: the first two axes of tensors, the lengths of lists."""
    if isinstance(value, Tensor):
        yield from value.shape[:2]
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for item in value:
            yield from _sizes_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _sizes_in(item)
