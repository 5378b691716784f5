"""Put the anatomy together: of each branch its module, what it does, where it is normalised, and what is around it.

`BranchReader` finds branches, `find_blocks` their blocks; here each becomes a `Sublayer`. A module that is called several
times (ALBERT runs one block twelve times) has one sub-layer, which holds what all calls agree on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import reduce
from operator import or_

from torch import nn

from ..paths import ancestors
from ..tracing.flow import VIEWS, Flow, bits
from ..tracing.graph import ModuleCall
from .additions import Addition, follows
from .alike import unlike
from .blocks import find_blocks, stacks_of, template_of, within
from .branches import Branch, BranchReader, Turn
from .description import Anatomy, ModuleOutput, Norm, Stray, Sublayer
from .fused import fused_projections
from .norms import Norms
from .products import first_of, last_of, products, resting, unread
from .streams import Streams
from .unknown import unknown_operations
from .vocabulary import output_calls

__all__ = ["dissect"]


def dissect(flow: Flow, modules: dict[str, nn.Module]) -> Anatomy:
    """Return the anatomy of the model whose forward this is.

    Args:
        modules: The model's modules by path.
    """
    reader = BranchReader(flow, modules)
    branches = [branch for addition in reader.additions for branch in reader.branches(addition)]
    turns = find_blocks(flow, modules, branches)
    idle_experts = resting(flow, modules, branches)
    dissection = _Dissection(reader, idle_experts)
    sublayers = dissection.sublayers(branches)
    inside = tuple(s for s in sublayers if s.block is not None)
    multiplied = products(flow, modules, branches, idle_experts)
    return Anatomy(
        sublayers=inside,
        others=tuple(s for s in sublayers if s.block is None),
        embeddings=tuple(dissection.embeddings(branches)),
        output_embeddings=tuple(dissection.output_embeddings(branches)),
        blocks=tuple(dissection.blocks(sublayers, turns)),
        stacks=stacks_of(flow, modules, turns),
        unexplained=tuple(dissection.unexplained(branches)),
        stray=tuple(dissection.stray(branches)),
        unknown=tuple(unknown_operations(flow, branches)),
        idle=tuple(dissection.idle(inside)),
        products=tuple(multiplied),
        resting=frozenset(path for paths in idle_experts.values() for path in paths),
        unread=tuple(unread(flow, modules, branches, multiplied)),
        unlike=tuple(unlike(flow, modules, dissection.in_blocks(sublayers, turns), {s.block or "" for s in inside})),
    )


class _Dissection:
    """Puts branches together with the norms and streams around them."""

    def __init__(self, reader: BranchReader, resting: dict[str, tuple[str, ...]]) -> None:
        self.reader, self.flow, self.axes, self.additions = reader, reader.flow, reader.axes, reader.additions
        self.replays, self.resting = reader.replays, resting
        self.streams = Streams(reader)
        self.norms = Norms(self.flow, self.additions, self.replays)
        self._numbers: dict[int, int] = {}  # `id` of a branch -> which sub-layer it is

    # --- sub-layers ---------------------------------------------------------------------------------------------------

    def sublayers(self, branches: list[Branch]) -> list[Sublayer]:
        """List one sub-layer for each module that yields a branch, in the order in which they run."""
        found: dict[object, list[Sublayer]] = {}
        for branch in branches:
            sublayer = self._sublayer(branch)
            key = (sublayer.out.path, sublayer.out.output) if sublayer.out else id(branch)
            self._numbers[id(branch)] = [*found, key].index(key)
            found.setdefault(key, []).append(sublayer)
        merged = [_agreed(calls) for calls in found.values()]
        # A norm after the addition counts only if all blocks have it: the last block of a pre-norm model is followed by a
        # norm as well, and that is the model's final one.
        groups: dict[object, list[Sublayer]] = {}
        for sublayer in merged:
            groups.setdefault((template_of(sublayer.out.path) if sublayer.out else None, sublayer.kind), []).append(
                sublayer
            )
        for group in groups.values():
            if any(s.post_norm is None for s in group):
                # Nothing may follow the last block that would show its norm: what the others do, it does.
                is_by_hand = any(s.is_normalised_by_hand for s in group)
                is_sum = any(self.norms.is_stream(s.addition[1]) for s in group)
                change = _with_post_by_hand if is_by_hand and not is_sum else _without_post
                merged = [change(s) if s in group else s for s in merged]
        return merged

    def _sublayer(self, branch: Branch) -> Sublayer:
        """Describe one branch in one call."""
        flow, addition = self.flow, branch.addition
        attended = list(self.reader.attentions.projected(branch.inside))
        call = self.norms.after(branch)
        post = self.reader.output_of(call, call.outputs[0][0]) if call else None
        is_by_hand = call is None and self.norms.is_after_by_hand(branch)
        node_call = addition.node.call
        stream, is_one = (
            self.streams.taker(branch, self.streams.entering(branch)),
            flow.source(addition.stream) == flow.source(addition.skip),
        )

        def making(part: str) -> tuple[str, ...]:
            return self._modules_of(sorted({one.node for one in attended if one.part == part}))

        return Sublayer(
            kind=branch.kind,
            block=branch.block,
            out=self._yielded(branch),
            first=self._with_resting(self._modules_of(bits(first_of(flow, branch)))),
            last=self._with_resting(self._modules_of(bits(last_of(flow, branch)))),
            query=making("q"),
            key=making("k"),
            value=making("v"),
            fused=tuple(fused_projections(self.flow, self.axes, self.replays, attended)),
            scales=branch.scales,
            is_parallel=branch.is_parallel or self._has_sibling(branch),
            is_moe=branch.is_moe,
            is_last=self._is_last(branch),
            norm=self.norms.kind(branch, is_after=post is not None or is_by_hand),
            stream=stream,
            skip=stream if is_one else self.streams.taker(branch, addition.skip),
            sum=self.streams.sum(branch),
            post_norm=post,
            shares_norm=post is not None and self.norms.runs_again(post.path, branch),
            is_end_by_hand=self.norms.is_end_by_hand(branch),
            is_normalised_by_hand=is_by_hand,
            addition=((node_call.path if node_call else None) or "", addition.node.index),
        )

    def _is_last(self, branch: Branch) -> bool:
        """Tell whether no other branch of the block is added to what this one was; of parallel ones, the last that runs."""
        mates = [other for other in branch.turn.branches if other is not branch] if branch.turn else []
        beside = [other for other in mates if other.addition is branch.addition and other.end > branch.end]
        after = [other for other in mates if follows(self.flow, branch.addition, self.flow.unscaled(other.addition.skip))]
        # A mixer's sum that the block goes on with, gated or mixed as it may be, is no end; a feed-forward's is.
        later = [other for other in mates if self.flow.leads_to(branch.addition.node.index, other.end)]
        return not beside and not after and (branch.kind == "feedforward" or not later)

    def _yielded(self, branch: Branch) -> ModuleOutput | None:
        """Return the output of the module that yields a branch; None if none does."""
        if branch.call is None:
            return None
        call, path = branch.call
        output = self.reader.output_of(call, path)
        # The addition knows best: its other operand is the stream, and the features must lie where the stream has them.
        axis = self.axes.on_the_way(dict(call.outputs)[path], branch.end, self.axes.of(branch.addition.skip))
        return output if axis is None else replace(output, axis=axis - len(output.shape))

    def _has_sibling(self, branch: Branch) -> bool:
        """Tell whether the skip is itself a sum with this branch's stream: (x + attention(x)) + mlp(x)."""
        source, stream = self.flow.source(branch.addition.skip), branch.addition.stream
        return source != stream and any(a.node.index == source and a.stream == stream for a in self.additions)

    def _modules_of(self, nodes: Iterable[int]) -> tuple[str, ...]:
        """Return the paths of the innermost modules that ran these nodes, each once."""
        calls = [self.flow.nodes[i].call for i in nodes]
        return tuple(dict.fromkeys(call.path for call in calls if call is not None and call.path is not None))

    def _with_resting(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Return the paths, with those of the same layers in experts that did not run."""
        return tuple(dict.fromkeys((*paths, *(other for path in paths for other in self.resting.get(path, ())))))

    # --- what is left -------------------------------------------------------------------------------------------------

    def unexplained(self, branches: list[Branch]) -> Iterator[tuple[str, str]]:
        """Yield (block, module) of projections that come after the last step in their block and lead on, on no branch.

        They mean that a block computes something which is not understood, so that its last sub-layer is not known.
        """
        flow, explained = self.flow, 0
        for a in self.reader.every_addition:
            explained |= flow.between(a.stream, a.branch) | flow.between(a.stream, a.skip)
        last = {branch.block: branch.addition.node.index for branch in branches if branch.block is not None}
        for block, step in last.items():
            inner_blocks = [inner for inner in last if inner != block and within(inner, block)]
            for i in bits(flow.projections & flow.descendants[step] & ~explained):
                path = self._path_of(i)
                # In a block inside this one it may come before that one's last step, and is that one's to explain.
                is_inner = any(within(path or "", inner) for inner in inner_blocks)
                if path is not None and within(path, block) and not is_inner and self._leads_out(i, block):
                    yield block, path

    def stray(self, branches: list[Branch]) -> Iterator[Stray]:
        """Yield the attentions in a block that are on no branch."""
        flow, on_branches, on_any = self.flow, self._inside(self.additions), self._inside(self.reader.every_addition)
        for core in bits(flow.attentions & ~on_branches):
            call = flow.nodes[core].call
            around = [c for c in call.around() if c.path is not None] if call else []
            following = (b for b in branches if b.block is not None and flow.leads_to(core, b.addition.stream))
            mates = ((b, [c for c in around if within(c.path or "", b.block)]) for b in following)
            branch, calls = next(((b, calls) for b, calls in mates if calls), (None, []))
            if branch is not None:
                is_mixed = not on_any >> core & 1 and self._has_way_around(core, calls[-1], branch.addition.stream)
                yield Stray(branch.block or "", calls[0].path or "", is_mixed)

    def _inside(self, additions: list[Addition]) -> int:
        """Return the set of nodes in the branches of additions."""
        return reduce(or_, (self.flow.between(a.stream, a.branch) for a in additions), 0)

    def _has_way_around(self, core: int, call: ModuleCall, stream: int) -> bool:
        """Tell whether a stream comes of what a call took, also by a way that does not lead through a node in it."""
        taken = (i for _, i in call.inputs if self.flow.leads_to(i, stream))
        return any(not self.flow.passed(i, [stream]) >> core & 1 for i in taken)

    def _path_of(self, node: int) -> str | None:
        """Return the path of the innermost module that ran a node; None if the model holds none that did."""
        call = self.flow.nodes[node].call
        return None if call is None else call.path

    def _leads_out(self, node: int, block: str) -> bool:
        """Tell whether something outside of a block depends on a node in it."""
        after = (self.flow.nodes[j].call for j in bits(self.flow.descendants[node]))
        return any(call is not None and not within(call.path or "", block) for call in after)

    def idle(self, sublayers: tuple[Sublayer, ...]) -> Iterator[str]:
        """Yield the modules beside blocks, and of the same class, that were not called: skipped by the example inputs."""
        modules = self.reader.modules
        ran = {path for call in self.flow.calls for path in ancestors(call.path or "")}
        for holder, kind in {(s.block.rpartition(".")[0], type(modules[s.block])) for s in sublayers if s.block}:
            for name, child in modules[holder]._modules.items():
                path = f"{holder}.{name}".lstrip(".")
                if type(child) is kind and path not in ran and modules[path] is child:
                    yield path

    # --- embeddings and blocks ----------------------------------------------------------------------------------------

    def embeddings(self, branches: list[Branch]) -> Iterator[ModuleOutput]:
        """Yield what returns the stream that enters the first block of each stack."""
        flow = self.flow
        for stream, branch in self._entries(branches).items():
            for i in self._same(stream):
                calls = [
                    (call, path)
                    for call, path in flow.returned.get(i, [])
                    if call.end is not None and call.end <= branch.addition.node.index and self.reader.is_hookable(call)
                    if not within(call.path or "", branch.block)
                ]
                if calls:
                    call, path = min(calls, key=lambda found: len(list(found[0].around())))  # the outermost
                    yield self.reader.output_of(call, path)
                    break

    def output_embeddings(self, branches: list[Branch]) -> Iterator[ModuleOutput]:
        """Yield what maps the last hidden states to logits over tokens; nothing in a block does."""
        blocks = {branch.block for branch in branches if branch.block}
        for call in output_calls(self.flow, self._entries(branches)):
            if self.reader.can_carry(call) and not any(within(call.path or "", block) for block in blocks):
                yield self.reader.output_of(call, call.outputs[0][0])

    def _entries(self, branches: list[Branch]) -> dict[int, Branch]:
        """Map the stream that enters the first block of each stack to that block's first branch."""
        flow, entries = self.flow, dict[int, Branch]()
        added = sum(1 << branch.addition.node.index for branch in {id(b.addition): b for b in branches}.values())
        for branch in branches:
            stream = flow.source(branch.addition.stream)
            # It enters a stack if it is no sum itself, and comes of none.
            if branch.block is not None and not flow.ancestors[stream] & added and not added >> stream & 1:
                entries.setdefault(stream, branch)
        return entries

    def _same(self, node: int) -> list[int]:
        """List the node and its views."""
        views = [i for i in self.flow.readers[node] if self.flow.nodes[i].op in VIEWS]
        return [node, *(j for i in views for j in self._same(i))]

    def in_blocks(self, sublayers: list[Sublayer], turns: list[Turn]) -> dict[str, list[Sublayer]]:
        """Map the path of each block to its sub-layers; blocks that no one module holds are left out."""
        return {
            turn.branches[0].block: [sublayers[self._numbers[id(branch)]] for branch in turn.branches]
            for turn in turns
            if turn.branches[0].block and len({branch.block for branch in turn.branches}) == 1
        }

    def blocks(self, sublayers: list[Sublayer], turns: list[Turn]) -> Iterator[ModuleOutput]:
        """Yield what each block returns as its stream: the last sub-layer's sum, or its norm."""
        for number in dict.fromkeys(self._numbers[id(turn.branches[-1])] for turn in turns):
            last = sublayers[number]
            output = last.post_norm if last.norm == "post" else last.sum
            if output is not None:
                yield output


def _agreed(calls: list[Sublayer]) -> Sublayer:
    """Return one sub-layer for all calls of the same module: it keeps what is the same in each."""
    first = calls[0]
    agreed = replace(
        first,
        is_last=any(call.is_last for call in calls),
        sum=first.sum if all(call.sum == first.sum for call in calls) else None,
        stream=first.stream if all(call.stream == first.stream for call in calls) else None,
        skip=first.skip if all(call.skip == first.skip for call in calls) else None,
        fused=tuple(
            fused
            if all(fused in call.fused for call in calls)
            else replace(fused, slices=(), problem="they differ between its calls")
            for fused in first.fused
        ),
    )
    return agreed if all(call.post_norm == first.post_norm for call in calls) else _without_post(agreed)


def _without_post(sublayer: Sublayer) -> Sublayer:
    """Return the sub-layer without the norm after its addition."""
    norm: Norm = "none" if sublayer.norm == "post" else sublayer.norm
    return replace(sublayer, post_norm=None, is_normalised_by_hand=False, norm=norm)


def _with_post_by_hand(sublayer: Sublayer) -> Sublayer:
    """Return the sub-layer with a norm after its addition that is no module's."""
    norm: Norm = "post" if sublayer.norm == "none" else sublayer.norm
    return replace(sublayer, post_norm=None, is_normalised_by_hand=True, norm=norm)
