"""Compositions from their definitions, in float64, at the places where the `adapters` library has its adapters.

Rows run one by one (`rows.py`), so that nothing here divides a batch. At one place, with x what the sub-layer adds to the
stream r, an adapter f adds f(z) to x; z is norm(x + r), x, or r. Then

    Stack     one after the other, each with the x that those before left
    Average   x + sum_i w_i (what child i adds)
    Split     each child on its tokens of x and r
    Fuse      x + Wv sum_i alpha_i u_i, u_i what child i adds (Pfeiffer et al. 2021, arXiv:2005.00247)

and the place returns norm(x + r), or x + r. What changes weights is the sum (LoRA) or product (IA3) of the changes.
No composition of either library runs here. With `faults`, it computes what that library does instead; see `known.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak

from ..measure import float_tensors
from ..methods import formula as of_weights
from ..methods.case import Key, Place
from ..methods.hosts import Host
from ..peer import bottleneck_layers
from .case import ComposedCase, Tensors
from .rows import Row, rows_of

__all__ = ["outputs"]

_SCALING = {"par_bn": 4.0}
_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {"double_seq_bn": F.silu}


def outputs(
    case: ComposedCase, host: Host, plain: nn.Module, tensors: Tensors, faults: frozenset[str] = frozenset()
) -> list[Tensor]:
    """The outputs of a composition.

    Args:
        plain: The model with that library's code in it, and no adapters: it says where they go.
    """
    composition, tensors = _undropped(case.composition, tensors)
    rows = rows_of(composition, list(range(_count(host))))
    found: list[Any] = [None] * len(rows)
    run = _with_bottlenecks if case.is_bottleneck else _with_weights
    for kind in dict.fromkeys((row.composition, row.is_nested) for row in rows):
        at = [n for n, row in enumerate(rows) if (row.composition, row.is_nested) == kind]
        part = run(case, _part(host, [rows[n].source for n in at]), plain, Row(0, *kind), tensors, faults)
        for i, n in enumerate(at):
            found[n] = [tensor[i : i + 1] for tensor in part]
    return [torch.cat(pieces) for pieces in zip(*found, strict=True)]


def _count(host: Host) -> int:
    return next(len(value) for value in host.inputs.values() if isinstance(value, Tensor))


def _part(host: Host, rows: list[int]) -> Host:
    """The host with these rows of its inputs."""
    taken = {name: value[rows] if isinstance(value, Tensor) else value for name, value in host.inputs.items()}
    return replace(host, inputs=taken)


def _undropped(composition: Any, tensors: Tensors) -> tuple[Any, Tensors]:
    """A composition without its Drop, and the tensors of what is left."""
    if not isinstance(composition, ak.Drop):
        return composition, tensors
    layers = composition.layers
    kept = {
        name: {key: tensor for key, tensor in own.items() if _layer(key.place) not in layers}
        for name, own in tensors.items()
    }
    return composition.children[0], kept


def _layer(place: Place) -> int | None:
    found = re.search(r"\.(\d+)(\.|$)", place.path)
    return int(found[1]) if found else None


def _with_bottlenecks(
    case: ComposedCase, host: Host, plain: nn.Module, row: Row, tensors: Tensors, faults: frozenset[str]
) -> list[Tensor]:
    with _replaced(case, plain, row, tensors, faults):
        return float_tensors(plain(**host.inputs))


@contextmanager
def _replaced(case: ComposedCase, plain: nn.Module, row: Row, tensors: Tensors, faults: frozenset[str]) -> Iterator[None]:
    """Within the block, each place computes the composition."""
    layers = bottleneck_layers(plain)
    for site in layers:
        place = Place(site.block, site.kind)
        own: dict[str, dict[str, Tensor]] = {}
        for name, held in tensors.items():
            at = {key.name: tensor for key, tensor in held.items() if key.place == place}
            own |= {name: at} if at else {}
        site.module.bottleneck_layer_forward = partial(_place, case, row, own, faults)
    try:
        yield
    finally:
        for site in layers:
            del site.module.bottleneck_layer_forward


def _place(
    case: ComposedCase,
    row: Row,
    own: Mapping[str, dict[str, Tensor]],
    faults: frozenset[str],
    hidden_states: Tensor,
    residual_input: Tensor,
    layer_norm: nn.Module | None,
) -> Tensor:
    """What a place returns; some models call it by that library's names. Shape: (rows, tokens, width), both."""
    x, r, norm = hidden_states, residual_input, layer_norm
    if own:
        it = _Place(case, own, faults, norm)
        x = it.run(row.composition, it.start(x, r) if row.is_nested else x, r)
    return x + r if norm is None else norm(x + r)


