"""The numbers that compositions are given, checked: sizes of parts, weights of children, layers."""

import operator
from collections.abc import Sequence
from typing import Any

from ..errors import CompatibilityError, ConfigError

__all__ = ["as_layers", "as_sizes", "numbers_for", "sizes_of"]


def numbers_for(values: Any, what: str, count: int) -> Sequence[Any]:
    """Return `values` as a list if it has one number for each of `count` children.

    Raises:
        ConfigError: it does not; `what` is its name in the message.
    """
    try:
        found = list(values)
        # True and False are numbers to Python; where someone wrote one, they meant something else.
        is_right = len(found) == count and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found)
    except TypeError:  # `values` is no list at all
        is_right = False
    if not is_right:
        raise ConfigError(f"{what} has one number for each of the {count} children; found {values!r}")
    return found


def as_sizes(sizes: Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """Return the sizes of `count` parts, checked; None, which means equal parts, stays None.

    Raises:
        ConfigError: not a whole number for each part, or a negative one.
    """
    if sizes is None:
        return None
    found = tuple(numbers_for(sizes, "sizes", count))
    # 0 is allowed: a part may be empty.
    if not all(isinstance(size, int) and size >= 0 for size in found):
        raise ConfigError(f"sizes are whole numbers, none negative; found {list(found)}")
    return found


def as_layers(layers: Any) -> tuple[int, ...]:
    """Return the layers sorted, each once, so that compositions that drop the same layers are equal.

    Raises:
        ConfigError: not a list of whole numbers, or a range.
    """
    # [None]: fails the check below, which has the message.
    given: list[Any] = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [None]
    # `__index__`, not `int`: whole numbers of numpy and torch are welcome, 1.0 is not.
    if not all(hasattr(layer, "__index__") and not isinstance(layer, bool) for layer in given):
        raise ConfigError(f"layers is a list of whole numbers, or a range; found {layers!r}")
    # Negative ones stay as they are: how many layers there are is known when the composition is activated.
    return tuple(sorted({operator.index(layer) for layer in given}))


def sizes_of(sizes: tuple[int, ...] | None, count: int, whole: int, what: str) -> tuple[int, ...]:
    """Return the sizes of `count` parts of a whole: those given, or equal ones.

    Args:
        sizes: One for each part; None for equal parts.
        count: How many parts there are.
        whole: What the parts sum to.
        what: What is divided, for the message.

    Raises:
        CompatibilityError: they do not sum to the whole, or it has no equal parts.
    """
    if sizes is None and whole % count == 0:
        return (whole // count,) * count
    if sizes is None or sum(sizes) != whole:
        asked = f"{count} equal parts" if sizes is None else f"parts of {list(sizes)}, which are {sum(sizes)}"
        raise CompatibilityError(f"{what} has {whole}, and is to be divided into {asked}; give sizes= that sum to it")
    return sizes
