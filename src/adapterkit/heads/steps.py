"""The steps that run an adapter's heads: in the place of the host, or on what the model returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..composition.nodes import Composition
from ..composition.rows import rows_of
from ..errors import CompatibilityError
from ..runtime.compose.batch import is_generating
from ..runtime.site import AdapterSite
from ..runtime.steps import Step
from ..structure import pytree
from ..structure.pytree import Path
from .call import HeadInputs, HeadRequest, check_label_names, labels_of
from .rows import HeadOutput, Logits, Piece, in_row_order, join_rows, rows_of_call, some_rows

__all__ = ["Head", "Owned", "RunHeads", "UseHead", "UseHeads", "described_fields", "hidden_in"]

Way = tuple[str, ...]  # names of children, from the model to a module below it: found anew, a copy of the model is right


@dataclass(frozen=True)
class UseHead(Step):
    """Return what the adapter's own head makes of the call that the host had.

    Args:
        key: The head's name among the site's children.
        adapter: The active adapter or composition.
    """

    key: str
    adapter: Composition | None

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return the head's output. Shape: as the host's, or as a head of yours has it."""
        head: Any = site._modules[self.key]
        return head(*args, **kwargs)


@dataclass(frozen=True)
class UseHeads(Step):
    """Return, for each row, what the head of its adapter makes of it; the host's own output where there is none.

    Args:
        keys: The head of each of `kinds`; None for none.
        kinds: The different compositions that rows run.
        adapter: The active composition.
        axis: The axis of the rows.
        path: The host, for messages.
    """

    keys: tuple[str | None, ...]
    kinds: tuple[Composition | None, ...]
    adapter: Composition | None
    axis: int
    path: str

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return the rows in their order. Shape: as the host's, or as all heads have it."""
        call = (args, kwargs)
        # What the host takes tells how many rows there are: a head in its place may return other shapes than it.
        count = next((t.shape[self.axis] for _, t in pytree.tensors(call) if t.dim() > self.axis), 0)
        by_key: dict[str | None, list[int]] = {}
        for row, kind in enumerate(_kinds_of_rows(self.adapter, self.kinds, count, f"at {self.path!r}")):
            by_key.setdefault(self.keys[kind], []).append(row)
        # One call for each head, on all of its rows, whichever adapters those run.
        outputs = []
        for key, rows in by_key.items():
            if key is None:
                outputs.append((rows_of_call(value, count, rows, self.axis), rows))
            else:
                head: Any = site._modules[key]
                own_args, own_kwargs = rows_of_call(call, count, rows, self.axis) if len(by_key) > 1 else call
                outputs.append((head(*own_args, **own_kwargs), rows))
        return join_rows(outputs, self.axis, repr(self.path))


