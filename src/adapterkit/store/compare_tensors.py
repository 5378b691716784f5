"""Compare the tensors that there are with those that there must be."""

from collections.abc import Mapping

from ..errors import StoreError

__all__ = ["check_same"]

_SHOWN = 5


def check_same(found: Mapping[str, object], wanted: Mapping[str, object], what: str, against: str) -> None:
    """Raise StoreError, with the first differences, unless both hold the same tensors with the same shapes.

    Args:
        found: Map the name of each tensor that there is to its shape (and dtype).
        wanted: The same of those that there must be.
        what: Where `found` was found, for the message.
        against: Where `wanted` comes from, for the message.
    """
    problems = [f"{key!r} is unknown to {against}" for key in found.keys() - wanted.keys()]
    problems += [f"{key!r} is missing" for key in wanted.keys() - found.keys()]
    problems += [
        f"{key!r} is {found[key]}, {against} says {wanted[key]}"
        for key in found.keys() & wanted.keys()
        if found[key] != wanted[key]
    ]
    # Sorted, for sets have no order: the same file gives the same message each time.
    if problems:
        raise StoreError(f"{what} does not match {against}: {'; '.join(sorted(problems)[:_SHOWN])}")