@dataclass(frozen=True)
class _Place:
    """One place: its adapters' tensors, its norm if that is of the stream, and what is to be done wrong."""

    case: ComposedCase
    own: Mapping[str, dict[str, Tensor]]
    faults: frozenset[str]
    norm: nn.Module | None

    def read(self, x: Tensor, r: Tensor) -> Tensor:
        """What an adapter reads."""
        if self.case.method == "par_bn":
            return r
        return self._sum(x, r) if self.case.method == "seq_bn" else x

    def start(self, x: Tensor, r: Tensor) -> Tensor:
        """What a composition within another is given for x: that is prepared twice, with this fault."""
        return self.read(x, r) if "twice" in self.faults and self.case.method == "seq_bn" else x

    def run(self, composition: Any, x: Tensor, r: Tensor) -> Tensor:
        """The x that a composition leaves."""
        if isinstance(composition, str):
            return x + self._added(composition, self.read(x, r))
        if isinstance(composition, ak.Stack):
            first = x
            for child in composition.children:
                x = self.run(child, first if "last" in self.faults else x, r)
            return x
        if isinstance(composition, ak.Fuse):
            return self._fused(composition, x, r)
        if isinstance(composition, ak.Split):
            sizes = list(composition.sizes or ())
            parts = zip(composition.children, x.split(sizes, 1), r.split(sizes, 1), strict=True)
            return torch.cat([self._child(child, own_x, own_r) for child, own_x, own_r in parts], 1)
        children = [self._child(child, x, r) for child in composition.children]
        weights = composition.weights or (1.0,) * len(children)
        weights = [weight / sum(weights) for weight in weights]
        if "mean" not in self.faults:
            return x + sum(weight * (child - x) for weight, child in zip(weights, children, strict=True))
        base = x if self.case.method == "par_bn" else 0.0  # of the others, x is divided with what they add
        return base + sum(w * (child - base) for w, child in zip(weights, children, strict=True)) / len(children)

    def _child(self, child: Any, x: Tensor, r: Tensor) -> Tensor:
        return self.run(child, x if isinstance(child, str) else self.start(x, r), r)

    def _added(self, name: str, z: Tensor) -> Tensor:
        """What one adapter adds."""
        own, act = self.own[name], _ACTIVATION.get(self.case.method, F.relu)
        hidden = act(F.linear(z, own["down_weight"], own["down_bias"]))
        return _SCALING.get(self.case.method, 1.0) * F.linear(hidden, own["up_weight"], own["up_bias"])

    def _fused(self, fuse: ak.Fuse, x: Tensor, r: Tensor) -> Tensor:
        """A fusion. Shape: u (rows, tokens, children, width)."""
        settings, own = self.case.fusion, self.own.get(fuse.fusion, {})
        is_sum = self.case.method == "seq_bn" and "branch" not in self.faults  # of what it changes, and so of its place
        at = x + r if is_sum else x
        if "stream" in self.faults:  # a parallel fusion takes the stream for it
            at = r
        u = torch.stack([self._delta(child, x, r) for child in fuse.children], -2)
        q = at if settings.get("query_reads") == "site" else self.read(x, r)
        q = F.linear(q, own["query_weight"], own["query_bias"]) if "query_weight" in own else q
        k = F.linear(u, own["key_weight"]) if "key_weight" in own else u
        temperature = settings.get("temperature", 1.0)
        temperature -= 0.05 * (self.case.forwards - 1) if "cooling" in self.faults else 0.0
        alpha = ((k * q.unsqueeze(-2)).sum(-1) / temperature).softmax(-1)  # (rows, tokens, children)
        is_before = settings.get("residual_before", False)
        v = u + at.unsqueeze(-2) if is_before else u
        v = F.linear(v, own["value_weight"]) if "value_weight" in own else v
        mixed = (alpha.unsqueeze(-1) * v).sum(-2)
        if "stream" in self.faults:
            return x + mixed + (0.0 if is_before else r)
        return x + mixed - at if is_before else x + mixed

    def _delta(self, child: Any, x: Tensor, r: Tensor) -> Tensor:
        """What a child of a fusion adds."""
        if "last weighed" in self.faults and isinstance(child, ak.Stack):
            start = self.start(x, r)
            before = self.run(ak.Stack(*child.children[:-1]), start, r)
            return self._added(child.children[-1], self.read(before, r))
        return self._child(child, x, r) - x

    def _sum(self, x: Tensor, r: Tensor) -> Tensor:
        return x + r if self.norm is None else self.norm(x + r)