@dataclass(frozen=True)
class Head:
    """One head on the output.

    Attributes:
        name: Its name among those of its adapter.
        key: Its name among the site's children.
        width: Features that it reads.
        output: Which tensor of the model's output; the first floating one of two or three axes if None.
        takes_mask: Whether it is called with the mask.
        reads_embedding: The way from the model to an embedding whose weight it reads.
        undoes: Ways from the model to the adapters of the embedding that it undoes; None for a head that undoes none.
    """

    name: str
    key: str
    width: int
    output: Path | None
    takes_mask: bool
    reads_embedding: Way | None = None
    undoes: tuple[Way, ...] | None = None

    def run(self, module: Any, root: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits. Shape: hidden (batch, seq, width) or (batch, width), mask (batch, seq), out (batch, ...)."""
        # The hidden states go to where the head is, and to its dtype: a half base may have a head in fp32.
        like = next((p for p in module.parameters() if p.is_floating_point()), hidden)
        hidden = hidden.to(like.device, like.dtype)
        if self.undoes is not None:
            weight: Any = None if self.reads_embedding is None else _walk(root, self.reads_embedding).weight
            weight = None if weight is None else weight.to(hidden.device)
            logits = module(hidden, mask, weight=weight, undoing=[_walk(root, way) for way in self.undoes])
        else:
            logits = module(hidden, mask) if self.takes_mask else module(hidden)
        # Fewer rows than hidden states are right where several of these are one example (choices).
        if not isinstance(logits, Tensor) or logits.dim() == 0 or hidden.shape[0] % max(1, logits.shape[0]):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CompatibilityError(
                f"the head {self.name!r} was given {hidden.shape[0]} rows and returned {found}; a head returns one tensor "
                "with the rows on its first axis"
            )
        return logits


@dataclass(frozen=True)
class Owned:
    """The heads on the output that one adapter owns; its first is the one that `HeadOutput.logits` is of."""

    adapter: str
    heads: tuple[Head, ...]


@dataclass(frozen=True)
class RunHeads(Step):
    """Run heads on the model's output, each row's own, and return a `HeadOutput`.

    Args:
        owned: The heads of each of `kinds`; None for none.
        kinds: The different compositions that rows run; one where all run the same.
        adapter: The active adapter or composition.
        axis: The axis of the rows.
        copies: How many times the composition runs the batch that the model is called with.
        wants: What they want of the model's call.
    """

    owned: tuple[Owned | None, ...]
    kinds: tuple[Composition | None, ...]
    adapter: Composition | None
    axis: int
    copies: int
    wants: HeadRequest

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return the `HeadOutput`; the value where the host was not called by its model."""
        call = site.call.take()
        if call is None:  # the last layer of an nn.Sequential, say, called by itself
            return value
        self._refuse_generation()
        pieces, headless = self._run(site, call, value)
        every = None if self._is_one else sorted({row for piece in pieces for row in piece.rows} | {*headless})
        heads, logits = self._by_name(pieces, every)
        losses = {} if call.labels is None else self._losses(site, call.labels, pieces, every)
        each = list(losses.values())
        # The sum of the adapters' losses, not their mean: how much one learns must not depend on how many share its batch.
        loss = None if not each else each[0] if len(each) == 1 else torch.stack(each).sum()
        return HeadOutput(loss, logits, losses, heads, value)

    def _refuse_generation(self) -> None:
        """Raise CompatibilityError inside `generate`, which takes any logits for those of the next token."""
        # Only the first head of each adapter: it is what `HeadOutput.logits` is of, and `generate` reads those.
        heads = [head for held in self.owned if held is not None for head in held.heads[:1]]
        if any(head.undoes is None for head in heads) and is_generating():
            raise CompatibilityError(
                f"generate wants the scores of a next token, and the active heads {[head.name for head in heads]} make "
                "others: kit.remove_head takes one away, kit.load(…, heads=False) leaves all out"
            )

    @property
    def _is_one(self) -> bool:
        """Tell whether all rows have the same heads: then nothing is said of single rows."""
        return len(self.kinds) == 1

    def _run(self, site: AdapterSite, call: HeadInputs, value: Any) -> tuple[list[Piece], list[int]]:
        """Return what each head makes of its rows, and the rows that have no head."""
        pieces: list[Piece] = []
        headless: list[int] = []
        for held, rows in self._groups(value):
            if held is None:
                headless += rows
                continue
            for head in held.heads:
                hidden = self._hidden(head, value)
                count, mask = hidden.shape[0], None if call.mask is None else self._repeated(call.mask, hidden.shape[0])
                if not self._is_one:
                    hidden = some_rows(hidden, rows)
                    mask = some_rows(mask, rows) if mask is not None and mask.shape[0] == count else mask
                logits = head.run(site._modules[head.key], call.root, hidden, mask)
                # e.g. 8 rows of 4 choices each give 2 rows of logits: each = 4, and they are of rows 0 and 4.
                each = len(rows) // logits.shape[0] if rows else 1  # rows that one of logits is of
                pieces.append(Piece(held.adapter, head.name, logits, rows[::each]))
        return pieces, headless

    def _by_name(self, pieces: Sequence[Piece], every: Sequence[int] | None) -> tuple[dict[str, Logits], Logits]:
        """Return the logits by the name of the head, and those of each row's first head.

        Args:
            pieces: What heads made of their rows.
            every: All rows; None where all run the same heads, so that there is nothing to put in order.
        """
        if every is None:
            return {piece.head: piece.logits for piece in pieces}, pieces[0].logits
        # Heads of several adapters may have one name ("classification", say): they then share an entry.
        leading = {held.adapter: held.heads[0].name for held in self.owned if held is not None}
        first = [piece for piece in pieces if leading[piece.owner] == piece.head]
        by_name = {name: [p for p in pieces if p.head == name] for name in dict.fromkeys(p.head for p in pieces)}
        heads = {name: in_row_order(own, _others(every, own)) for name, own in by_name.items()}
        names = {piece.head for piece in first}
        return heads, heads[names.pop()] if len(names) == 1 else in_row_order(first, _others(every, first))

    def _groups(self, value: Any) -> Iterator[tuple[Owned | None, list[int]]]:
        """Yield the heads of one adapter with their rows; with an empty list of rows where all rows have the same heads."""
        if self._is_one:
            yield self.owned[0], []
            return
        # Any head tells how many rows there are: all read tensors of the same batch.
        head = next(held.heads[0] for held in self.owned if held is not None)
        count = self._hidden(head, value).shape[0]
        by_kind: dict[int, list[int]] = {}
        for row, kind in enumerate(_kinds_of_rows(self.adapter, self.kinds, count, "in the model's output")):
            by_kind.setdefault(kind, []).append(row)
        for kind in sorted(by_kind):
            yield self.owned[kind], by_kind[kind]

    def _hidden(self, head: Head, value: Any) -> Tensor:
        """Return what a head reads, rows first. Shape: (batch, seq, width) or (batch, width).

        Raises:
            CompatibilityError: the output has no such tensor, or one of another width.
        """
        hidden = hidden_in(value, head.output)
        if hidden is None or hidden.shape[-1] != head.width:
            found = f"{type(value).__name__}{described_fields(value)}" if hidden is None else tuple(hidden.shape)
            raise CompatibilityError(
                f"the head {head.name!r} reads {head.width} features, (batch, seq, {head.width}) or (batch, {head.width}), "
                f"and found {found} in what the model returned; name the tensor with output="
            )
        # A model with batch_first=False returns (seq, batch, hidden); heads read rows first.
        # A tensor with no axis beside those of rows and features has rows first, whatever others have: it is pooled.
        if hidden.dim() > 2 and self.axis == hidden.dim() - 1:
            raise CompatibilityError(
                f"the head {head.name!r} reads features on the last axis, which in a tensor of shape {tuple(hidden.shape)} "
                "that the model returned is the axis of its rows; name another with output="
            )
        return hidden.movedim(self.axis, 0) if self.axis and hidden.dim() > 2 else hidden

    def _repeated(self, tensor: Tensor, rows: int) -> Tensor:
        """Return a tensor of the call with as many rows as the output, which a Parallel repeats. Shape: (rows, ...)."""
        # Labels and masks were read before the hook that repeats the call.
        if self.copies > 1 and tensor.dim() and tensor.shape[0] * self.copies == rows:
            return tensor.repeat(self.copies, *[1] * (tensor.dim() - 1))
        return tensor

    def _losses(
        self, site: AdapterSite, labels: Any, pieces: Sequence[Piece], every: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return the loss of each adapter that has labels: the sum of those of its heads. Raises CompatibilityError."""
        # One entry for each adapter, though its heads may run for several kinds of rows.
        owners = {held.adapter: held.heads for held in self.owned if held is not None}
        check_label_names(labels, tuple(owners), tuple(dict.fromkeys(h.name for heads in owners.values() for h in heads)))
        losses: dict[str, Tensor] = {}
        for owner, heads in owners.items():
            for head in heads:
                own = [piece for piece in pieces if (piece.owner, piece.head) == (owner, head.name)]
                meant, is_shared = labels_of(labels, owner, head.name, is_alone=len(heads) == 1, owners=tuple(owners))
                # Nobody gave labels for it, or none of its rows are in this batch.
                if meant is None or not own:
                    continue
                # One loss over all rows of a head, not one for each piece: a mean of means would weigh rows unequally.
                logits = torch.cat([piece.logits for piece in own]) if len(own) > 1 else own[0].logits
                target = self._labels_for(own, torch.as_tensor(meant), logits, every, is_shared=is_shared)
                _check_rows(target, logits, head, every)
                loss = _loss_of(site._modules[head.key], head, logits, target)
                losses[owner] = losses[owner] + loss if owner in losses else loss
        return losses

    def _labels_for(
        self, pieces: Sequence[Piece], labels: Tensor, logits: Tensor, every: Sequence[int] | None, *, is_shared: bool
    ) -> Tensor:
        """Return the labels of the rows that a head ran on. Shape: (rows, ...); see `_labels_at`."""
        if every is None:
            return self._repeated(labels, logits.shape[0])
        return self._labels_at(labels, [row for piece in pieces for row in piece.rows], every, is_shared=is_shared)

    def _labels_at(self, labels: Tensor, rows: Sequence[int], every: Sequence[int], *, is_shared: bool) -> Tensor:
        """Return the labels of these rows. Shape: (rows, ...); as given, which `_check_rows` refuses, for a wrong number.

        Args:
            labels: For these rows alone, in the order of the batch, or for the whole batch.
            rows: The rows, in any order.
            every: All rows of the batch.
            is_shared: They are for all adapters, so for the whole batch.
        """
        # Labels under an adapter's own name may be for its rows alone: they are if there are as many as those rows.
        meant = sorted(rows) if not is_shared and labels.dim() and labels.shape[0] == len(rows) else every
        labels = labels if meant is not every else self._repeated(labels, len(every))
        if not labels.dim() or labels.shape[0] != len(meant):
            return labels
        rank = {row: index for index, row in enumerate(meant)}  # row of the batch → row of the labels
        return some_rows(labels, [rank[row] for row in rows])


def _others(every: Sequence[int], pieces: Sequence[Piece]) -> list[int]:
    """Return the rows of `every` that are in none of these pieces."""
    return sorted({*every} - {row for piece in pieces for row in piece.rows})


def _check_rows(labels: Tensor, logits: Tensor, head: Head, every: Sequence[int] | None) -> None:
    """Raise CompatibilityError unless there are labels for each row of logits."""
    if not labels.dim() or labels.shape[0] != logits.shape[0]:
        found = labels.shape[0] if labels.dim() else "no"
        whole = "" if every is None or len(every) == logits.shape[0] else f" of a batch of {len(every)}"
        raise CompatibilityError(
            f"labels for the head {head.name!r} have {found} rows, and its logits are of {logits.shape[0]} rows{whole}"
        )


def hidden_in(value: Any, path: Path | None) -> Tensor | None:
    """Return the tensor of a model's output that a head reads; None if it is not there.

    Without a path it is the first floating one of two or three axes. By a path it may be what is pooled with all axes
    kept, (batch, hidden, 1, 1).

    Shape:
        (batch, seq, hidden) or (batch, hidden)
    """
    if path is None:
        two_or_three = (t for _, t in pytree.tensors(value) if t.is_floating_point() and t.dim() in (2, 3))
        return next(two_or_three, None)
    try:
        found = pytree.get(value, path)
    except LookupError:
        return None
    if not isinstance(found, Tensor) or found.dim() < 2:
        return None
    if found.dim() > 3:
        # A pooled image of a CNN, (batch, hidden, 1, 1), is a vector; a feature map is none.
        return found.flatten(1) if found[0, 0].numel() == 1 else None
    return found


def described_fields(value: Any) -> str:
    """Return the fields that an output has, in words that follow its type in a message; "" if it has none."""
    return f" with the fields {list(value)}" if isinstance(value, Mapping) else ""


def _loss_of(module: Any, head: Head, logits: Tensor, labels: Tensor) -> Tensor:
    """Return a head's own loss. Raises CompatibilityError: the head is a module of the user's without one."""
    if not hasattr(module, "loss"):
        raise CompatibilityError(
            f"the head {head.name!r} ({type(module).__name__}) has no method loss(logits, labels): give it one, or call "
            "the model without labels and make the loss of its logits yourself"
        )
    loss: Tensor = module.loss(logits, labels.to(logits.device))
    return loss


def _walk(root: nn.Module, way: Way) -> Any:
    """Return the module at the end of a way."""
    module: Any = root
    for name in way:
        module = module._modules[name]
    return module


def _kinds_of_rows(
    composition: Composition | None, kinds: Sequence[Composition | None], count: int, where: str
) -> list[int]:
    """Return the index in `kinds` of each row's composition. Raises CompatibilityError: it is of another number of rows."""
    try:
        rows = rows_of(composition, count)
    except CompatibilityError as error:
        raise CompatibilityError(f"{where}: {error}") from error
    number = {kind: i for i, kind in enumerate(kinds)}
    return [number[row] for row in rows]
