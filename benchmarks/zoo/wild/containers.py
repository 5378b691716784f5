"""Where the modules of blocks are registered, and what calls them: lists, stages, dictionaries, attributes, closures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from .parts import LAYOUTS, WIDTH
from .spec import Spec
from .streams import HyperConnections, Program, Sublayer, program_of

__all__ = ["Model"]

DEPTH, INPUTS, OUTPUTS = 2, 10, 5
Run = Callable[[Any, Tensor | None, dict[str, Tensor]], Any]


class Block(nn.Module):
    """A block that holds the modules of its sub-layers by name."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for name, module in program.modules.items():
            self.add_module(name, module)
        self.program = program

    def forward(self, x: Any, memory: Tensor | None = None, state: dict[str, Tensor] | None = None) -> Any:
        """Return the stream after the block."""
        return self.program(x, memory, state)


class Model(nn.Module):
    """A projection to the stream's width, blocks, a norm, a head.

    Attributes:
        programs: What the blocks do, in the order in which they run.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.layout = spec, LAYOUTS[spec.layout]
        self.embed = self.layout.linear(INPUTS, WIDTH)
        self.programs: list[Program] = []
        self.runs: list[Run] = []
        getattr(self, f"_{'nested' if spec.stream == 'nested' else spec.container}")()
        width = self.programs[-1].width
        if spec.stream == "long_cat":
            self.joins = nn.ModuleList(self.layout.linear(2 * width, width) for _ in range(len(self.runs) // 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, OUTPUTS)

    @property
    def sublayers(self) -> list[Sublayer]:
        """All sub-layers, in the order in which they run."""
        return [sublayer for program in self.programs for sublayer in program.sublayers]

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Take features and, for cross-attention and a second stream, others; both in the model's layout."""
        h, state = self._entered(self.embed(x), memory), dict[str, Tensor]()
        if self.spec.stream in ("long_add", "long_cat"):
            h = self._with_long_skips(h, memory, state)
        else:
            for run in self.runs:
                h = run(h, memory, state)
        return self.head(self.norm(self._left(h, state).movedim(self.layout.axis, -1)))

    def _entered(self, h: Tensor, memory: Tensor | None) -> Any:
        """Return what enters the first block."""
        stream = self.spec.stream
        if stream == "reversible":
            return torch.cat([h, h], self.layout.axis)
        if stream == "hyper":
            return torch.stack([h] * HyperConnections.COUNT, 2)
        return (h, memory) if stream == "two" else h

    def _left(self, h: Any, state: dict[str, Tensor]) -> Tensor:
        """Return the one stream that is left after the last block."""
        stream = self.spec.stream
        if stream == "reversible":
            return torch.stack(h.chunk(2, self.layout.axis)).sum(0)
        if stream == "hyper":
            return h.sum(2)
        if stream == "trend":
            return h + state["trend"]
        return torch.cat([part.movedim(self.layout.axis, -1).flatten(0, -2) for part in h]) if stream == "two" else h

    def _with_long_skips(self, h: Tensor, memory: Tensor | None, state: dict[str, Tensor]) -> Tensor:
        """Run the first half of the blocks and keep what each returns, then the other half with what was kept."""
        half, kept = len(self.runs) // 2, []
        for run in self.runs[:half]:
            h = run(h, memory, state)
            kept.append(h)
        for i, run in enumerate(self.runs[half:]):
            before = kept.pop()
            h = self.joins[i](torch.cat([h, before], self.layout.axis)) if self.spec.stream == "long_cat" else h + before
            h = run(h, memory, state)
        return h

    # --- containers ---------------------------------------------------------------------------------------------------

    def _made(self, width: int = WIDTH, count: int | None = None, *, is_end: bool = True) -> list[Program]:
        """Make what some blocks do."""
        if count is None:
            count = {"broadcast": 3, "long_add": 4, "long_cat": 4}.get(self.spec.stream, DEPTH)
        made = [program_of(self.spec, width, is_last_block=is_end and i + 1 == count) for i in range(count)]
        self.programs += made
        return made

    def _wrapped(self, program: Program) -> nn.Module:
        block: nn.Module = Block(program)
        if self.spec.wrapper == "compile":
            block = torch.compile(block, backend="eager")
        return checkpoint_wrapper(block) if self.spec.wrapper == "checkpoint" else block

    def _blocks(self) -> None:
        self.blocks = nn.ModuleList(map(self._wrapped, self._made()))
        self.runs = list(self.blocks)

    def _sequential(self) -> None:
        self.blocks = nn.Sequential(*map(self._wrapped, self._made()))
        self.runs = [_WithOneArgument(self.blocks)]

    def _attributes(self) -> None:
        self.runs = list(map(self._wrapped, self._made()))  # a plain list, which registers nothing
        for i, block in enumerate(self.runs):
            self.add_module(f"layer{i}", block)

    def _tied(self) -> None:
        self.block = self._wrapped(self._made(count=1)[0])
        self.runs = [self.block] * (DEPTH + 1)

    def _pairs(self) -> None:
        self.runs = list(self._made())
        self.layers = nn.ModuleList(nn.ModuleList(program.modules.values()) for program in self.programs)

    def _dicts(self) -> None:
        self.runs = list(self._made())
        self.layers = nn.ModuleList(nn.ModuleDict(program.modules) for program in self.programs)

    def _columns(self) -> None:
        """One list for all attentions, one for all their norms, and so on; closures run them."""
        self.runs = [lambda x, memory, state, run=run: run(x, memory, state) for run in self._made()]
        for name in self.programs[0].modules:
            self.add_module(f"{name}s", nn.ModuleList(program.modules[name] for program in self.programs))

    def _flat(self) -> None:
        """One list of sub-layers, not of blocks."""
        self.runs = list(self._made())
        held = (list(sublayer.modules.values()) for sublayer in self.sublayers)
        self.layers = nn.ModuleList(modules[0] if len(modules) == 1 else nn.ModuleList(modules) for modules in held)

    def _stages(self) -> None:
        """Two stages of another width each, which hold lists of the parts of a block."""
        self.stages = nn.ModuleList()
        for width, count in ((WIDTH, DEPTH), (WIDTH + 8, DEPTH + 1)):
            down = self.layout.linear(WIDTH, width) if width != WIDTH else None
            self.stages.append(Stage(down, self._made(width, count)))
        self.runs = list(self.stages)

    def _nested(self) -> None:
        self.down_blocks = nn.ModuleList()
        for _ in range(DEPTH):
            nested = Nested(self.layout, list(map(self._wrapped, self._made())))
            self.down_blocks.append(Down(nested))
        self.runs = list(self.down_blocks)


