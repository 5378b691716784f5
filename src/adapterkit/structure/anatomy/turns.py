"""Cut what is added to a model's streams into blocks: one turn of what repeats, wherever its modules are held.

    x = x + attention(x)     one turn of   [attention, feed-forward]
    x = x + mlp(x)

Each branch has a home: the innermost module, list or dict in which all of it is computed. The homes of all branches are a
tree, and the tree is read from the top: a place whose parts are each a whole turn (a mixer of tokens and a feed-forward, in
most models) is a stack of blocks, and is looked into; a place whose parts are none is a block. Names tell nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from ..tracing.flow import Flow, bits
from ..tracing.graph import ModuleCall
from .branches import Branch, Turn

__all__ = ["Place", "common", "home_of", "is_item", "trail_of", "turns_of"]

Place = tuple[int, str]
"""Where something is computed: the `id` of a module call, and the module's path; of a list, those of the call around it."""
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(eq=False)
class _Part:
    """Branches that run one after another in one place.

    Attributes:
        homes: Of each branch, the places around it, outermost first.
        is_item: Whether the place is an item of a list, and no attribute.
        is_fine: Whether kinds differ in more than in whether they mix tokens.
        turns: The turns in it; set as it is looked into.
    """

    branches: list[Branch]
    homes: list[tuple[Place, ...]]
    is_item: bool = False
    is_fine: bool = False
    turns: list[Turn] = field(default_factory=list)

    @property
    def kinds(self) -> set[str]:
        """Tell what it does, as far as turns differ in it: mix tokens, or not."""
        return {self.kind_of(branch) for branch in self.branches}

    def kind_of(self, branch: Branch) -> str:
        """Tell what a branch does, as far as turns differ in it."""
        return branch.kind if self.is_fine else _coarse(branch)

    @property
    def does(self) -> tuple[str, ...]:
        """Return the kinds of its branches, in order."""
        return tuple(branch.kind for branch in self.branches)

    @property
    def is_stack(self) -> bool:
        """Tell whether there are several blocks in it."""
        return len(self.turns) > 1

    @property
    def holds_layers(self) -> bool:
        """Tell whether there are several blocks in it, each of several branches; a list of attentions holds none."""
        return self.is_stack and all(len(turn.branches) > 1 for turn in self.turns)


def turns_of(flow: Flow, modules: dict[str, nn.Module], branches: Sequence[Branch]) -> list[Turn]:
    """Return the turns of all branches. A branch around several others, as a U-Net's long skips have, is in none."""
    added = sum(1 << branch.addition.node.index for branch in branches)
    single = [branch for branch in branches if (_around(branch) & branch.inside & added).bit_count() < 2]
    homes = [home_of(flow, branch) for branch in single]
    if not single:
        return []
    cutter = _Cutter(flow, modules)
    if not any(branch.kind == "feedforward" for branch in single):
        fine = cutter.turns(_Part(single, homes, is_fine=True), 0, is_inside=False)
        blocks = [tuple(branch.kind for branch in turn.branches) for turn in fine if turn.is_block]
        if len(blocks) > 1 and len({*blocks}) == 1 and len({*blocks[0]}) > 1:
            return fine  # each has a convolution, say, in the place of a feed-forward
    return _alike(cutter.turns(_Part(single, homes), 0, is_inside=False), modules)


def _alike(turns: list[Turn], modules: dict[str, nn.Module]) -> list[Turn]:
    """Join the turns in a module of a class that is one block elsewhere, and does the same there.

    A stage of one block may show no more than the parts of that block; another stage shows what they belong to.
    """

    def what(branches: Sequence[Branch]) -> tuple[object, ...] | None:
        around = common([trail_of(branch.addition.node.call) for branch in branches])
        classes = (type(modules[path]) for _, path in reversed(around))
        own = next((kind for kind in classes if not issubclass(kind, _LISTS)), None)
        return None if own is None else (own, *(branch.kind for branch in branches))

    blocks = {what(turn.branches) for turn in turns} - {None}
    sizes = {len(block) - 1 for block in blocks if block}
    joined: list[Turn] = []
    for turn in turns:
        joined.append(turn)
        for n in range(len(joined) - 2, -1, -1):
            branches = [branch for before in joined[n:] for branch in before.branches]
            if len(branches) in sizes and what(branches) in blocks:
                joined[n:] = [Turn(branches)]
            if len(branches) >= max(sizes, default=0):
                break
    return joined


