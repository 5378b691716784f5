"""What a trained fusion attends to: read, summed up and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..composition.nodes import Composition, fusions_in
from ..errors import ActivationError, ConfigError, MissingExtraError
from ..lifecycle.fusion import fusion_modules
from ..runtime.state import ModelState
from ..runtime.sync import forget_compiled
from .table import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FusionAttention", "draw_attention", "watched"]

_SHOWN = 20  # sites in the printed table


@dataclass(frozen=True, repr=False)
class FusionAttention:
    """How much a fusion attended to each of its children, at each site, in the forwards that were watched.

    `print` it for a table of means; `mean` gives them as a tensor.

    Attributes:
        fusion: Its name.
        children: What it weighs, in order.
        weights: Map each site to a list with one tensor for each time that it ran. Shape: (..., children), summing to 1.
    """

    fusion: str
    children: tuple[Composition, ...]
    weights: Mapping[str, list[Tensor]]

    def __repr__(self) -> str:
        forwards = sorted({len(tensors) for tensors in self.weights.values()})
        # e.g. "2", or "1-2" where some sites ran more often than others.
        ran = "-".join(str(count) for count in dict.fromkeys((forwards[0], forwards[-1]))) if forwards else "0"
        return (
            f"FusionAttention({self.fusion!r}, {len(self.children)} children at {len(self.weights)} sites, {ran} forwards)"
        )

    def __str__(self) -> str:
        """Return the mean attention at each site as a table that fits a screen."""
        rows = [("site", *map(str, self.children))]
        for site, tensors in self.weights.items():
            means = self._mean_at(tensors, None).tolist() if tensors else []
            rows.append((site, *(f"{mean:.2f}" for mean in means)) if means else (site, *("-" for _ in self.children)))
        hidden = len(rows) - 1 - _SHOWN
        if hidden > 0:  # the sites at both ends tell most: attention changes from the first layers to the last
            rows[1 + _SHOWN // 2 : 1 + _SHOWN // 2 + hidden] = [(f"… {hidden} more", *("" for _ in self.children))]
        return f"{self!r}\n{table(rows)}"

    def mean(self, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Return the mean attention at each site. Shape: (sites, children).

        Args:
            masks: For each forward, which tokens count (padding does not); all if not given. Shape: (batch, seq).

        Raises:
            ActivationError: nothing ran while it was watched.
            ConfigError: not one mask for each forward, or one of another shape.
        """
        if not self.weights or not all(self.weights.values()):
            raise ActivationError(
                f"the fusion {self.fusion!r} has not run within kit.fusion_attention(): run the model there"
            )
        return torch.stack([self._mean_at(tensors, masks) for tensors in self.weights.values()])

    def _mean_at(self, tensors: Sequence[Tensor], masks: Sequence[Tensor] | None) -> Tensor:
        if masks is not None:
            # Not strict: there may be too few masks, which the next line finds, with the shapes of those there are.
            shapes = [(tuple(mask.shape), tuple(t.shape[:-1])) for mask, t in zip(masks, tensors, strict=False)]
            if len(masks) != len(tensors) or any(mask != tokens for mask, tokens in shapes):
                raise ConfigError(
                    f"masks are one for each of the {len(tensors)} forwards, and of its tokens; found {shapes}"
                )
            tensors = [t[mask.bool()] for mask, t in zip(masks, tensors, strict=True)]  # (tokens, children)
        # Tokens of all forwards count alike, so a longer batch weighs more. Shape: (children,)
        return torch.cat([t.reshape(-1, t.shape[-1]) for t in tensors]).mean(0)

    def most_used(self, count: int, masks: Sequence[Tensor] | None = None) -> list[Composition]:
        """Return the children with the most attention, in the fusion's order: what to keep (`kit.prune_fusion`).

        Args:
            count: How many.
            masks: As for `mean`.

        Raises:
            ConfigError: there are not so many.

        Reference: Rücklé et al. 2021, arXiv:2010.11918, section 4.
        """
        if not 1 <= count <= len(self.children):
            raise ConfigError(f"the fusion {self.fusion!r} weighs {len(self.children)} children; found count={count}")
        # (sites, children) -> (children,): every site counts alike.
        kept = self.mean(masks).mean(0).topk(count).indices.tolist()
        return [child for index, child in enumerate(self.children) if index in kept]

    def draw(self, file: str | Path, masks: Sequence[Tensor] | None = None) -> None:
        """Write a heat map as an image: a row for each site, a column for each child. Needs matplotlib."""
        self._labelled(self.mean(masks), list(self.weights), f"attention of the fusion {self.fusion!r}").savefig(
            file, dpi=150
        )

    def _labelled(self, values: Tensor, rows: Sequence[str], title: str) -> Figure:
        figure = _figure(2.5 + 0.9 * len(self.children), 1.6 + 0.35 * len(rows))
        _heat_map(figure.add_subplot(), values, rows, [str(child) for child in self.children], title)
        return figure


