"""How blocks add what their sub-layers compute to a stream: one way for each kind of stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attentions import attention_of
from .feedforwards import feedforward_of
from .parts import LAYOUTS, norm_of, projections
from .spec import Spec
from .taps import Place, branch, total

__all__ = ["STREAMS", "Program", "Sublayer", "program_of"]

State = dict[str, Tensor]
SQRT2 = 2**0.5


class Sublayer:
    """One sub-layer: its part, the norms around it, and how it is added. It holds modules, but is none.

    Attributes:
        place: What is true of it.
        modules: What a container has to register, by name.
    """

    def __init__(self, name: str, part: nn.Module, spec: Spec, width: int, dropout: nn.Module | None = None) -> None:
        axis = LAYOUTS[spec.layout].axis
        self.part, self.stream, self.dropout = part, spec.stream, dropout
        self.takes_first_token_only = False

        def norm(*where: str) -> Callable[[Tensor], Tensor] | None:
            return norm_of(spec.norm_by, width, axis) if spec.norm in where else None

        self.before, self.end, self.after = norm("pre", "sandwich"), norm("sandwich", "end"), norm("post")
        self.scale = LayerScale(width, axis) if spec.stream == "layerscale" else None
        self.place = Place(part.kinds, axis)
        body: nn.Module = part
        if spec.norm_in == "part" and isinstance(self.before, nn.Module):
            body, self.before = Normed(self.before, part), None
        if spec.unit == "tuple":
            body = InTuple(body)
        self._is_tuple, self._is_bare = spec.unit == "tuple", spec.unit == "bare"
        self._body = body
        self.modules = self._registered(name)
        self._run: Callable[..., Tensor] = self._step
        if spec.unit == "residual":
            self._run = Residual(self)
            self.modules = {name: self._run}

    def _registered(self, name: str) -> dict[str, nn.Module]:
        """Name what a container has to register, in the order in which it runs."""
        children = dict(self._body.named_children()) if self._is_bare else {}
        body = {f"{name}_{child}": module for child, module in children.items()} or {name: self._body}
        others = {"norm": self.before, "end": self.end, "scale": self.scale, "after": self.after}
        named = {f"{name}_{word}": module for word, module in others.items() if isinstance(module, nn.Module)}
        first = {key: module for key, module in named.items() if key.endswith("_norm")}
        return {**first, **body, **named}

    def __call__(self, x: Tensor, *more: Any) -> Tensor:
        """Return the stream with the branch added."""
        return self._run(x, *more)

    def branch(self, x: Tensor, *more: Any) -> Tensor:
        """Return what is added."""
        y = x if self.before is None else self.before(x)
        run = self._body.forward if self._is_bare else self._body
        out = run(y[:, :1], y) if self.takes_first_token_only else run(y, *more)
        out = out[0] if self._is_tuple else out
        for module in (self.end, self.scale, self.dropout):
            out = out if module is None else module(out)
        return out

    def _step(self, x: Tensor, *more: Any) -> Tensor:
        return self.add(x, branch(self.place, self.branch(x, *more), x))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """Add a branch to a stream, and normalise after that in a post-norm block."""
        if self.stream == "scaled":
            x = SQRT2 * x
        elif self.stream in ("half", "macaron") and (self.stream == "half" or "feedforward" in self.place.kinds):
            out = 0.5 * out
        s = x + out
        after = self.after or _same
        if self.stream == "sum_scaled":  # the sum is what is added, or what is handed on: both are fair
            s = total(self.place, s, self.after and (lambda z: after(z / SQRT2)), "added") / SQRT2
            return after(total(self.place, s, self.after, "handed on"))
        return after(total(self.place, s, self.after))


def _same(x: Tensor) -> Tensor:
    return x


class Normed(nn.Module):
    """A norm and what takes it, in one module."""

    def __init__(self, norm: nn.Module, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = norm, fn

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        """Return the part of the norm of x."""
        return self.fn(self.norm(x), *more)


class InTuple(nn.Module):
    """A part that returns something beside its branch."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *more: Any) -> tuple[Tensor, None]:
        """Return the branch, and nothing where others return weights."""
        return self.fn(x, *more), None


