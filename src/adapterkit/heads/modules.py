"""Heads: what makes scores of a model's hidden states, and a loss of scores and labels.

forward(hidden, mask) -> logits        mask: 1 where a position is real, 0 where it is padding, or None
loss(logits, labels) -> a scalar
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CompatibilityError
from ..nn.functional import non_linearities
from ..nn.functional.non_linearities import NonLinearity
from .losses import class_loss, next_token_loss
from .pooling import Pooling, pooled

__all__ = ["ChoiceScorer", "HeadLayers", "InvertibleModule", "Loss", "RowScorer", "TokenPredictor", "TokenScorer"]

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) -> a scalar: see `losses`


class HeadLayers(nn.Module):
    """Linear layers with a non-linearity between them, dropout before each.

    Args:
        width: Features of what comes in, and of every layer but the last.
        outputs: Features of the last.
        layers: How many there are.
        non_linearity: Name of the function between them.
        dropout: Probability of dropping a feature, in [0, 1).
        dtype: What the parameters are.

    Shape:
        (..., width) to (..., outputs)
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        *,
        layers: int = 1,
        non_linearity: NonLinearity = "tanh",
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._activation, self.dropout = non_linearities.non_linearity(non_linearity), dropout
        self.inner = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(layers - 1))
        self.last = nn.Linear(width, outputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores. Shape: (..., width) to (..., outputs)."""
        drops = self.dropout > 0 and self.training  # without it, dropout costs as much as a small layer
        for layer in self.inner:
            x = self._activation(layer(F.dropout(x, self.dropout) if drops else x))
        scores: Tensor = self.last(F.dropout(x, self.dropout) if drops else x)
        return scores


class RowScorer(nn.Module):
    """Scores for each row: of classes, of labels, of targets.

    Args:
        layers: Make the scores.
        loss: Of scores and labels.
        pooling: Which positions they are made of.

    Shape:
        hidden (batch, seq, width) or (batch, width), logits (batch, outputs); labels as the loss takes them
    """

    def __init__(self, layers: HeadLayers, loss: Loss, *, pooling: Pooling = "first") -> None:
        super().__init__()
        self.layers, self.pooling, self._loss = layers, pooling, loss

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits. Shape: (batch, outputs)."""
        scores: Tensor = self.layers(pooled(hidden, mask, self.pooling))
        return scores

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss. Shape: scalar."""
        return self._loss(logits, labels)


class TokenScorer(nn.Module):
    """Scores for each position: of classes, or of being the start and the end of an answer.

    Args:
        layers: Make the scores.
        loss: Of scores and labels.

    Shape:
        hidden (batch, seq, width), logits (batch, seq, outputs); labels as the loss takes them
    """

    def __init__(self, layers: HeadLayers, loss: Loss) -> None:
        super().__init__()
        self.layers, self._loss = layers, loss

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits. Shape: (batch, seq, outputs)."""
        _check_sequence(hidden)
        scores: Tensor = self.layers(hidden)
        return scores

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss. Shape: scalar."""
        return self._loss(logits, labels)


class ChoiceScorer(nn.Module):
    """One of several choices, each a row of its own.

    Args:
        layers: Make one score for a row.
        choices: Rows that belong together.
        pooling: Which positions the score is made of.

    Shape:
        hidden (batch * choices, seq, width) or (batch * choices, width), logits (batch, choices), labels (batch)

    Raises:
        CompatibilityError: the rows are no multiple of the choices.
    """

    def __init__(self, layers: HeadLayers, *, choices: int, pooling: Pooling = "first") -> None:
        super().__init__()
        self.layers, self.choices, self.pooling = layers, choices, pooling

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits. Shape: (batch, choices)."""
        if hidden.shape[0] % self.choices:
            raise CompatibilityError(
                f"{self.choices} choices are so many rows one after the other, or inputs of shape (batch, {self.choices}, "
                f"seq); found {hidden.shape[0]} rows"
            )
        scores: Tensor = self.layers(pooled(hidden, mask, self.pooling))
        return scores.view(-1, self.choices)  # (batch, choices)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy. Shape: scalar."""
        return class_loss(logits, labels)


@runtime_checkable
class InvertibleModule(Protocol):
    """A module of an adapter of the embedding that is undone where hidden states are read as embeddings.

    Attributes:
        is_undone: Whether it is; of several modules of one adapter, those that say so are one and the same change.
    """

    is_undone: bool

    def undone(self, x: Tensor) -> Tensor:
        """Return what the embedding was before it. Shape: (..., width)."""
        ...


class TokenPredictor(nn.Module):
    """The vocabulary's scores at each position: a masked or a causal language model.

    All layers but the last are linear, each with a non-linearity and a LayerNorm behind it, as in BERT. The last maps to
    the vocabulary, by a weight of its own or by one that it is given.

    Args:
        width: Features of the hidden states.
        vocabulary: Tokens.
        layers: Linear layers, the last one included.
        non_linearity: Name of the function between them.
        dropout: Probability of dropping a feature before each, in [0, 1).
        is_tied: The last layer's weight is given to `forward`.
        has_bias: It has a bias of its own.
        is_causal: Each position predicts the next token; else its own.
        dtype: What the parameters are.

    Shape:
        hidden (batch, seq, width), logits (batch, seq, vocabulary), labels (batch, seq), -100 where there is none
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        *,
        layers: int = 1,
        non_linearity: NonLinearity = "gelu",
        dropout: float = 0.0,
        is_tied: bool = True,
        has_bias: bool = False,
        is_causal: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._activation, self.dropout = non_linearities.non_linearity(non_linearity), dropout
        self.is_causal, self.vocabulary = is_causal, vocabulary
        self.inner = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(layers - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(width, dtype=dtype) for _ in range(layers - 1))
        self.weight = None if is_tied else nn.Parameter(torch.empty(vocabulary, width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(vocabulary, dtype=dtype)) if has_bias else None
        if self.weight is not None:
            nn.init.normal_(self.weight, std=width**-0.5)  # hidden states behind a norm then give scores of about 1

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        undoing: Sequence[InvertibleModule] = (),
    ) -> Tensor:
        """Return the logits. Shape: (batch, seq, vocabulary).

        Args:
            mask: Not read.
            weight: Of the last layer, where it is tied, (vocabulary, width).
            undoing: Adapters of the embedding that are undone before it, in this order.
        """
        _check_sequence(hidden)
        for layer, norm in zip(self.inner, self.norms, strict=True):
            hidden = norm(self._activation(layer(F.dropout(hidden, self.dropout, self.training))))
        hidden = F.dropout(hidden, self.dropout, self.training)
        # Last, right before the embedding's weight: the layers above saw the hidden states as the model makes them.
        for adapter in undoing:
            hidden = adapter.undone(hidden)
        # An own weight goes first: `forward` is given one only where the head is tied.
        weight = weight if self.weight is None else self.weight
        if weight is None:
            raise CompatibilityError(
                f"the weight of the vocabulary is tied to an embedding, and none was given: call the head with weight=, of "
                f"shape ({self.vocabulary}, {hidden.shape[-1]})"
            )
        # In the dtype of the weight, which is large: a cast of it would cost more than all the rest.
        logits = F.linear(hidden.to(weight.dtype), weight).to(hidden.dtype)
        return logits if self.bias is None else logits + self.bias

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy, with the next token's label if it is causal. Shape: scalar."""
        return next_token_loss(logits, labels) if self.is_causal else class_loss(logits, labels)


def _check_sequence(hidden: Tensor) -> None:
    """Raise CompatibilityError for what is pooled already."""
    # (batch, hidden) has no positions to score; a `pooler_output` is of that shape.
    if hidden.dim() != 3:
        raise CompatibilityError(
            f"a head with scores for each position reads (batch, seq, hidden), and was given {tuple(hidden.shape)}: "
            "name another tensor of its output with output="
        )
