"""The losses of heads. Each is a mean over what has a label, and 0 where nothing has one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CompatibilityError

__all__ = ["IGNORED", "class_loss", "label_loss", "next_token_loss", "span_loss", "target_loss"]

IGNORED = -100  # a label that says: nothing here


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy. Labels of -100 do not count. Shape: logits (..., classes), labels (...), whole numbers."""
    labels = _as_long(_with_shape(labels, logits.shape[:-1]))
    # In fp32, where a sum over a batch of half logits keeps its digits. A sum, since torch's mean of no labels is nan.
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each position's logits with the next label. Shape: logits (batch, seq, classes)."""
    # The scores at position i are of token i + 1; the last position has no next one to compare with.
    return class_loss(logits[:, :-1], _with_shape(labels, logits.shape[:-1])[:, 1:])


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy. Labels of -100 do not count. Shape: logits and labels (batch, labels)."""
    labels = _with_shape(labels, logits.shape).float()  # 0 or 1, and -100 where nothing counts
    # Weights of 0 take the -100s out; so what they are in the formula does not matter.
    counts = (labels != IGNORED).float()
    total = F.binary_cross_entropy_with_logits(logits.float(), labels, weight=counts, reduction="sum")
    return total / counts.sum().clamp(min=1)


def target_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared error. Shape: logits and labels (batch, targets)."""
    # Without this axis, (batch) against (batch, 1) would be broadcast to all pairs.
    if logits.shape[-1] == 1 and labels.shape == logits.shape[:-1]:
        labels = labels[..., None]
    return F.mse_loss(logits.float(), _with_shape(labels, logits.shape).float())


def span_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy over positions, the mean of starts and ends; those beyond the sequence do not count.

    Shape: logits (batch, seq, 2), labels (batch, 2): the positions of start and end.
    """
    labels, length = _as_long(_with_shape(labels, (logits.shape[0], 2))), logits.shape[1]
    inside = torch.where((labels >= 0) & (labels < length), labels, IGNORED)
    # (batch, 2, seq): positions are the classes, start and end are two questions
    return class_loss(logits.transpose(1, 2), inside)


def _with_shape(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the labels, if they have this shape; a last axis of 1 is dropped where that makes it so.

    Raises:
        CompatibilityError: they have another.
    """
    if labels.dim() == len(shape) + 1 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if tuple(labels.shape) != tuple(shape):
        raise CompatibilityError(f"labels of shape {tuple(shape)} are wanted here; found {tuple(labels.shape)}")
    return labels


def _as_long(labels: Tensor) -> Tensor:
    """Return labels of any whole type as torch wants them. Raises CompatibilityError: they are fractions."""
    if labels.is_floating_point():
        raise CompatibilityError(f"labels here are whole numbers; found {labels.dtype}")
    return labels.long()