def home_of(flow: Flow, branch: Branch) -> tuple[Place, ...]:
    """Return the places around all that a branch computes, outermost first; where it is added, if that is further inside.

    A branch may read what was made far outside of its block, such as positions that are refined from block to block.
    """
    home = common([trail_of(flow.nodes[i].call) for i in bits(branch.inside & flow.endings)])
    adding = trail_of(branch.addition.node.call)
    is_far = len(adding) > len(home) + 1  # else what adds is a part of that place, as in a list of [norm, branch, addition]
    return adding if is_far and adding[: len(home)] == home else home


def _around(branch: Branch) -> int:
    """Return the set of nodes in the call that adds a branch, up to the addition."""
    node = branch.addition.node
    return (1 << node.index) - (1 << (node.call.start if node.call else 0))


def common(trails: Sequence[tuple[Place, ...]]) -> tuple[Place, ...]:
    """Return the places that all trails begin with."""
    first = min(trails, key=len, default=())
    same = [all(trail[n] == place for trail in trails) for n, place in enumerate(first)]
    return first[: (*same, False).index(False)]


def trail_of(call: ModuleCall | None) -> tuple[Place, ...]:
    """Return the places around a call, outermost first: those of calls, and between them those of lists that hold them."""
    trail: list[Place] = []
    for outer in reversed(list(call.around()) if call else []):
        path = outer.path if outer.path is not None else (trail[-1][1] if trail else "")
        trail += _lists_between(trail[-1] if trail else None, path)
        trail.append((id(outer), path))
    return tuple(trail)


def _lists_between(around: Place | None, path: str) -> Iterator[Place]:
    """Yield the places of what holds a module, in the module that calls it; none if that one does not hold it."""
    if around is None or not path.startswith(f"{around[1]}." if around[1] else ""):
        return
    depth = len(around[1].split(".")) if around[1] else 0
    names = path.split(".")
    yield from ((around[0], ".".join(names[:n])) for n in range(depth + 1, len(names)))


