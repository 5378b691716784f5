"""The steps that run an adapter's heads: in the place of the host, or on what the model returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from .call import HeadInputs, HeadRequest, check_known, labels_of
from .rows import HeadOutput, Logits, Piece, joined, laid_out, rows_of_call, some_rows

__all__ = ["Head", "Owned", "RunHeads", "UseHead", "UseHeads"]

Way = tuple[str, ...]


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
        count = next((t.shape[self.axis] for _, t in pytree.tensors(call) if t.dim() > self.axis), 0)
        by_key: dict[str | None, list[int]] = {}
        for row, kind in enumerate(_kinds_of_rows(self.adapter, self.kinds, count, f"at {self.path!r}")):
            by_key.setdefault(self.keys[kind], []).append(row)
        outputs = []
        for key, rows in by_key.items():
            if key is None:
                outputs.append((rows_of_call(value, count, rows, self.axis), rows))
            else:
                head: Any = site._modules[key]
                own_args, own_kwargs = rows_of_call(call, count, rows, self.axis) if len(by_key) > 1 else call
                outputs.append((head(*own_args, **own_kwargs), rows))
        return joined(outputs, self.axis, repr(self.path))


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
        """The logits. Shape: hidden (batch, seq, width) or (batch, width), mask (batch, seq), result (batch, ...)."""
        like = next((p for p in module.parameters() if p.is_floating_point()), hidden)
        hidden = hidden.to(like.device, like.dtype)
        if self.undoes is not None:
            weight: Any = None if self.reads_embedding is None else _walk(root, self.reads_embedding).weight
            weight = None if weight is None else weight.to(hidden.device)
            logits = module(hidden, mask, weight=weight, undoing=[_walk(root, way) for way in self.undoes])
        else:
            logits = module(hidden, mask) if self.takes_mask else module(hidden)
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
        if call is None:
            return value
        self._refuse_generation()
        pieces, absent = self._run(site, call, value)
        every = None if self._is_one else sorted({row for piece in pieces for row in piece.rows} | {*absent})
        heads, logits = self._in_order(pieces, every)
        losses = {} if call.labels is None else self._losses(site, call.labels, pieces, every)
        each = list(losses.values())
        loss = None if not each else each[0] if len(each) == 1 else torch.stack(each).sum()
        return HeadOutput(loss, logits, losses, heads, value)

    def _refuse_generation(self) -> None:
        """Raise CompatibilityError inside `generate`, which takes any logits for those of the next token."""
        heads = [head for held in self.owned if held is not None for head in held.heads[:1]]
        if any(head.undoes is None for head in heads) and is_generating():
            raise CompatibilityError(
                f"generate wants the scores of a next token, and the active heads {[head.name for head in heads]} make "
                "others: kit.remove_head takes one away, kit.load(…, heads=False) leaves all out"
            )

    @property
    def _is_one(self) -> bool:
        """Whether all rows have the same heads: then nothing is said of single rows."""
        return len(self.kinds) == 1

    def _run(self, site: AdapterSite, call: HeadInputs, value: Any) -> tuple[list[Piece], list[int]]:
        """What each head makes of its rows, and the rows that have none."""
        pieces: list[Piece] = []
        absent: list[int] = []
        for held, rows in self._groups(value):
            if held is None:
                absent += rows
                continue
            for head in held.heads:
                hidden = self._hidden(head, value)
                count, mask = hidden.shape[0], None if call.mask is None else self._repeated(call.mask, hidden.shape[0])
                if not self._is_one:
                    hidden = some_rows(hidden, rows)
                    mask = some_rows(mask, rows) if mask is not None and mask.shape[0] == count else mask
                logits = head.run(site._modules[head.key], call.root, hidden, mask)
                each = len(rows) // logits.shape[0] if rows else 1  # rows that one of logits is of
                pieces.append(Piece(held.adapter, head.name, logits, rows[::each]))
        return pieces, absent

    def _in_order(self, pieces: Sequence[Piece], every: Sequence[int] | None) -> tuple[dict[str, Logits], Logits]:
        """The logits by the name of the head, and those of each row's first head."""
        if every is None:
            return {piece.head: piece.logits for piece in pieces}, pieces[0].logits
        leading = {held.adapter: held.heads[0].name for held in self.owned if held is not None}
        first = [piece for piece in pieces if leading[piece.owner] == piece.head]
        by_name = {name: [p for p in pieces if p.head == name] for name in dict.fromkeys(p.head for p in pieces)}
        heads = {name: laid_out(own, _others(every, own)) for name, own in by_name.items()}
        names = {piece.head for piece in first}
        return heads, heads[names.pop()] if len(names) == 1 else laid_out(first, _others(every, first))

    def _groups(self, value: Any) -> Iterator[tuple[Owned | None, list[int]]]:
        """Heads with their rows; with none named where all rows have the same."""
        if self._is_one:
            yield self.owned[0], []
            return
        head = next(held.heads[0] for held in self.owned if held is not None)
        count = self._hidden(head, value).shape[0]
        by_kind: dict[int, list[int]] = {}
        for row, kind in enumerate(_kinds_of_rows(self.adapter, self.kinds, count, "in the model's output")):
            by_kind.setdefault(kind, []).append(row)
        for kind in sorted(by_kind):
            yield self.owned[kind], by_kind[kind]

    def _hidden(self, head: Head, value: Any) -> Tensor:
        """What a head reads, rows first. Shape: (batch, seq, width) or (batch, width)."""
        hidden = hidden_in(value, head.output)
        if hidden is None or hidden.shape[-1] != head.width:
            found = type(value).__name__ if hidden is None else tuple(hidden.shape)
            raise CompatibilityError(
                f"the head {head.name!r} reads {head.width} features, (batch, seq, {head.width}) or (batch, {head.width}), "
                f"and found {found} in what the model returned; name the tensor with output="
            )
        return hidden.transpose(0, 1) if self.axis == 1 and hidden.dim() == 3 else hidden

    def _repeated(self, tensor: Tensor, rows: int) -> Tensor:
        """A tensor with the rows of the batch, for a composition that runs it several times. Shape: (rows, ...)."""
        if self.copies > 1 and tensor.dim() and tensor.shape[0] * self.copies == rows:
            return tensor.repeat(self.copies, *[1] * (tensor.dim() - 1))
        return tensor

    def _losses(
        self, site: AdapterSite, labels: Any, pieces: Sequence[Piece], every: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """The loss of each adapter that has labels: the sum of those of its heads."""
        owners = {held.adapter: held.heads for held in self.owned if held is not None}
        check_known(labels, tuple(owners), tuple(dict.fromkeys(h.name for heads in owners.values() for h in heads)))
        losses: dict[str, Tensor] = {}
        for owner, heads in owners.items():
            for head in heads:
                own = [piece for piece in pieces if (piece.owner, piece.head) == (owner, head.name)]
                meant, is_shared = labels_of(labels, owner, head.name, is_alone=len(heads) == 1, owners=tuple(owners))
                if meant is None or not own:
                    continue
                logits = torch.cat([piece.logits for piece in own]) if len(own) > 1 else own[0].logits
                target = self._repeated(torch.as_tensor(meant), logits.shape[0])
                if every is not None:
                    rows = [row for piece in own for row in piece.rows]
                    target = self._labels_at(torch.as_tensor(meant), rows, every, is_shared=is_shared)
                _check_rows(target, logits, head, every)
                loss = _loss_of(site._modules[head.key], head, logits, target)
                losses[owner] = losses[owner] + loss if owner in losses else loss
        return losses

    def _labels_at(self, labels: Tensor, rows: Sequence[int], every: Sequence[int], *, is_shared: bool) -> Tensor:
        """The labels of these rows, of labels for them alone or for the batch. Shape: (rows, ...), or as given."""
        meant = sorted(rows) if not is_shared and labels.dim() and labels.shape[0] == len(rows) else every
        labels = labels if meant is not every else self._repeated(labels, len(every))
        if not labels.dim() or labels.shape[0] != len(meant):
            return labels
        rank = {row: index for index, row in enumerate(meant)}
        return some_rows(labels, [rank[row] for row in rows])


def _others(every: Sequence[int], pieces: Sequence[Piece]) -> list[int]:
    """The rows that are of none of these pieces."""
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
    """The tensor of a model's output that a head reads; None if it is not there.

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
        return found.flatten(1) if found[0, 0].numel() == 1 else None
    return found


def _loss_of(module: Any, head: Head, logits: Tensor, labels: Tensor) -> Tensor:
    """A head's own loss. Raises CompatibilityError: the head is a module of the user's without one."""
    if not hasattr(module, "loss"):
        raise CompatibilityError(
            f"the head {head.name!r} ({type(module).__name__}) has no method loss(logits, labels): give it one, or call "
            "the model without labels and make the loss of its logits yourself"
        )
    loss: Tensor = module.loss(logits, labels.to(logits.device))
    return loss


def _walk(root: nn.Module, way: Way) -> Any:
    module: Any = root
    for name in way:
        module = module._modules[name]
    return module


def _kinds_of_rows(
    composition: Composition | None, kinds: Sequence[Composition | None], count: int, where: str
) -> list[int]:
    """Which of the kinds each row is. Raises CompatibilityError: the composition is of another number of rows."""
    try:
        rows = rows_of(composition, count)
    except CompatibilityError as error:
        raise CompatibilityError(f"{where}: {error}") from error
    number = {kind: i for i, kind in enumerate(kinds)}
    return [number[row] for row in rows]