class LayerScale(nn.Module):
    """A factor for each feature."""

    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.gamma, self.axis = nn.Parameter(0.5 * torch.ones(width)), axis

    def forward(self, x: Tensor) -> Tensor:
        """Shape: as the input."""
        return (x.movedim(self.axis, -1) * self.gamma).movedim(-1, self.axis)


class Residual(nn.Module):
    """A sub-layer that adds itself."""

    def __init__(self, sublayer: Sublayer) -> None:
        super().__init__()
        for name, module in sublayer.modules.items():
            self.add_module(name, module)
        self.sublayer = sublayer

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        """Return the stream with the branch added."""
        return self.sublayer._step(x, *more)


class Program:
    """What one block does to its stream: here, each sub-layer after the other.

    Attributes:
        sublayers: In the order in which they run.
        modules: What a container has to register, by name.
    """

    def __init__(self, spec: Spec, width: int) -> None:
        self.spec, self.width, self.layout = spec, width, LAYOUTS[spec.layout]
        self.dropout = nn.Dropout(0.1) if spec.side == "dropout" else None
        self.sublayers = self._sublayers()
        self.sublayers[-1].place.is_last = True
        self.modules = {name: module for one in self.sublayers for name, module in one.modules.items()}
        if self.dropout is not None:
            self.modules["dropout"] = self.dropout

    def _sublayers(self) -> list[Sublayer]:
        spec = self.spec
        if spec.attention in ("cross", "cross_one"):
            return [self._attention("attn", "self"), self._attention("cross", spec.attention), self._feedforward("ff")]
        return [self._attention("attn", spec.attention), self._feedforward("ff")]

    def _attention(self, name: str, kind: str) -> Sublayer:
        spec = replace(self.spec, attention=kind)
        return self._sublayer(name, attention_of(spec, self.width, self.layout, self._make))

    def _feedforward(self, name: str) -> Sublayer:
        return self._sublayer(name, feedforward_of(self.spec, self.width, self.layout, self._make))

    def _sublayer(self, name: str, part: nn.Module) -> Sublayer:
        return Sublayer(name, part, self.spec, self.width, self.dropout)

    @property
    def _make(self) -> Callable[[int, int], nn.Module]:
        return projections(self.layout, self.spec.side)

    def __call__(self, x: Any, memory: Tensor | None = None, state: State | None = None) -> Any:
        """Return the stream after the block."""
        for sublayer in self.sublayers:
            x = sublayer(x, *self._more(sublayer, memory, state))
        return x

    def _more(self, sublayer: Sublayer, memory: Tensor | None, state: State | None) -> tuple[Any, ...]:
        """Return what a part takes beside the stream."""
        if "crossattention" in sublayer.place.kinds:
            return (memory,)
        is_stateful = self.spec.attention in ("value_residual", "residual_scores")
        return (None, state) if is_stateful and "attention" in sublayer.place.kinds else ()


class Macaron(Program):
    """Half a feed-forward, the attention, half a feed-forward."""

    def _sublayers(self) -> list[Sublayer]:
        return [self._feedforward("ff_in"), *super()._sublayers()]


class ParallelBranches(Program):
    """x + attention(norm(x)) + feed-forward(norm(x))."""

    def __call__(self, x: Tensor, memory: Tensor | None = None, state: State | None = None) -> Tensor:
        """Return the stream after the block."""
        attention, feedforward = self.sublayers
        a = branch(attention.place, attention.branch(x, *self._more(attention, memory, state)), x)
        f = branch(feedforward.place, feedforward.branch(x), x)
        return total(feedforward.place, x + a + f)


class Reversible(Program):
    """y1 = x1 + attention(x2), y2 = x2 + feed-forward(y1), both streams in one tensor."""

    def __call__(self, x: Tensor, memory: Tensor | None = None, state: State | None = None) -> Tensor:
        """Return both streams after the block."""
        attention, feedforward = self.sublayers
        x1, x2 = x.chunk(2, self.layout.axis)
        y1 = attention.add(x1, branch(attention.place, attention.branch(x2), x2, x1))
        y2 = feedforward.add(x2, branch(feedforward.place, feedforward.branch(y1), y1, x2))
        return torch.cat([y1, y2], self.layout.axis)