def draw_attention(
    tasks: Mapping[str, FusionAttention], file: str | Path, *, masks: Mapping[str, Sequence[Tensor]] | None = None
) -> None:
    """Draw several fusions over the same children: a heat map for each site, with a row for each task, as in the paper.

    Args:
        tasks: What was seen for each task.
        file: Of the image.
        masks: For each task, which tokens count; see `FusionAttention.mean`.

    Raises:
        ConfigError: the fusions weigh different children, or at different sites.
        MissingExtraError: matplotlib is not installed.

    Reference: Pfeiffer et al. 2021, arXiv:2005.00247, figure 5.
    """
    seen = list(tasks.values())
    if not seen or any((s.children, [*s.weights]) != (seen[0].children, [*seen[0].weights]) for s in seen):
        raise ConfigError(f"one drawing is of fusions over the same children and sites; found {list(tasks)}")
    means = torch.stack([s.mean((masks or {}).get(task)) for task, s in tasks.items()], dim=1)  # (sites, tasks, children)
    across = min(4, len(means))
    down = -(-len(means) // across)  # rounded up
    figure = _figure(across * (1.4 + 0.6 * len(seen[0].children)), down * (1.5 + 0.35 * len(seen)))
    for index, (site, values) in enumerate(zip(seen[0].weights, means, strict=True)):
        axes = figure.add_subplot(down, across, index + 1)
        _heat_map(axes, values, list(tasks), [str(child) for child in seen[0].children], site)
    figure.savefig(file, dpi=150)


@contextmanager
def watched(model: nn.Module, state: ModelState, name: str | None) -> Iterator[FusionAttention]:
    """Keep the attention of an active fusion within the block. Raises ActivationError: it, or no one fusion, is active."""
    # A set: one fusion may stand in a composition several times.
    active = {fuse for fuse in fusions_in(state.activation.active) if name in (None, fuse.fusion)}
    if len(active) != 1:
        raise ActivationError(
            f"{'one fusion' if name is None else f'the fusion {name!r}'} must be active, to be watched; active is "
            f"{state.activation.active!r}. Call kit.activate(ak.Fuse(...)), and name the fusion where there are several"
        )
    fuse = active.pop()
    found = [(path, spec.at, module) for path, spec, module in fusion_modules(model, fuse.fusion)]
    paths = [path for path, _, _ in found]
    weights: dict[str, list[Tensor]] = {}
    handles = []
    for path, at, module in found:
        # A fusion has two modules at a host where its adapters change both the input and the output there.
        kept = weights[path if paths.count(path) == 1 else f"{path} ({at})"] = []
        handles.append(module.register_forward_hook(_Keep(kept)))
    forget_compiled()
    try:
        yield FusionAttention(fuse.fusion, fuse.children, weights)
    finally:
        for handle in handles:
            handle.remove()
        forget_compiled()


class _Keep:
    """A hook that keeps the attention; not that of a forward which checkpointing runs again."""

    def __init__(self, kept: list[Tensor]) -> None:
        self._kept = kept

    def __call__(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        """Keep the attention of one forward of a fusion.

        Shape: output is what the fusion adds (..., hidden), and its attention (..., children).
        """
        # The id of the backward that runs, -1 outside of one. Checkpointing runs a forward again within its backward.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
            # Detached: the graph of every forward that is watched would stay in memory.
            self._kept.append(output[1].detach())


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise MissingExtraError(
            f'drawing needs matplotlib ({error}): python -m pip install "adapterkit[plot]", or matplotlib itself'
        ) from error
    # Not pyplot, which keeps every figure that it makes, and may want a display.
    return Figure(figsize=(width, height), layout="constrained")


def _heat_map(axes: Any, values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Draw a matrix of attention, with its numbers."""
    axes.imshow(values.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize="medium")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black", fontsize=8)
