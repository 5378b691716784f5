"""Keep what a forward may change outside of its model: random state, and torch's settings."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

__all__ = ["generator_state", "not_compiled", "surroundings_kept"]

_LOOKING = threading.Lock()
_looks: list[Any] = []  # of those who look at a model just now, the first one's stance of the compiler


@contextmanager
def surroundings_kept() -> Iterator[None]:
    """Put Python's and numpy's random state back after a block, and torch's settings; not torch's random state."""
    restoring = [_drawn_by_python(), *_drawn_by_numpy(), *_settings()]
    try:
        yield
    finally:
        for restore in restoring:
            restore()


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled modules as they are written in a block: a hook that is new would not be in what was compiled before.

    The stance is one for all threads. So the first that enters sets it, and the last that leaves puts it back.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing was compiled, and loading the compiler takes a second
        yield
        return
    with _LOOKING:
        _looks.append(None if _looks else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _LOOKING:
            stance = _looks[0]
            _looks.pop()
            if not _looks:
                stance.__exit__(None, None, None)


def generator_state(value: Any) -> Callable[[], object] | None:
    """Return a function that puts the state of a random generator back; None for a value that is none."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        python_state = value.getstate()
        return lambda: value.setstate(python_state)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None and isinstance(value, numpy_random.Generator):
        bits, numpy_state = value.bit_generator, value.bit_generator.state
        return lambda: setattr(bits, "state", numpy_state)
    return None


def _drawn_by_python() -> Callable[[], object]:
    state = random.getstate()
    return lambda: random.setstate(state)


def _drawn_by_numpy() -> Iterator[Callable[[], object]]:
    numpy_random = sys.modules.get("numpy.random")  # where it is loaded
    if numpy_random is not None:
        state = numpy_random.get_state()
        yield lambda: numpy_random.set_state(state)


def _settings() -> Iterator[Callable[[], object]]:
    """Yield for each of torch's settings a function that puts it back."""
    cudnn = torch.backends.cudnn
    for name in ("enabled", "benchmark", "deterministic"):
        yield _restoring(partial(getattr, cudnn, name), partial(setattr, cudnn, name))
    yield _restoring(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    yield _restoring(torch.get_default_dtype, torch.set_default_dtype)
    yield _restoring(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode)
    for device in ("cpu", "cuda"):
        yield _restoring(partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device))
        yield _restoring(partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device))


def _restoring(read: Callable[[], Any], write: Callable[[Any], object]) -> Callable[[], None]:
    """Return a function that gives a setting the value that it has now. What did not change is not written."""
    before = read()

    def restore() -> None:
        if read() != before:
            write(before)

    return restore