def _with_weights(
    case: ComposedCase, host: Host, _plain: nn.Module, row: Row, tensors: Tensors, faults: frozenset[str]
) -> list[Tensor]:
    if isinstance(row.composition, ak.Split):
        return _by_token(case, host, row.composition, tensors, faults)
    return of_weights.outputs(case, host, *_terms(case, row.composition, tensors, faults))


Terms = list[tuple[float, dict[Key, Tensor]]]


def _terms(case: ComposedCase, composition: Any, tensors: Tensors, faults: frozenset[str]) -> Terms:
    """The changes of weights that a composition sums, each with its factor: for IA3 one, the product or the mean."""
    if isinstance(composition, str):
        return [(1.0, dict(tensors[composition]))]
    each = [_terms(case, child, tensors, faults) for child in composition.children]
    weights = [1.0] * len(each)
    if isinstance(composition, ak.Average):
        weights = list(composition.weights or weights)
        total = sum(weights) * (len(each) if "mean" in faults else 1)
        weights = [weight / total for weight in weights]
    if case.method == "ia3":
        merge = _mean if isinstance(composition, ak.Average) else _product
        return [(1.0, merge([terms[0][1] for terms in each], weights))]
    if isinstance(composition, ak.Stack) and "serial" in faults and len(each) > 1:
        return _serial(case, each)
    return [(weight * own, held) for weight, terms in zip(weights, each, strict=True) for own, held in terms]


def _product(each: list[dict[Key, Tensor]], _weights: list[float]) -> dict[Key, Tensor]:
    return {key: torch.stack([held[key] for held in each]).prod(0) for key in each[0]}


def _mean(each: list[dict[Key, Tensor]], weights: list[float]) -> dict[Key, Tensor]:
    return {key: sum(w * held[key] for w, held in zip(weights, each, strict=True)) for key in each[0]}  # type: ignore[misc]  # sum starts at 0


def _serial(case: ComposedCase, each: list[Terms]) -> Terms:
    """Each change read what the one before it made of the input: B2 A2 B1 A1."""
    scaling = case.config["alpha"] / case.config["rank"]

    def chained(first: dict[Key, Tensor], then: dict[Key, Tensor]) -> dict[Key, Tensor]:
        done = {key: scaling * first[key._replace(name="lora_B")] @ first[key] for key in first if key.name == "lora_A"}
        return {key: tensor @ done[key] if key in done else tensor for key, tensor in then.items()}

    found, *others = each
    for terms in others:
        found = [(v * w, chained(first, then)) for v, first in found for w, then in terms]
    return found


def _by_token(case: ComposedCase, host: Host, split: ak.Split, tensors: Tensors, faults: frozenset[str]) -> list[Tensor]:
    """Each child's weights for its tokens. Hosts are linear layers."""
    changed = []
    for child in split.children:
        ((_, held),) = _terms(case, child, tensors, faults)
        changed.append(of_weights.adapted(case, host, held))
    paths = dict.fromkeys(name.rpartition(".")[0] for name in changed[0])
    sizes = list(split.sizes or ())

    def hook(path: str, module: nn.Module, args: tuple[Tensor], _output: Tensor) -> Tensor:
        parts = zip(args[0].split(sizes, 1), changed, strict=True)
        bias = f"{path}.bias"
        return torch.cat([F.linear(h, own[f"{path}.weight"], own.get(bias, module.bias)) for h, own in parts], 1)

    handles = [host.model.get_submodule(path).register_forward_hook(partial(hook, path)) for path in paths]
    try:
        return float_tensors(host.model(**host.inputs))
    finally:
        for handle in handles:
            handle.remove()
