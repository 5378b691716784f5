"""What heads on a model's output take of its call: labels, which the model itself need not know, and the mask.

A hook on the model takes the labels off the call and leaves them here for the step that runs the heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CompatibilityError
from ..structure.pytree import Argument

__all__ = ["HeadInputs", "HeadRequest", "Mask", "check_label_names", "labels_of", "masks_of", "take_head_inputs"]

# As Hugging Face's models and Trainer call them.
LABELS, SPAN = "labels", ("start_positions", "end_positions")

# The names of masks: (name, whether True or 1 marks padding, arguments beside which the model returns another sequence than
# the one that the mask is of). An encoder-decoder given `decoder_input_ids` returns the decoder's positions, say, of which
# `attention_mask` tells nothing. The likeliest name first.
_MASKS = (
    ("decoder_attention_mask", False, ()),
    ("tgt_key_padding_mask", True, ()),
    ("attention_mask", False, ("decoder_input_ids", "decoder_inputs_embeds")),
    ("src_key_padding_mask", True, ("tgt",)),
)


@dataclass(frozen=True)
class Mask:
    """An argument that says which positions are real.

    Attributes:
        argument: Its position and keyword in the model's call.
        is_padding: It says which are not.
        unless: Where any of these arguments is given, it is not that of the model's output.
    """

    argument: Argument
    is_padding: bool
    unless: tuple[Argument, ...]


@dataclass(frozen=True)
class HeadRequest:
    """What active heads want of a call.

    Attributes:
        names: Keywords that are theirs and not the model's.
        choices: Inputs with an axis of so many choices are made rows; None for no such axis.
        masks: What may be the mask, the first that is given.
    """

    names: tuple[str, ...]
    choices: int | None
    masks: tuple[Mask, ...]


class HeadInputs(NamedTuple):
    """What a call had for heads.

    Attributes:
        root: The module that was called.
        labels: A tensor, or a mapping of them by adapter or head; None if there were none.
        mask: 1 where a position is real. Shape: (batch, seq).
    """

    root: nn.Module
    labels: Any
    mask: Tensor | None


def masks_of(root: nn.Module) -> tuple[Mask, ...]:
    """Return what may be the mask in calls of a model, the likeliest first, by what its `forward` takes."""
    # Of `forward`, not of the class's `__call__`, which takes anything.
    parameters = inspect.signature(root.forward).parameters
    names, takes_any = list(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def argument(name: str) -> Argument:
        # None: taken by **kwargs, so by keyword alone.
        return (names.index(name) if name in names else None), name

    known = [(name, is_padding, unless) for name, is_padding, unless in _MASKS if name in names or takes_any]
    return tuple(Mask(argument(name), is_padding, tuple(map(argument, unless))) for name, is_padding, unless in known)


def take_head_inputs(wants: HeadRequest, root: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any, HeadInputs]:
    """Return the arguments that are left for the model, and what heads get of the call.

    Shape: as given; choices are made rows.
    """
    # Both are taken even where the model's own `forward` knows labels: it would make a loss of its own head's outputs.
    labels = kwargs.get(LABELS)
    if labels is None and SPAN[0] in wants.names:
        labels = _span(kwargs)  # a head for answers takes the two positions as one tensor
    kwargs = {name: value for name, value in kwargs.items() if name not in wants.names}
    if wants.choices is not None:
        args, kwargs = _as_rows(wants.choices, args, kwargs)
    # After choices are made rows: the mask has them, too.
    return args, kwargs, HeadInputs(root, labels, _mask(wants.masks, (args, kwargs)))


def _span(kwargs: Any) -> Tensor | None:
    """Return where answers start and end, (batch, 2); None if the call does not say. Raises CompatibilityError."""
    given = {name: kwargs[name] for name in SPAN if kwargs.get(name) is not None}
    if len(given) == 1:
        raise CompatibilityError(f"an answer has {' and '.join(SPAN)}; found {next(iter(given))} alone")
    return torch.stack([torch.as_tensor(given[name]).reshape(-1) for name in SPAN], -1) if given else None


def _as_rows(choices: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return inputs (batch, choices, ...) as (batch * choices, ...), if that is what the first of them is."""
    tensors = {**dict(enumerate(args)), **kwargs}
    tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    # Keys are positions for `args` and names for `kwargs`, so that "inputs_embeds" is known below.
    key, first = next(iter(tensors.items()), (None, None))
    if first is None:
        return args, kwargs
    # Token ids are (batch, seq), images (batch, channels, height, width).
    axes = 4 if key == "inputs_embeds" else 5 if first.is_floating_point() else 3
    # Rows already: an axis of choices is for convenience, not needed.
    if first.dim() != axes or first.shape[1] != choices:
        return args, kwargs
    # Only what begins with these two sizes: a table that all rows share, (choices, ...), stays.
    batch = tuple(first.shape[:2])

    def flat(value: Any) -> Any:
        return value.flatten(0, 1) if isinstance(value, Tensor) and tuple(value.shape[:2]) == batch else value

    return tuple(map(flat, args)), {name: flat(value) for name, value in kwargs.items()}


def _mask(masks: tuple[Mask, ...], call: Any) -> Tensor | None:
    """Return the mask of the model's output, with 1 for what is real; None without one. Shape: as given."""
    for mask in masks:
        found = _argument(call, mask.argument)
        if isinstance(found, Tensor) and all(_argument(call, other) is None for other in mask.unless):
            # Of transformers: 1 where a position is real. Of torch (`src_key_padding_mask`): True where it is padding.
            if not mask.is_padding:
                return found
            return ~found if found.dtype is torch.bool else found == 0
    return None


def _argument(call: Any, argument: Argument) -> Any:
    """Return an argument of a call, given by keyword or by position; None if it is not there."""
    (position, keyword), (args, kwargs) = argument, call
    if keyword in kwargs:
        return kwargs[keyword]
    return args[position] if position is not None and position < len(args) else None


def labels_of(labels: Any, owner: str, head: str, *, is_alone: bool, owners: tuple[str, ...]) -> tuple[Any, bool]:
    """Return the labels that are meant for a head (None for none), and whether they are for every row of the batch.

    Labels may be one tensor, or a mapping by adapter or by head; an adapter's entry may be a mapping by head in turn.

    Args:
        labels: What the model was called with.
        owner: The head's adapter.
        head: Its name.
        is_alone: Whether it is the only one of its adapter.
        owners: All adapters whose heads run.

    Raises:
        CompatibilityError: one tensor is to be for several heads.
    """
    if not isinstance(labels, Mapping):
        found, is_shared = labels, True
    else:
        found, is_shared = labels.get(owner), False
        if found is None and head not in owners:  # a head called like another adapter does not get that one's labels
            return labels.get(head), False
        if isinstance(found, Mapping):
            return found.get(head), False
    if found is not None and not is_alone:
        raise CompatibilityError(
            f"adapter {owner!r} has several heads, and one tensor of labels is not for all of them: give "
            f"labels={{{head!r}: …}}, by their names"
        )
    return found, is_shared


def check_label_names(labels: Any, owners: tuple[str, ...], heads: tuple[str, ...]) -> None:
    """Raise CompatibilityError for labels under a name that is neither that of an adapter nor that of a head that runs."""
    unknown = [key for key in labels if key not in owners and key not in heads] if isinstance(labels, Mapping) else []
    if unknown:
        raise CompatibilityError(
            f"labels are for {unknown}, which runs no head here: adapters {list(owners)} do, with heads {list(heads)}"
        )
