"""A table of the adapters in a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..composition.nodes import names_in
from ..runtime.lookup import adapters_in
from ..runtime.state import ModelState
from ..structure.base_tensors import base_parameters
from .table import table

__all__ = ["AdapterRow", "Summary", "open_or_frozen", "summarise"]


@dataclass(frozen=True)
class AdapterRow:
    """One adapter or fusion in the summary.

    Attributes:
        name: Its name.
        method: Its method.
        sites: How many sites it has.
        parameters: Numbers in its parameters, without heads.
        head_parameters: Numbers in the parameters of its heads.
        size_bytes: What all of these take.
        percent: `parameters` in percent of the base's.
        is_active: Whether it runs: alone, or in the active composition.
        is_training: Whether a parameter of it is open (requires a gradient). It says nothing about whether the adapter
            runs: one that was just added or loaded is open, and not active.
        is_merged: Whether it is merged into the base's weights.
    """

    name: str
    method: str
    sites: int
    parameters: int
    head_parameters: int
    size_bytes: int
    percent: float
    is_active: bool
    is_training: bool
    is_merged: bool


@dataclass(frozen=True)
class Summary:
    """What is in a model; `print` it for a table.

    In the column "weights", "open" are those that require gradients, and "frozen" those that do not.

    Attributes:
        base_parameters: Numbers in the base's parameters.
        base_bytes: What they take.
        adapters: A row for each adapter and fusion.
        base_open: How many of the base's numbers require gradients: 0 when it is frozen.
    """

    base_parameters: int
    base_bytes: int
    adapters: tuple[AdapterRow, ...]
    base_open: int = 0

    def __str__(self) -> str:
        head = ("adapter", "method", "sites", "parameters", "head", "bytes", "% of base", "active", "weights", "merged")
        numbers = (f"{self.base_parameters:,}", "", f"{self.base_bytes:,}", "100.00")
        base = ("(base)", "", "", *numbers, "", open_or_frozen(self.base_open, self.base_parameters), "")
        return table([head, *map(_cells, self.adapters), base])


def summarise(model: nn.Module, state: ModelState) -> Summary:
    """Count what the base and each adapter hold."""
    base = [p for _, p in base_parameters(model)]
    total = _numbers(base)
    active = {*names_in(state.activation.active)}
    adapters = adapters_in(model)
    rows = []
    for name, config in adapters.configs.items():
        own = [p for held, _ in adapters.sites(name) for p in held.module.parameters()]
        heads = [p for held, _ in adapters.heads(name) for p in held.module.parameters()]
        rows.append(
            AdapterRow(
                name=name,
                method=config.method,
                sites=len(adapters.sites(name)),
                parameters=_numbers(own),
                head_parameters=_numbers(heads),
                size_bytes=_bytes(own + heads),
                percent=100 * _numbers(own) / max(1, total),  # a base may have no parameters
                is_active=name in active,
                is_training=any(p.requires_grad for p in own),
                is_merged=name in state.merged,
            )
        )
    return Summary(total, _bytes(base), tuple(rows), _numbers([p for p in base if p.requires_grad]))


def open_or_frozen(trainable: int, total: int) -> str:
    """Return the word for parameters of which so many numbers require gradients."""
    if trainable in (0, total):
        return "open" if trainable else "frozen"
    return f"{100 * trainable / total:.3g} % open"


def _numbers(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _cells(row: AdapterRow) -> tuple[str, ...]:
    """Return the texts of a row of the table."""
    counts = (row.sites, row.parameters, row.head_parameters, row.size_bytes)
    active, merged = ("yes" if fact else "no" for fact in (row.is_active, row.is_merged))
    weights = "open" if row.is_training else "frozen"
    return (row.name, row.method, *(f"{count:,}" for count in counts), f"{row.percent:.2f}", active, weights, merged)