class _WithOneArgument:
    """Runs a module that takes the stream alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        return self.module(x)


class Stage(nn.Module):
    """Perhaps a projection to another width, then layers, each a list of its parts."""

    def __init__(self, down: nn.Module | None, programs: list[Program]) -> None:
        super().__init__()
        self.down, self.programs = down, programs
        self.layers = nn.ModuleList(nn.ModuleList(program.modules.values()) for program in programs)

    def forward(self, x: Tensor, memory: Tensor | None, state: dict[str, Tensor]) -> Tensor:
        """Return the stream after the stage."""
        x = x if self.down is None else self.down(x)
        for program in self.programs:
            x = program(x, memory, state)
        return x


class Nested(nn.Module):
    """x + proj_out(blocks(proj_in(x))), as diffusers' Transformer2DModel."""

    def __init__(self, layout: Any, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.proj_in, self.proj_out = layout.linear(WIDTH, WIDTH), layout.linear(WIDTH, WIDTH)
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, memory: Tensor | None, state: dict[str, Tensor]) -> Tensor:
        """Return the stream after all blocks."""
        h = self.proj_in(x)
        for block in self.transformer_blocks:
            h = block(h, memory, state)
        return x + self.proj_out(h)


class Down(nn.Module):
    """A numbered module around a nested one, as the parts of a UNet."""

    def __init__(self, nested: Nested) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([nested])

    def forward(self, x: Tensor, memory: Tensor | None, state: dict[str, Tensor]) -> Tensor:
        """Return the stream after all blocks."""
        return self.attentions[0](x, memory, state)