class TwoStreams(Program):
    """Each of two streams attends to itself and to the other, and has a feed-forward."""

    def _sublayers(self) -> list[Sublayer]:
        pairs = [
            [self._attention(f"attn_{x}", "self") for x in "ab"],
            [self._attention(f"cross_{x}", "cross") for x in "ab"],
            [self._feedforward(f"ff_{x}") for x in "ab"],
        ]
        pairs[-1][0].place.is_last = True
        return [sublayer for pair in pairs for sublayer in pair]

    def __call__(self, x: tuple[Tensor, Tensor], memory: Tensor | None = None, state: State | None = None) -> Any:
        """Return both streams after the block."""
        self_a, self_b, cross_a, cross_b, ff_a, ff_b = self.sublayers
        a, b = self_a(x[0]), self_b(x[1])
        a, b = cross_a(a, b), cross_b(b, a)
        return ff_a(a), ff_b(b)


class HyperConnections(Program):
    """Several streams: their mixture enters a sub-layer, they are mixed with one another, and each takes some of it."""

    COUNT = 2

    def __init__(self, spec: Spec, width: int) -> None:
        super().__init__(spec, width)
        for i, _ in enumerate(self.sublayers):
            self.modules[f"mix_{i}"] = Mix(self.COUNT)

    def __call__(self, x: Tensor, memory: Tensor | None = None, state: State | None = None) -> Tensor:
        """Shape: (batch, tokens, streams, features)."""
        for i, sublayer in enumerate(self.sublayers):
            mix = self.modules[f"mix_{i}"]
            taken = torch.einsum("n,btnd->btd", mix.take, x)
            out = branch(sublayer.place, sublayer.branch(taken, *self._more(sublayer, memory, state)), taken)
            x = torch.einsum("nm,btnd->btmd", mix.streams, x) + mix.give[:, None] * out[:, :, None]
            x = total(sublayer.place, x)
        return x


class Mix(nn.Module):
    """The small matrices of a hyper-connection. They are read, not run."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.take, self.give = nn.Parameter(torch.rand(count) + 0.2), nn.Parameter(torch.rand(count) + 0.5)
        self.streams = nn.Parameter(torch.eye(count) + 0.2 * torch.randn(count, count))


class Trend(Program):
    """After each sum its moving average is taken off the stream; the averages add up (Autoformer)."""

    def __init__(self, spec: Spec, width: int) -> None:
        super().__init__(spec, width)
        self.trends = [Decomposition() for _ in self.sublayers]
        self.modules |= {f"decomposition_{i}": module for i, module in enumerate(self.trends)}

    def __call__(self, x: Tensor, memory: Tensor | None = None, state: State | None = None) -> Tensor:
        """Return the stream after the block; the trends are put into the state."""
        for sublayer, decomposition in zip(self.sublayers, self.trends, strict=True):
            x, trend = decomposition(sublayer(x, *self._more(sublayer, memory, state)))
            if state is not None:
                state["trend"] = trend + state["trend"] if "trend" in state else trend
        return x


class Decomposition(nn.Module):
    """Split a series into what remains and its moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.AvgPool1d(3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shape: (batch, tokens, features)."""
        trend = self.average(x.mT).mT
        return x - trend, trend


STREAMS: dict[str, type[Program]] = {
    "macaron": Macaron,
    "parallel": ParallelBranches,
    "reversible": Reversible,
    "two": TwoStreams,
    "hyper": HyperConnections,
    "trend": Trend,
}


def program_of(spec: Spec, width: int, *, is_last_block: bool) -> Program:
    """Make what one block of a spec does."""
    program = STREAMS.get(spec.stream, Program)(spec, width)
    if spec.stream == "broadcast" and is_last_block:
        program.sublayers[0].takes_first_token_only = True
    return program
