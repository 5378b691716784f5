"""A table of the adapters in a model."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from torch import nn

from ..composition.nodes import names_in
from ..runtime.lookup import adapters_in
from ..runtime.state import ModelState
from ..structure.base_tensors import base_parameters

__all__ = ["AdapterRow", "Summary", "summarise"]


@dataclass(frozen=True)
class AdapterRow:
    """One adapter: its name and method, sites, parameters (heads apart), bytes with heads, share of θ in percent."""

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
    """What is in a model; `print` it for a table."""

    base_parameters: int
    base_bytes: int
    adapters: tuple[AdapterRow, ...]

    def __str__(self) -> str:
        head = ("adapter", "method", "sites", "parameters", "head", "bytes", "% of base", "active", "training", "merged")
        rows = [tuple(_text(value) for value in astuple(row)) for row in self.adapters]
        base = ("(base)", "", "", _text(self.base_parameters), "", _text(self.base_bytes), "100.00", "", "", "")
        return table([head, *rows, base])


def summarise(model: nn.Module, state: ModelState) -> Summary:
    """Count what the base and each adapter hold."""
    base = [p for _, p in base_parameters(model)]
    total = sum(p.numel() for p in base)
    rows = []
    adapters = adapters_in(model)
    for name, config in adapters.configs.items():
        own = [p for held, _ in adapters.sites(name) for p in held.module.parameters()]
        heads = [p for held, _ in adapters.heads(name) for p in held.module.parameters()]
        rows.append(
            AdapterRow(
                name=name,
                method=config.method,
                sites=len(adapters.sites(name)),
                parameters=sum(p.numel() for p in own),
                head_parameters=sum(p.numel() for p in heads),
                size_bytes=sum(p.numel() * p.element_size() for p in own + heads),
                percent=100 * sum(p.numel() for p in own) / max(1, total),
                is_active=name in names_in(state.activation.active),
                is_training=any(p.requires_grad for p in own),
                is_merged=name in state.merged,
            )
        )
    return Summary(total, sum(p.numel() * p.element_size() for p in base), tuple(rows))


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of text in columns."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
