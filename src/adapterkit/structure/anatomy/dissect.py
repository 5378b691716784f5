"""From residual additions to sub-layers: which module yields each branch, what it does, where it is normalised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from .. import pytree
from ..paths import ancestors
from ..tracing.flow import SCALES, VIEWS, WHOLE_NORMS, Flow, bits
from ..tracing.graph import ModuleCall
from ..tracing.replay import Replays
from .additions import follows
from .blocks import find_blocks, template_of, within
from .branches import Branch, BranchReader
from .description import Anatomy, ModuleInput, ModuleOutput, Norm, Sublayer
from .fused import fused_projections
from .kinds import projected
from .vocabulary import output_calls

__all__ = ["dissect"]


def dissect(flow: Flow, modules: dict[str, nn.Module]) -> Anatomy:
    """The anatomy of the model whose forward this is."""
    reader = BranchReader(flow, modules)
    branches = [branch for addition in reader.additions for branch in reader.branches(addition)]
    find_blocks(flow, modules, branches)
    dissection = _Dissection(reader)
    sublayers = dissection.sublayers(branches)
    inside = tuple(s for s in sublayers if s.block is not None)
    return Anatomy(
        sublayers=inside,
        others=tuple(s for s in sublayers if s.block is None),
        embeddings=tuple(dissection.embeddings(branches)),
        output_embeddings=tuple(dissection.output_embeddings(branches)),
        blocks=tuple(dissection.blocks(inside)),
        unexplained=tuple(dissection.unexplained(branches)),
        idle=tuple(dissection.idle(inside)),
    )


class _Dissection:
    """Puts branches together with the norms and streams around them."""

    def __init__(self, reader: BranchReader) -> None:
        self.reader, self.flow, self.axes, self.additions = reader, reader.flow, reader.axes, reader.additions
        self.replays = Replays(reader.flow)

    # --- sub-layers ---------------------------------------------------------------------------------------------------

    def sublayers(self, branches: list[Branch]) -> list[Sublayer]:
        """One for each module that yields a branch, in the order that they run; a norm is as all of its kind say."""
        found: dict[object, list[Sublayer]] = {}
        for branch in branches:
            sublayer = self._sublayer(branch, branches)
            key = (sublayer.out.path, sublayer.out.output) if sublayer.out else id(branch)
            found.setdefault(key, []).append(sublayer)
        merged = [_agreed(calls) for calls in found.values()]
        groups: dict[object, list[Sublayer]] = {}
        for sublayer in merged:
            groups.setdefault((template_of(sublayer.out.path) if sublayer.out else None, sublayer.kind), []).append(
                sublayer
            )
        for group in groups.values():
            if any(s.post_norm is None for s in group):
                merged = [_without_post(s) if s in group else s for s in merged]
        return merged

    def _sublayer(self, branch: Branch, branches: list[Branch]) -> Sublayer:
        flow, addition = self.flow, branch.addition
        place = None
        if branch.call is not None:
            call, path = branch.call
            place = self._place(call, path)
            axis = self.axes.on_the_way(dict(call.outputs)[path], branch.end, self.axes.of(branch.addition.skip))
            place = place if axis is None else replace(place, axis=axis - len(place.shape))
        attended = list(projected(flow, branch.inside))
        projections = branch.inside & flow.projections
        first = [i for i in bits(projections) if not flow.ancestors[i] & projections]
        last = flow.nearest(branch.end, projections, branch.inside)
        post = self._post_norm(branch)
        node_call = addition.node.call
        return Sublayer(
            kind=branch.kind,
            block=branch.block,
            out=place,
            first=self._modules_of(first),
            last=self._modules_of(bits(last)),
            query=self._modules_of(sorted({one.node for one in attended if one.part == "q"})),
            key=self._modules_of(sorted({one.node for one in attended if one.part == "k"})),
            value=self._modules_of(sorted({one.node for one in attended if one.part == "v"})),
            fused=tuple(fused_projections(self.flow, self.axes, self.replays, attended)),
            scales=branch.scales,
            is_parallel=branch.is_parallel or self._has_sibling(branch),
            is_moe=branch.is_moe,
            is_last=self._is_last(branch, branches),
            norm=self._norm(branch, post),
            stream=self._port(branch),
            sum=self._sum(branch),
            post_norm=post,
            shares_norm=post is not None and self._runs_again(post.path, branch),
            addition=((node_call.path if node_call else None) or "", addition.node.index),
        )

    def _is_last(self, branch: Branch, branches: list[Branch]) -> bool:
        """Whether no other branch of the block is added to what this one was; of parallel ones, the last that runs."""
        mates = [other for other in branches if other.block == branch.block and other is not branch]
        beside = [other for other in mates if other.addition is branch.addition and other.end > branch.end]
        after = [other for other in mates if follows(self.flow, branch.addition, self.flow.unscaled(other.addition.skip))]
        return not beside and not after

    def _place(self, call: ModuleCall, path: pytree.Path) -> ModuleOutput:
        """What a call returned at a path of its output."""
        node = self.flow.nodes[dict(call.outputs)[path]]
        axis = self.axes.of(node.index)
        return ModuleOutput(call.path or "", path, node.shape, None if axis is None else axis - len(node.shape))

    def _has_sibling(self, branch: Branch) -> bool:
        """Whether the skip is itself a sum with this branch's stream: (x + attention(x)) + mlp(x)."""
        source = self.flow.source(branch.addition.skip)
        return source != branch.addition.stream and any(other.node.index == source for other in self.additions)

    def _modules_of(self, nodes: Iterable[int]) -> tuple[str, ...]:
        """The innermost modules that ran these nodes."""
        calls = [self.flow.nodes[i].call for i in nodes]
        return tuple(dict.fromkeys(call.path for call in calls if call is not None and call.path is not None))

    # --- norms and streams --------------------------------------------------------------------------------------------

    def _norm(self, branch: Branch, post: ModuleOutput | None) -> Norm:
        flow = self.flow
        root = flow.source(branch.addition.stream)
        pre = any(
            any(flow.source(i) == root for _, i in call.inputs) and any(branch.inside >> i & 1 for _, i in call.outputs)
            for call in flow.norm_calls
        )
        end = flow.source(branch.end, VIEWS | SCALES)
        at_end = any(i in (end, branch.end) for call in flow.norm_calls for _, i in call.outputs)
        if pre:
            return "sandwich" if at_end else "pre"
        is_post = post is not None or self._is_normalised_by_a_function(branch)
        return "end" if at_end else "post" if is_post else "none"

    def _post_norm(self, branch: Branch) -> ModuleOutput | None:
        """The norm, in the block or beside it, that takes the sum and makes the stream of it."""
        flow, node = self.flow, branch.addition.node.index
        if self._is_stream(node):
            return None
        readers = self._readers(node)
        for call in flow.norm_calls:
            takes = any(flow.source(i) == flow.source(node) for _, i in call.inputs)
            is_inside = within(call.path or "", branch.block)
            if not takes or call.path is None or not call.outputs:
                continue
            alone = bool(readers) and all(call.start <= i < (call.end or 0) for i in readers)
            is_beside = call.parent is branch.addition.node.call and (alone or self._is_stream(call.outputs[0][1]))
            if is_inside or is_beside:
                return self._place(call, call.outputs[0][0])
        return None

    def _is_stream(self, node: int) -> bool:
        """Whether something is added to a node in turn."""
        return any(node in (a.stream, self.flow.source(a.skip)) for a in self.additions)

    def _is_normalised_by_a_function(self, branch: Branch) -> bool:
        """Whether a norm that is no module's makes the stream of the sum."""
        flow, node = self.flow, branch.addition.node.index
        norms = [i for i in self._readers(node) if flow.nodes[i].op in WHOLE_NORMS]
        return not self._is_stream(node) and any(self._is_stream(i) for i in norms)

    def _runs_again(self, path: str, branch: Branch) -> bool:
        """Whether a module runs more than once in one call of the block, so that a hook sees other tensors as well."""

        def around(call: ModuleCall) -> ModuleCall | None:
            return next((outer for outer in call.around() if outer.path == branch.block), call.parent)

        runs = Counter(around(call) for call in self.flow.calls if call.path == path)
        return max(runs.values()) > 1

    def _readers(self, node: int) -> list[int]:
        """What reads a node, through views."""
        found = []
        for i in self.flow.readers[node]:
            found += self._readers(i) if self.flow.nodes[i].op in VIEWS else [i]
        return found

    def _port(self, branch: Branch) -> ModuleInput | None:
        """The last module of the block, or beside it, that takes the stream before the branch's output is made."""
        flow, addition, port = self.flow, branch.addition, None
        made = dict(branch.call[0].outputs)[branch.call[1]] if branch.call else branch.end
        root, shape, axis = flow.source(addition.stream), flow.nodes[made].shape, self.axes.of(made)
        for call in flow.calls:
            is_near = within(call.path or "", branch.block) or call.parent is addition.node.call
            if not addition.stream < call.start <= made or not is_near:
                continue
            if isinstance(call.module, (nn.Sequential, nn.Identity)) or self.reader.repeats[call.path, id(call.parent)] > 1:
                continue
            for path, i in call.inputs:
                if call.path is None or len(path) != 2 or flow.source(i) != root:
                    continue
                if flow.nodes[i].shape == shape and self.axes.of(i) in (axis, None):
                    port = ModuleInput(call.path, _argument(path))
        return port

    def _sum(self, branch: Branch) -> ModuleOutput | None:
        """The outermost module of the block that returns the sum, which nothing reads before that."""
        flow, addition, node = self.flow, branch.addition, branch.addition.node.index
        first_reader = min(self._readers(node), default=len(flow.nodes))
        best: tuple[int, ModuleOutput] | None = None
        for call in flow.calls:
            if call.path is None or call.end is None or not within(call.path, branch.block):
                continue
            is_around = any(call is around for around in (addition.node.call.around() if addition.node.call else ()))
            is_repeated = self.reader.repeats[call.path, id(call.parent)] > 1 and not is_around
            if call.end > first_reader or call.start > node or is_repeated:
                continue
            for path, i in call.outputs:
                if flow.source(i) == node and flow.nodes[i].shape == flow.nodes[node].shape and call.end > node:
                    depth = len(list(call.around()))
                    if best is None or depth < best[0]:
                        best = depth, self._place(call, path)
        return best[1] if best else None

    # --- what is left -------------------------------------------------------------------------------------------------

    def unexplained(self, branches: list[Branch]) -> Iterator[tuple[str, str]]:
        """Projections that come after the last step in their block and lead on, but lie on no branch: (block, module)."""
        flow, explained = self.flow, 0
        for a in self.reader.every_addition:
            explained |= flow.between(a.stream, a.branch) | flow.between(a.stream, a.skip)
        last = {branch.block: branch.addition.node.index for branch in branches if branch.block is not None}
        for block, step in last.items():
            for i in bits(flow.projections & flow.descendants[step] & ~explained):
                call = flow.nodes[i].call
                if call is None or call.path is None or not within(call.path, block):
                    continue
                if any(within(call.path, inner) for inner in last if inner != block and within(inner, block)):
                    continue  # a block's in this one, before whose last step it comes
                after = (flow.nodes[j].call for j in bits(flow.descendants[i]))
                if any(c is not None and not within(c.path or "", block) for c in after):
                    yield block, call.path

    def idle(self, sublayers: tuple[Sublayer, ...]) -> Iterator[str]:
        """The modules beside blocks, and of the same class, that were not called."""
        modules = self.reader.modules
        ran = {path for call in self.flow.calls for path in ancestors(call.path or "")}
        for holder, kind in {(s.block.rpartition(".")[0], type(modules[s.block])) for s in sublayers if s.block}:
            for name, child in modules[holder]._modules.items():
                path = f"{holder}.{name}".lstrip(".")
                if type(child) is kind and path not in ran and modules[path] is child:
                    yield path

    # --- embeddings and blocks ----------------------------------------------------------------------------------------

    def embeddings(self, branches: list[Branch]) -> Iterator[ModuleOutput]:
        """What yields the stream that enters the first block of each stack."""
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
                    call, path = min(calls, key=lambda found: len(list(found[0].around())))
                    yield self._place(call, path)
                    break

    def output_embeddings(self, branches: list[Branch]) -> Iterator[ModuleOutput]:
        """What maps the last hidden states to logits over tokens; nothing in a block does."""
        blocks = {branch.block for branch in branches if branch.block}
        for call in output_calls(self.flow, self._entries(branches)):
            if self.reader.can_carry(call) and not any(within(call.path or "", block) for block in blocks):
                yield self._place(call, call.outputs[0][0])

    def _entries(self, branches: list[Branch]) -> dict[int, Branch]:
        """The stream that enters the first block of each stack, and that block's first branch."""
        flow, entries = self.flow, dict[int, Branch]()
        added = sum(1 << branch.addition.node.index for branch in {id(b.addition): b for b in branches}.values())
        for branch in branches:
            stream = flow.source(branch.addition.stream)
            if branch.block is not None and not flow.ancestors[stream] & added and not added >> stream & 1:
                entries.setdefault(stream, branch)
        return entries

    def _same(self, node: int) -> list[int]:
        """The node and its views."""
        views = [i for i in self.flow.readers[node] if self.flow.nodes[i].op in VIEWS]
        return [node, *(j for i in views for j in self._same(i))]

    def blocks(self, sublayers: tuple[Sublayer, ...]) -> Iterator[ModuleOutput]:
        """What each block returns as its stream: the last sub-layer's sum, or its norm."""
        last = {sublayer.block: sublayer for sublayer in sublayers}
        for sublayer in last.values():
            place = sublayer.post_norm if sublayer.norm == "post" else sublayer.sum
            if place is not None:
                yield place


def _agreed(calls: list[Sublayer]) -> Sublayer:
    """One sub-layer for all calls of the same module: places hold if they are the same in each."""
    first = calls[0]
    agreed = replace(
        first,
        sum=first.sum if all(call.sum == first.sum for call in calls) else None,
        stream=first.stream if all(call.stream == first.stream for call in calls) else None,
        fused=tuple(
            fused
            if all(fused in call.fused for call in calls)
            else replace(fused, slices=(), problem="they differ between its calls")
            for fused in first.fused
        ),
    )
    return agreed if all(call.post_norm == first.post_norm for call in calls) else _without_post(agreed)


def _without_post(sublayer: Sublayer) -> Sublayer:
    if sublayer.post_norm is None:
        return sublayer
    return replace(sublayer, post_norm=None, norm="none" if sublayer.norm == "post" else sublayer.norm)


def _argument(path: pytree.Path) -> pytree.Argument:
    """An argument of a call, from its path in `(args, kwargs)`."""
    return (int(path[1]), None) if path[0] == 0 else (None, str(path[1]))
