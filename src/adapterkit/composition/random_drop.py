"""The depth to which a robust training drops an adapter, anew in each step."""

import hashlib
import operator
from typing import Any

from ..errors import ConfigError
from .nodes import Composition, Drop

__all__ = ["random_drop"]


def random_drop(child: Composition, most: int = 11, *, step: int, seed: int = 0) -> Composition:
    """Return the child without its n lowest layers, n drawn uniformly from 0, 1, …, `most` for this step.

        for step, batch in enumerate(batches):
            with kit.active(ak.random_drop("a", most=11, step=step)):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    An adapter trained so loses little where its lower layers are dropped later, whatever their number. n follows from
    `seed` and `step` alone, so it is the same in every process of a distributed training, on every machine, and after a
    resumption: it is SHA-256 of the text "seed,step" in decimal digits, read as one number with the highest byte first,
    modulo `most` + 1.

    Args:
        child: An adapter's name, or a composition.
        most: The largest number of layers to drop: 11 leaves the top one of twelve.
        step: The number of the training step, counted by you.
        seed: Another seed gives other depths.

    Returns:
        `Drop(child, layers=range(n))`; the child itself where n is 0.

    Raises:
        ConfigError: not a whole number, or a negative `most`.

    Reference: Rücklé et al. 2021, arXiv:2010.11918 (AdapterDrop), section 3.2 ("robust AdapterDrop").
    """
    most, step, seed = _whole(most, "most"), _whole(step, "step"), _whole(seed, "seed")
    if most < 0:
        raise ConfigError(f"most is the largest number of layers to drop, 0 or more; found {most}")
    # No generator: torch's and Python's give other numbers in other versions, and a global one depends on who drew before.
    digest = hashlib.sha256(f"{seed},{step}".encode()).digest()
    # Modulo a small number 256 random bits are uniform to any precision that matters.
    depth = int.from_bytes(digest, "big") % (most + 1)
    return Drop(child, layers=range(depth)) if depth else child


def _whole(value: Any, what: str) -> int:
    """Return a whole number, of other libraries as well, as Python's own. Raises ConfigError: it is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{what} is a whole number; found {value!r}")
    return operator.index(value)
