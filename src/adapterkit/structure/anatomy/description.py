"""What a forward pass shows of a transformer's structure: its residual sub-layers, blocks and embeddings, as values.

In one pre-norm block

    x = x + attention(norm1(x))      stream x, branch attention(norm1(x)), addition, and the sum is the next stream
    x = x + mlp(norm2(x))

the **stream** is what runs through all blocks, a **branch** is what a sub-layer computes from it, and an **addition** puts
the branch back into the stream. A `Sublayer` is one branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..pytree import Argument, Path

__all__ = [
    "Anatomy",
    "FusedProjection",
    "Kind",
    "ModuleInput",
    "ModuleOutput",
    "Norm",
    "Product",
    "Slices",
    "Stray",
    "Sublayer",
    "Unknown",
    "Unlike",
]

Kind = Literal["attention", "crossattention", "feedforward", "convolution", "mixer"]
Norm = Literal["pre", "post", "sandwich", "end", "none"]
# For each of "q", "k" and "v" that a projection makes: its features as ranges (start, stop), rising and apart.
# Example: (("q", ((0, 8),)), ("k", ((8, 16),)), ("v", ((16, 24),)))
Slices = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True)
class ModuleOutput:
    """A tensor that a module returns.

    Attributes:
        path: The module.
        output: Where it lies in the module's output.
        shape: Its shape in the traced forward.
        axis: The axis of its features, from the end (-1 is the last); None where the trace does not tell.
    """

    path: str
    output: Path
    shape: tuple[int, ...]
    axis: int | None


@dataclass(frozen=True)
class ModuleInput:
    """A module that takes the residual stream, and as which argument."""

    path: str
    argument: Argument


@dataclass(frozen=True)
class FusedProjection:
    """A module that projects to more than one of an attention's queries, keys and values, and which features are whose.

    Attributes:
        path: The module.
        weight: The name, in the module, of the parameter that it projects with inside; None where what the module returns
            is what was projected.
        axis: The axis of the features: of the module's output, from the end; or of that parameter, from the front.
        slices: The features of each; () where they cannot be told apart.
        problem: Why they cannot, for the message of an error; empty where they can.
    """

    path: str
    weight: str | None
    axis: int
    slices: Slices
    problem: str = ""


@dataclass(frozen=True)
class Product:
    """What a block multiplies by: a linear layer, or a Parameter that a module multiplies by itself.

    Attributes:
        path: The innermost module that multiplies.
        weight: The Parameter's name in the model; None where the weight is none (quantised), or is computed.
        parts: What it is in its branch: "first", "last", both or neither.
        is_output: Whether the module returns the product.
    """

    path: str
    weight: str | None
    parts: tuple[str, ...]
    is_output: bool


@dataclass(frozen=True)
class Sublayer:
    """A branch of the network that is added to the residual stream.

    Attributes:
        kind: What it does: attention, cross-attention, feed-forward (a mixture of experts is one, too), convolution, or
            another way of mixing tokens.
        block: The repeated block that it lies in; None outside of any.
        out: The outermost module whose output is the branch's; None if no module returns it.
        first: The modules of its first projections.
        last: The modules of its last projections.
        query, key, value: The modules of an attention's projections; the same one in each for a fused projection.
        fused: Of these, the fused ones, and which of their features are whose.
        scales: Operations between `out` and the addition that change values (LayerScale): () if what `out` returns is
            what is added.
        is_parallel: Whether another branch of the block starts from the same stream and is added with this one.
        is_moe: Whether it routes tokens to experts.
        is_last: Whether no other sub-layer of the block follows on the same stream.
        norm: Where the block normalises: before the branch ("pre"), after the addition ("post"), at the branch's end
            ("end"), before and at the end ("sandwich"), or not at all ("none").
        stream: A module that takes the residual stream, which the branch is computed from, before the branch ends; None if
            there is none.
        skip: A module that takes what the branch is added to. It is `stream`, but in reversible blocks, which add to one
            stream what they compute from another, and where the stream is scaled before it is added to.
        sum: A module of the block that returns the sum, before anything of the block reads it.
        post_norm: The norm that takes the sum, in a post-norm block, as the module and its place.
        shares_norm: Whether that norm runs on other tensors, too, in one call of the block.
        is_end_by_hand: Whether a function normalises what `out` returns, before it is added: an adapter at `out` would be
            normalised with it.
        is_normalised_by_hand: Whether a function or a few operations, and no module, normalise the sum.
        addition: Where it is added: the module around the addition, and its node in the trace.
    """

    kind: Kind
    block: str | None
    out: ModuleOutput | None
    first: tuple[str, ...]
    last: tuple[str, ...]
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    fused: tuple[FusedProjection, ...]
    scales: tuple[str, ...]
    is_parallel: bool
    is_moe: bool
    is_last: bool
    norm: Norm
    stream: ModuleInput | None
    skip: ModuleInput | None
    sum: ModuleOutput | None
    post_norm: ModuleOutput | None
    shares_norm: bool
    is_end_by_hand: bool
    is_normalised_by_hand: bool
    addition: tuple[str, int]


@dataclass(frozen=True)
class Unknown:
    """An operation of which neither its name nor numbers tell what it does.

    Attributes:
        path: The innermost module that runs it.
        operation: Its name, with its namespace.
        reason: What is known of it, or why it could not be asked.
        is_aside: Whether no block depends on it and no step of a stream comes after it: it runs in a stem or a head.
    """

    path: str
    operation: str
    reason: str
    is_aside: bool = False


class Stray(NamedTuple):
    """An attention in a block, on no branch.

    Attributes:
        block: The path of the block.
        path: The outermost module in it that attends.
        is_mixed: Whether the stream goes around it, too: a gated unit, say, mixes both. If not, it makes the stream.
    """

    block: str
    path: str
    is_mixed: bool


@dataclass(frozen=True)
class Unlike:
    """A block in which something else was found than in one of the same classes and shapes.

    Attributes:
        block: Its path; `like`, that of the other.
        what: The second word of the roles that differ: "out", "q", "k", "v", "first" or "last".
        here: What has these roles in the block, as "kind: path" with paths from the block on; `there`, in the other.
    """

    block: str
    like: str
    what: str
    here: tuple[str, ...]
    there: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """The structure of a model.

    Attributes:
        sublayers: Those in repeated blocks, in the order that they run.
        others: Those outside of any repeated block.
        embeddings: What makes the residual stream that enters the first block, one for each stack of blocks.
        output_embeddings: What maps hidden states to logits over the tokens that an embedding knows.
        blocks: What each repeated block returns as its stream.
        stacks: Of each stack, of each of its blocks in the order in which they run: the paths of what holds it, which are
            several where no module holds all of it.
        unexplained: Projections after the last sub-layer of their block that lead on, on no branch: (block, module).
        stray: Attentions in a block that are on no branch.
        idle: Modules that are built as the blocks beside them, but did not run.
        unknown: What is not understood: roles and presets do not rest on it, and say so.
        products: What the transformer blocks multiply by, but for routers and convolutions.
        resting: Modules of experts that no token of the traced forward chose.
        unread: Linear layers of the blocks that did not run, and whose weight nothing read.
        unlike: Blocks in which something else was found than in others of the same build.
    """

    sublayers: tuple[Sublayer, ...]
    others: tuple[Sublayer, ...]
    embeddings: tuple[ModuleOutput, ...]
    output_embeddings: tuple[ModuleOutput, ...]
    blocks: tuple[ModuleOutput, ...]
    stacks: tuple[tuple[tuple[str, ...], ...], ...] = ()
    unexplained: tuple[tuple[str, str], ...] = ()
    stray: tuple[Stray, ...] = ()
    idle: tuple[str, ...] = ()
    unknown: tuple[Unknown, ...] = ()
    products: tuple[Product, ...] = ()
    resting: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()
    unlike: tuple[Unlike, ...] = ()

    @property
    def transformer_blocks(self) -> frozenset[str | None]:
        """Return the blocks that do more than convolve: those of a CNN, or of one in front of a transformer, do not."""
        more = {sublayer.block for sublayer in self.sublayers if sublayer.kind != "convolution"}
        # A block that nothing holds as one has a path for each part, and its convolution is as much of it as its attention.
        mates = (path for stack in self.stacks for block in stack if more & {*block} for path in block)
        return frozenset({*more, *mates})
