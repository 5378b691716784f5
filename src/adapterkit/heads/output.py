"""What a model returns while a head on its output is active."""

from typing import Any, NamedTuple

from torch import Tensor

from .rows import Logits

__all__ = ["HeadOutput"]


class HeadOutput(NamedTuple):
    """What a model returns while a head on its output is active. The loss comes first, as Hugging Face's Trainer wants it.

    Where rows of a batch have different heads, logits are one tensor in the order of the rows if all rows have them, of
    one shape; else a tuple with one tensor for each row, None for a row without.

    Attributes:
        loss: The sum of `losses`; None without labels.
        logits: Of the head; of the first one where an adapter has several.
        losses: By adapter, the sum of its heads' losses, each a mean over that adapter's rows.
        heads: The logits by the name of the head.
        output: What the model itself returned.
    """

    loss: Tensor | None
    logits: Logits
    losses: dict[str, Tensor]
    heads: dict[str, Logits]
    output: Any
