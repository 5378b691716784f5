"""From residual additions to sub-layers: which module yields each branch, what it does, where it is normalised."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from .. import values
from ..base import base_parameters
from ..errors import TargetError
from ..hosts import resolve_host
from .additions import Addition, residual_additions, up_to_number
from .anatomy import Anatomy, Kind, Norm, Place, Port, Sublayer
from .axes import FeatureAxes
from .flow import SCALES, VIEWS, Flow, bits
from .graph import ADDITIONS, Call
from .kinds import kind_of, operands

__all__ = ["dissect", "template_of"]

_JOINS = ("stack", "cat")  # what has parts from several modules is no one's


def dissect(flow: Flow, modules: dict[str, nn.Module]) -> Anatomy:
    """The anatomy of the model whose forward this is."""
    reader = _Reader(flow, modules)
    branches = [branch for addition in reader.additions for branch in reader.branches(addition)]
    reader.find_blocks(branches)
    sublayers = reader.sublayers(branches)
    inside = tuple(s for s in sublayers if s.block is not None)
    return Anatomy(
        sublayers=inside,
        others=tuple(s for s in sublayers if s.block is None),
        embeddings=tuple(reader.embeddings(branches)),
        blocks=tuple(reader.blocks(inside)),
    )


@dataclass
class _Branch:
    """A branch of an addition while it is being understood.

    Attributes:
        end: The node that is added.
        inside: The nodes between the stream and the end.
        call: The module call that yields it, and where; None if no module does.
        scales: Operations between that and the addition.
    """

    addition: Addition
    end: int
    inside: int
    is_parallel: bool
    kind: Kind
    is_moe: bool
    call: tuple[Call, values.Path] | None
    scales: tuple[str, ...]
    block: str | None = None


class _Reader:
    """Reads sub-layers off a flow."""

    def __init__(self, flow: Flow, modules: dict[str, nn.Module]) -> None:
        self.flow, self.modules, self.axes = flow, modules, FeatureAxes(flow)
        self.additions = residual_additions(flow)
        self._repeats = Counter((call.path, id(call.parent)) for call in flow.calls)

    # --- branches -----------------------------------------------------------------------------------------------------

    def branches(self, addition: Addition) -> Iterator[_Branch]:
        """The branch of an addition; several where it adds the sum of parallel branches, scaled or not."""
        total, shared_scales = self._unscaled(addition.branch)
        ends = list(self._parallel(addition, total))
        if len(ends) == 1 or list(self._finished(addition, addition.branch)):
            ends, shared_scales = [addition.branch], ()
        for end in ends:
            inside = self._inside(addition, end)
            call, scales = self._module_of(addition, end)
            kind, is_moe = kind_of(self.flow, self.axes, addition.stream, inside)
            yield _Branch(addition, end, inside, len(ends) > 1, kind, is_moe, call, (*scales, *shared_scales))

    def _inside(self, addition: Addition, end: int) -> int:
        """The nodes of a branch: between the stream and the end, but not those of steps before it in the same block."""
        flow = self.flow
        inside = flow.between(addition.stream, end)
        for other in self.additions:
            i = other.node.index
            if inside >> i & 1 and flow.between(i, end) & flow.endings:
                inside &= ~(flow.ancestors[i] | 1 << i)
        return inside

    def _unscaled(self, end: int) -> tuple[int, tuple[str, ...]]:
        """The node that a chain of constant factors starts from, and those factors' operations."""
        start = self.flow.unscaled(end)
        ops = (self.flow.nodes[i].op for i in bits(self.flow.between(start, end)))
        return start, tuple(op for op in ops if op not in VIEWS)

    def _parallel(self, addition: Addition, end: int) -> Iterator[int]:
        """The addends of a sum that no module returns, if each is a branch of its own; else the node itself."""
        flow, node = self.flow, self.flow.nodes[end]
        operands = [] if list(self._finished(addition, end)) else flow.addends(end)
        if len(operands) > 1 and all(
            flow.nodes[i].shape == node.shape and flow.between(addition.stream, i) & flow.projections for i in operands
        ):
            for i in operands:
                yield from self._parallel(addition, i)
        else:
            yield end

    def _finished(self, addition: Addition, node: int) -> Iterator[tuple[Call, values.Path]]:
        """The calls that returned a node before it was added."""
        for call, path in self.flow.returned.get(node, []):
            if call.end is not None and call.end <= addition.node.index and call.path is not None:
                yield call, path

    def _module_of(self, addition: Addition, end: int) -> tuple[tuple[Call, values.Path] | None, tuple[str, ...]]:
        """The outermost module whose output is added, once in each call of what is around it; and what scales it.

        One that serves several branches (a dropout, a drop path) cannot be told which it serves: then the module before.
        If there is none, one with weights, which are shared as an adapter there would be.
        """
        steps = list(self._back(addition, end))
        for is_wanted in (self._is_hookable, self._is_shared):
            scales: list[str] = []
            for node in steps:
                calls = [(c, path) for c, path in self._finished(addition, node) if is_wanted(c)]
                if calls:
                    return min(calls, key=lambda found: (len(list(found[0].around())), -found[0].start)), tuple(scales)
                op = self.flow.nodes[node].op
                scales += [op] if op not in VIEWS | set(ADDITIONS) else []
        return None, ()

    def _back(self, addition: Addition, end: int) -> Iterator[int]:
        """The branch's last node and those before it, as long as one follows from one other by a view, scale or offset."""
        flow = self.flow
        while True:
            yield end
            node = flow.nodes[end]
            before = [
                i
                for i in node.inputs
                if flow.leads_to(addition.stream, i) and flow.between(addition.stream, i) & flow.endings
            ]
            is_one = len(before) == 1 or (before and node.op not in (*ADDITIONS, *_JOINS))
            if node.op not in VIEWS | SCALES | set(ADDITIONS) or not is_one:
                return
            size = math.prod(node.shape)  # a gate that is computed from the stream, too, is often smaller
            end = max(before, key=lambda i: (math.prod(flow.nodes[i].shape) == size and not self._is_gate(i), i))

    def _is_gate(self, index: int) -> bool:
        """Whether a node is a factor between bounds, for what it is multiplied with."""
        return self.flow.nodes[self.flow.source(index)].op in ("sigmoid", "sigmoid_", "tanh", "tanh_")

    def _is_hookable(self, call: Call) -> bool:
        """Whether a hook on the module sees this branch, and only this, in each call of the module around it."""
        return self._repeats[call.path, id(call.parent)] == 1 and self._can_carry(call)

    def _is_shared(self, call: Call) -> bool:
        """Whether a module with weights runs several times in a call of the module around it."""
        return any(True for _ in base_parameters(call.module)) and self._can_carry(call)

    def _can_carry(self, call: Call) -> bool:
        try:
            resolve_host(call.path or "", self.modules, at_input=False)
        except TargetError:
            return False
        return call.path is not None

    # --- blocks -------------------------------------------------------------------------------------------------------

    def find_blocks(self, branches: list[_Branch]) -> None:
        """Set each branch's block: the path of its addition up to its last number.

        Where the numbers next to one another stand for one sub-layer each, of different kinds (T5's `layer.0`, `layer.1`),
        the last number but one is the block's. Where what holds the blocks adds, the branch's path says which it is.
        """
        numbered = {id(branch): self._numbered(branch) for branch in branches}
        beside: dict[str, dict[str, list[Kind]]] = {}
        for branch in branches:
            path = numbered[id(branch)]
            beside.setdefault(path.rpartition(".")[0], {}).setdefault(path, []).append(branch.kind)
        for branch in branches:
            block = numbered[id(branch)]
            kinds = list(beside[block.rpartition(".")[0]].values())
            around = up_to_number(block.rpartition(".")[0])
            if around and all(len(found) == 1 for found in kinds) and len({found[0] for found in kinds}) > 1:
                block = around
            branch.block = None if not block or self._spans_several(branch, block) else block

    def _numbered(self, branch: _Branch) -> str:
        """The path of a branch up to its last number; of a list of unlike parts, such as [norm, attention, sum], its own.

        Where no path has a number, that of the module whose name ends in one, and which has a like beside it.
        """
        block = up_to_number(self._path(branch))
        if not block:
            return self._named_with_number((branch.addition.node.call and branch.addition.node.call.path) or "")
        parts = {block, *self._beside(branch, block)}
        are_unlike = len({type(self.modules[path]) for path in parts}) == len(parts) > 1
        around = up_to_number(block.rpartition(".")[0])
        return around if are_unlike and around else block

    def _named_with_number(self, path: str) -> str:
        """The outermost part of a path whose name is one of `layer_0`, `layer_1`, ... beside one another; else empty."""
        names = path.split(".")
        for depth, name in enumerate(names):
            stem, beside = name.rstrip("0123456789"), self.modules[".".join(names[:depth])]._modules
            like = [n for n, m in beside.items() if n.rstrip("0123456789") == stem and type(m) is type(beside[name])]
            if stem != name and len(like) > 1:
                return ".".join(names[: depth + 1])
        return ""

    def _spans_several(self, branch: _Branch, block: str) -> bool:
        """Whether a branch runs through more than one repetition of what would be its block."""
        return len(self._beside(branch, block)) > 1

    def _beside(self, branch: _Branch, block: str) -> set[str]:
        """The modules that a branch computes in, whose path is this one but for its numbers."""
        template, depth = template_of(block), len(block.split("."))
        calls = [self.flow.nodes[i].call for i in bits(branch.inside & self.flow.endings)]
        through = {".".join((call.path or "").split(".")[:depth]) for call in calls if call is not None}
        return {path for path in through if template_of(path) == template}

    def _path(self, branch: _Branch) -> str:
        adding = branch.addition.node.call
        path = (adding.path if adding else None) or ""
        if branch.call is None or any(part.isdigit() for part in path.split(".")):
            return path
        return branch.call[0].path or ""

    # --- sub-layers ---------------------------------------------------------------------------------------------------

    def sublayers(self, branches: list[_Branch]) -> list[Sublayer]:
        """One for each module that yields a branch, in the order that they run; a norm is as all of its kind say."""
        found: dict[object, list[Sublayer]] = {}
        for branch in branches:
            sublayer = self._sublayer(branch)
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

    def _sublayer(self, branch: _Branch) -> Sublayer:
        flow, addition = self.flow, branch.addition
        place = None
        if branch.call is not None:
            call, path = branch.call
            place = self._place(call, path)
            axis = self.axes.on_the_way(dict(call.outputs)[path], branch.end, self.axes.of(addition.skip))
            place = place if axis is None else replace(place, axis=axis - len(place.shape))
        query, key, value = self._projections_of_attention(branch)
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
            query=query,
            key=key,
            value=value,
            scales=branch.scales,
            is_parallel=branch.is_parallel or self._has_sibling(branch),
            is_moe=branch.is_moe,
            norm=self._norm(branch, post),
            stream=self._port(branch),
            sum=self._sum(branch),
            post_norm=post,
            shares_norm=post is not None and self._runs_again(post.path, branch),
            addition=((node_call.path if node_call else None) or "", addition.node.index),
        )

    def _place(self, call: Call, path: values.Path) -> Place:
        """What a call returned at a path of its output."""
        node = self.flow.nodes[dict(call.outputs)[path]]
        axis = self.axes.of(node.index)
        return Place(call.path or "", path, node.shape, None if axis is None else axis - len(node.shape))

    def _has_sibling(self, branch: _Branch) -> bool:
        """Whether the skip is itself a sum with this branch's stream: (x + attention(x)) + mlp(x)."""
        source = self.flow.source(branch.addition.skip)
        return source != branch.addition.stream and any(other.node.index == source for other in self.additions)

    def _projections_of_attention(self, branch: _Branch) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The modules that make queries, keys and values."""
        found: tuple[set[int], set[int], set[int]] = (set(), set(), set())
        for core in bits(branch.inside & self.flow.attentions):
            for operand, nodes in zip(operands(self.flow, core), found, strict=True):
                if operand is not None:
                    back = self.flow.ancestors[operand] | 1 << operand
                    nodes.update(bits(self.flow.nearest(operand, self.flow.projections, back)))
        return tuple(self._modules_of(sorted(nodes)) for nodes in found)  # type: ignore[return-value]  # three of them

    def _modules_of(self, nodes: Iterable[int]) -> tuple[str, ...]:
        """The innermost modules that ran these nodes."""
        calls = [self.flow.nodes[i].call for i in nodes]
        return tuple(dict.fromkeys(call.path for call in calls if call is not None and call.path is not None))

    # --- norms and streams --------------------------------------------------------------------------------------------

    def _norm(self, branch: _Branch, post: Place | None) -> Norm:
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
        return "end" if at_end else "post" if post is not None else "none"

    def _post_norm(self, branch: _Branch) -> Place | None:
        """The norm of the same block that takes the sum, if nothing else does."""
        flow, node = self.flow, branch.addition.node.index
        readers = self._readers(node)
        for call in flow.norm_calls:
            takes = any(flow.source(i) == flow.source(node) for _, i in call.inputs)
            alone = bool(readers) and all(call.start <= i < (call.end or 0) for i in readers)
            if takes and alone and call.path is not None and call.outputs and _within(call.path, branch.block):
                return self._place(call, call.outputs[0][0])
        return None

    def _runs_again(self, path: str, branch: _Branch) -> bool:
        """Whether a module runs more than once in one call of the block, so that a hook sees other tensors as well."""

        def around(call: Call) -> Call | None:
            return next((outer for outer in call.around() if outer.path == branch.block), call.parent)

        runs = Counter(around(call) for call in self.flow.calls if call.path == path)
        return max(runs.values()) > 1

    def _readers(self, node: int) -> list[int]:
        """What reads a node, through views."""
        found = []
        for i in self.flow.readers[node]:
            found += self._readers(i) if self.flow.nodes[i].op in VIEWS else [i]
        return found

    def _port(self, branch: _Branch) -> Port | None:
        """The last module of the block, or beside it, that takes the stream before the branch's output is made."""
        flow, addition, port = self.flow, branch.addition, None
        made = dict(branch.call[0].outputs)[branch.call[1]] if branch.call else branch.end
        root, shape, axis = flow.source(addition.stream), flow.nodes[made].shape, self.axes.of(made)
        for call in flow.calls:
            is_near = _within(call.path or "", branch.block) or call.parent is addition.node.call
            if not addition.stream < call.start <= made or not is_near:
                continue
            if isinstance(call.module, (nn.Sequential, nn.Identity)) or self._repeats[call.path, id(call.parent)] > 1:
                continue
            for path, i in call.inputs:
                if call.path is None or len(path) != 2 or flow.source(i) != root:
                    continue
                if flow.nodes[i].shape == shape and self.axes.of(i) in (axis, None):
                    port = Port(call.path, _argument(path))
        return port

    def _sum(self, branch: _Branch) -> Place | None:
        """The outermost module of the block that returns the sum, which nothing reads before that."""
        flow, node = self.flow, branch.addition.node.index
        first_reader = min(self._readers(node), default=len(flow.nodes))
        best: tuple[int, Place] | None = None
        for call in flow.calls:
            if call.path is None or call.end is None or not _within(call.path, branch.block):
                continue
            if call.end > first_reader or call.start > node or self._repeats[call.path, id(call.parent)] > 1:
                continue
            for path, i in call.outputs:
                if flow.source(i) == node and flow.nodes[i].shape == flow.nodes[node].shape and call.end > node:
                    depth = len(list(call.around()))
                    if best is None or depth < best[0]:
                        best = depth, self._place(call, path)
        return best[1] if best else None

    # --- embeddings and blocks ----------------------------------------------------------------------------------------

    def embeddings(self, branches: list[_Branch]) -> Iterator[Place]:
        """What yields the stream that enters the first block of each stack."""
        flow, seen = self.flow, set()
        added = sum(1 << branch.addition.node.index for branch in {id(b.addition): b for b in branches}.values())
        for branch in branches:
            stream = flow.source(branch.addition.stream)
            if branch.block is None or flow.ancestors[stream] & added or added >> stream & 1 or stream in seen:
                continue
            seen.add(stream)
            for i in self._same(stream):
                calls = [
                    (call, path)
                    for call, path in flow.returned.get(i, [])
                    if call.end is not None and call.end <= branch.addition.node.index and self._is_hookable(call)
                    if not _within(call.path or "", branch.block)
                ]
                if calls:
                    call, path = min(calls, key=lambda found: len(list(found[0].around())))
                    yield self._place(call, path)
                    break

    def _same(self, node: int) -> list[int]:
        """The node and its views."""
        views = [i for i in self.flow.readers[node] if self.flow.nodes[i].op in VIEWS]
        return [node, *(j for i in views for j in self._same(i))]

    def blocks(self, sublayers: tuple[Sublayer, ...]) -> Iterator[Place]:
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
    )
    return agreed if all(call.post_norm == first.post_norm for call in calls) else _without_post(agreed)


def _without_post(sublayer: Sublayer) -> Sublayer:
    return replace(sublayer, post_norm=None, norm="none" if sublayer.norm == "post" else sublayer.norm)


def template_of(path: str) -> str:
    """The path with `*` for its numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _within(path: str, block: str | None) -> bool:
    return block is None or path == block or path.startswith(f"{block}.")


def _argument(path: values.Path) -> values.Argument:
    """An argument of a call, from its path in `(args, kwargs)`."""
    return (int(path[1]), None) if path[0] == 0 else (None, str(path[1]))