def is_item(path: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a module is an item of a list or dict."""
    holder, _, name = path.rpartition(".")
    return bool(path) and (name.isdigit() or isinstance(modules.get(holder), _LISTS))


class _Cutter:
    """Cuts parts of a model into turns."""

    def __init__(self, flow: Flow, modules: dict[str, nn.Module]) -> None:
        self.flow, self.modules = flow, modules

    def turns(self, part: _Part, depth: int, *, is_inside: bool) -> list[Turn]:
        """Return the turns of a part.

        Args:
            depth: How many places around it are looked at already.
            is_inside: Whether it is one of several blocks, or parts of blocks, of one kind.
        """
        parts = self._parts(part, depth)
        while len(parts) == 1 and len(part.homes[0]) > depth:
            depth += 1
            parts = self._parts(part, depth)
        if len(parts) == 1:
            return [Turn(part.branches)]
        kinds = part.kinds
        repeated = Counter(what for what, _ in {(inner.does, common(inner.homes)[-1][1]) for inner in parts})
        for inner in parts:
            is_one_of_several = inner.kinds == kinds and repeated[inner.does] > 1
            inner.turns = self.turns(inner, depth, is_inside=is_inside or is_one_of_several)
        if self._is_stack(parts, part, is_inside=is_inside):
            # In what itself repeats, a stage say, nothing is beside the blocks.
            return list(self._stacked(parts, kinds, repeats=is_inside))
        is_cut = len(kinds) > 1 and not any(inner.kinds == kinds for inner in parts)
        return self._repetitions(parts, is_inside=is_inside) if is_cut else [Turn(part.branches)]

    def _is_stack(self, parts: list[_Part], whole: _Part, *, is_inside: bool) -> bool:
        """Tell whether parts are blocks, or stacks of them, and not the sub-layers of one block.

        Args:
            parts: What `whole` is made of, each with its turns.
        """
        kinds, are_whole = whole.kinds, [part.kinds == whole.kinds for part in parts]
        if len(kinds) > 1 and not any(are_whole):
            return any(part.holds_layers for part in parts)
        turns = (turn for part in parts if part.is_stack for turn in part.turns)
        holds_whole = any({*map(whole.kind_of, turn.branches)} == kinds for turn in turns)
        if holds_whole or all(part.is_item for part in parts):
            return True
        return self._are_blocks(parts) if len(kinds) == 1 else all(are_whole) or not is_inside

    def _parts(self, part: _Part, depth: int) -> list[_Part]:
        """Split a part where the place inside it changes; a branch that is computed right there is a part of its own.

        Where places take turns, as a list of attentions and one of feed-forwards do, or are lists beside one another, it is
        the places in them that count.
        """
        pairs = list(zip(part.branches, part.homes, strict=True))

        def place(pair: tuple[Branch, tuple[Place, ...]], at: int = depth) -> object:
            return pair[1][at] if len(pair[1]) > at else id(pair[0])

        runs = Counter(key for key, _ in groupby(pairs, key=place))
        is_inside = max(runs.values()) > 1 or (len(runs) > 1 and all(map(self._is_list, runs)))
        parts = []
        for key, run in groupby(pairs, key=lambda pair: (place(pair), is_inside and place(pair, depth + 1))):
            branches, homes = zip(*run, strict=True)
            inner = key[1] or key[0]
            item = isinstance(inner, tuple) and is_item(inner[1], self.modules)
            parts.append(_Part([*branches], [*homes], item, part.is_fine))
        return parts

    def _is_list(self, place: object) -> bool:
        """Tell whether a place is a list or dict of modules, which no call runs, and no item of another."""
        if not isinstance(place, tuple) or is_item(place[1], self.modules):
            return False
        return isinstance(self.modules.get(place[1]), (nn.ModuleList, nn.ModuleDict))

    def _are_blocks(self, parts: list[_Part]) -> bool:
        """Tell whether parts of one kind are blocks: modules of one class, each of which adds what it computes itself."""
        classes = set()
        for part in parts:
            inside = common(part.homes)
            adding = [trail_of(branch.addition.node.call) for branch in part.branches]
            shared = common([inside, *adding])
            classes.add(type(self.modules[shared[-1][1]]) if shared else None)
            if any(shared == common([shared, *other.homes]) for other in parts if other is not part):
                return False
        return len(classes) == 1

    def _stacked(self, parts: list[_Part], kinds: set[str], *, repeats: bool) -> Iterator[Turn]:
        """Yield the turns of a stack's parts. A part that is no whole turn, and does not repeat, is beside the blocks."""
        parts = list(self._joined(parts, kinds))
        stacked = [turn for part in parts if part.is_stack for turn in part.turns]
        fine = {branch.kind for turn in stacked for branch in turn.branches}
        lone = {turn.branches[0].kind for turn in stacked if len(turn.branches) == 1}
        for part in parts:
            is_odd = part.kinds != kinds or (bool(fine) and not fine & {*part.does})
            # One convolution alone, as embeds a pitch, is no block where blocks are made of more.
            is_odd |= bool(stacked) and part.does == ("convolution",) and "convolution" not in lone
            is_beside = is_odd and not (part.is_stack or repeats or self._adds_in_a_list(part))
            yield from [Turn(part.branches, is_block=False)] if is_beside else part.turns

    def _joined(self, parts: list[_Part], kinds: set[str]) -> Iterator[_Part]:
        """Yield a stack's parts; neighbours none of which is a whole turn as one, if together they are.

        So a list [cross-attention, feed-forward, [blocks]] begins with a block, too.
        """
        for is_whole, run in groupby(parts, key=lambda part: part.is_stack or part.kinds == kinds):
            some = list(run)
            branches = [branch for part in some for branch in part.branches]
            is_turn = {branch.kind for branch in branches} - {"convolution", "feedforward"} and self._is_chain(some)
            if is_whole or not is_turn or {kind for part in some for kind in part.kinds} != kinds:
                yield from some
                continue
            homes = [home for part in some for home in part.homes]
            yield _Part(branches, homes, all(part.is_item for part in some), some[0].is_fine, [Turn(branches)])

    def _adds_in_a_list(self, part: _Part) -> bool:
        """Tell whether what adds a part's branches is an item of a list, or in one."""
        adding = common([trail_of(branch.addition.node.call) for branch in part.branches])
        return part.is_item or any(is_item(path, self.modules) for _, path in adding)

    def _repetitions(self, parts: list[_Part], *, is_inside: bool) -> list[Turn]:
        """Return the turns of parts none of which is a whole turn: several if what they do repeats, else one."""
        ways: list[list[object]] = [[self._build(part) for part in parts]]
        if not is_inside or all(part.is_item for part in parts):
            ways.append([part.does for part in parts])
        if not self._is_chain(parts):
            return _cut(parts, [0])
        for tokens in ways:
            starts = self._starts(parts, tokens)
            if len(starts) > 1:
                return _cut(parts, starts)
        return _cut(parts, [0] if is_inside else _after_feedforwards(parts))

    def _starts(self, parts: list[_Part], tokens: Sequence[object]) -> list[int]:
        """Return where what parts do begins anew; only 0 if it does not repeat.

        Whole turns may repeat and leave a rest, as a feed-forward behind what makes a stage narrower. Or something else is
        before them, and belongs to the first: [convolution, attention, feed-forward, attention, feed-forward].
        """
        whole = {kind for part in parts for kind in part.kinds}
        for before, period in ((n, k) for n in range(len(parts)) for k in range(1, (len(parts) - n) // 2 + 1)):
            is_uneven = before or len(parts) % period
            is_whole = {kind for part in parts[before : before + period] for kind in part.kinds} == whole
            has_rest = before and (len(parts) - before) % period
            if _repeats(tokens[before:], period) and (is_whole or not is_uneven) and not has_rest:
                return [0, *range(before + period, len(parts), period)]
        return [0]

    def _is_chain(self, parts: list[_Part]) -> bool:
        """Tell whether each part computes from what the one before it was added to or, beside it, from the same stream."""
        firsts, lasts = ([part.branches[n].addition for part in parts] for n in (0, -1))
        return all(
            after.stream in (before.node.index, before.stream) or self.flow.leads_to(before.node.index, after.stream)
            for before, after in zip(lasts[:-1], firsts[1:], strict=True)
        )

    def _build(self, part: _Part) -> object:
        """Return what a part does and what modules compute it: their classes and the shapes of their Parameters."""
        calls = [self.flow.nodes[i].call for b in part.branches for i in bits(b.inside & self.flow.endings)]
        made = [(type(c.module), *(tuple(p.shape) for p in c.module.parameters())) for c in calls if c is not None]
        return (*(branch.kind for branch in part.branches), *made)


def _coarse(branch: Branch) -> str:
    """Tell whether a branch is a feed-forward, or mixes tokens."""
    return "feedforward" if branch.kind == "feedforward" else "mixer"


def _repeats(tokens: Sequence[object], period: int) -> bool:
    """Tell whether the first tokens repeat, up to a rest that is shorter than they are."""
    end = len(tokens) - len(tokens) % period
    return all(tokens[n] == tokens[n % period] for n in range(end))


def _after_feedforwards(parts: Sequence[_Part]) -> list[int]:
    """Return where the turns of a list of layers of several kinds begin: each ends in a feed-forward."""
    ends = [n for n, part in enumerate(parts) if part.kinds == {"feedforward"}]
    is_list = len(ends) > 1 and ends[0] > 0
    return [0, *(n + 1 for n in ends if n + 1 < len(parts))] if is_list else [0]


def _cut(parts: Sequence[_Part], starts: Sequence[int]) -> list[Turn]:
    """Return the turns that begin with these parts, in their order."""
    stops = [*starts[1:], len(parts)]
    groups = (parts[start:stop] for start, stop in zip(starts, stops, strict=True))
    return [Turn([branch for part in group for branch in part.branches]) for group in groups]
