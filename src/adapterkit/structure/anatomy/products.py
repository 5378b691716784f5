"""List what the blocks multiply by: every linear layer, and every Parameter that a module multiplies by itself.

This is what `@linear` names, and what `@feedforward.first` means where all experts are one Parameter of three axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import or_

from torch import nn

from ..hosts import described_projection
from ..paths import ancestors
from ..tracing.flow import Flow, bits
from ..tracing.graph import ModuleCall, Operation
from .branches import Branch
from .description import Product
from .routers import only_weighs

__all__ = ["first_of", "last_of", "products", "resting", "unread"]


def first_of(flow: Flow, branch: Branch) -> int:
    """Return the set of a branch's first projections: no router, and behind none but routers."""
    projections = branch.inside & flow.projections & ~(branch.routers | branch.aside)
    return sum(1 << i for i in bits(projections) if not flow.ancestors[i] & projections)


def last_of(flow: Flow, branch: Branch) -> int:
    """Return the set of a branch's last projections: the first that are met on the ways back from its end."""
    projections = branch.inside & flow.projections & ~(branch.routers | branch.aside)
    return flow.nearest(branch.end, projections, branch.inside & ~branch.aside, stop=branch.routers | flow.sizes)


def resting(flow: Flow, modules: dict[str, nn.Module], branches: Sequence[Branch]) -> dict[str, tuple[str, ...]]:
    """Map each module that projects in an expert → its like in the experts that no token of the traced forward chose.

    An expert is told by those beside it: of one class and one build, where one ran and the other did not.
    """
    ran = {path for call in flow.calls for path in ancestors(call.path or "")}
    found: dict[str, tuple[str, ...]] = {}
    for branch in branches:
        for path in _paths(flow, branch.inside & flow.projections & ~branch.routers) if branch.is_moe else ():
            for expert in ancestors(path):
                if expert and _is_in_a_block(expert, frozenset([branch.block or ""])) and expert != branch.block:
                    idle = (other for other in _built_alike(modules, expert) if other not in ran)
                    found[path] = (*found.get(path, ()), *(f"{other}{path[len(expert) :]}" for other in idle))
    return {path: others for path, others in found.items() if others}


def products(
    flow: Flow, modules: dict[str, nn.Module], branches: Sequence[Branch], idle: dict[str, tuple[str, ...]]
) -> list[Product]:
    """List what the transformer blocks multiply by, in the order in which it runs; routers and convolutions left out.

    Args:
        idle: What `resting` found.
    """
    names = {id(p): f"{path}.{leaf}".lstrip(".") for path, m in modules.items() for leaf, p in m._parameters.items()}
    part_of = {"first": _union(first_of(flow, b) for b in branches), "last": _union(last_of(flow, b) for b in branches)}
    found: dict[tuple[str, str | None], Product] = {}
    for i, call in _multiplying(flow, branches):
        path, weight = call.path or "", _weight(flow, names, flow.nodes[i])
        parts = {part for part, mask in part_of.items() if mask >> i & 1}
        is_output = _is_output(flow, i, call)
        for like in (path, *idle.get(path, ())):
            name = weight if like == path or weight is None else f"{like}{weight.removeprefix(path)}"
            before = found.get((like, name))
            parts |= {*(before.parts if before else ())}
            found[like, name] = Product(like, name, tuple(sorted(parts)), is_output and (not before or before.is_output))
    return list(found.values())


def unread(flow: Flow, modules: dict[str, nn.Module], branches: Sequence[Branch], known: Sequence[Product]) -> list[str]:
    """List the linear layers of the transformer blocks that neither ran nor had their weight read.

    Args:
        known: What `products` found.
    """
    ran, read = {call.path for call in flow.calls}, {product.weight for product in known}
    idle = {product.path for product in known}
    return [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Linear) and _is_in_a_block(path, _blocks(branches))
        if path not in ran | idle and f"{path}.weight" not in read
    ]


def _multiplying(flow: Flow, branches: Sequence[Branch]) -> Iterator[tuple[int, ModuleCall]]:
    """Yield the nodes that multiply by a weight in the blocks, with the innermost call that runs each.

    Of a layer that a package describes, and whose operation is not known to be a product, it is what the layer returns.
    """
    described = _union(
        1 << i for call in flow.calls if described_projection(call.module) is not None for _, i in call.outputs
    )
    # A model that is one block holds its embeddings and heads as well: there, what is on a branch is the block's.
    on_branches = _union(branch.inside for branch in branches if branch.block == "")
    for i in bits(flow.projections | described):
        call = flow.nodes[i].call
        if call is None or call.path is None or "convolution" in flow.nodes[i].op:
            continue
        is_inside = _is_in_a_block(call.path, _blocks(branches)) or on_branches >> i & 1
        if is_inside and not any(_is_no_layers(flow, branch, i, call) for branch in branches):
            yield i, call


def _is_no_layers(flow: Flow, branch: Branch, node: int, call: ModuleCall) -> bool:
    """Tell whether a product is no layer's own.

    It chooses experts, it is a LoRA's beside a layer, or it makes an attention's scores with a table of positions.
    """
    if not branch.inside >> node & 1:
        return False
    if branch.aside >> node & 1:
        return True
    if branch.is_moe:
        return bool(branch.routers >> node & 1)
    is_inside = branch.kind.endswith("attention") and not _is_output(flow, node, call)
    return is_inside and only_weighs(flow, node, branch.inside, branch.end)


def _is_output(flow: Flow, node: int, call: ModuleCall) -> bool:
    """Tell whether a module returns a product that it makes."""
    return any(flow.unscaled(i) == node or _is_product_of_codes(flow, i, node) for _, i in call.outputs)


def _is_product_of_codes(flow: Flow, index: int, node: int) -> bool:
    """Tell whether something is a product of integers, times the scales of the tokens that were rounded to these."""
    index = flow.unscaled(index)
    while node in flow.evidence and index != node and flow.nodes[index].op in ("mul", "mul_"):
        wide = [i for i in flow.activations(flow.nodes[index]) if flow.nodes[i].shape[-1:] != (1,)]
        if len(wide) != 1:
            return False
        index = flow.unscaled(wide[0])
    return index == node


def _weight(flow: Flow, names: dict[int, str], node: Operation) -> str | None:
    """Return the name of the Parameter that a product multiplies by, whatever is done to it before; None if of several."""
    for i in node.inputs[: len(node.taken)]:
        if flow.is_constant[i] and len(flow.nodes[i].shape) > 1:
            # A weight may be cut, scaled or normalised before it multiplies: the one matrix that it is made of counts.
            origins = [flow.nodes[k] for k in bits(flow.ancestors[i] | 1 << i) if flow.nodes[k].op == "parameter"]
            matrices = [n for n in origins if len(n.shape) > 1] or origins
            return names.get(id(matrices[0].made[0])) if len(matrices) == 1 else None
    return None


def _blocks(branches: Sequence[Branch]) -> frozenset[str]:
    """Return the blocks that do more than convolve, but for the whole model."""
    return frozenset(branch.block for branch in branches if branch.block and branch.kind != "convolution")


def _is_in_a_block(path: str, blocks: frozenset[str]) -> bool:
    """Tell whether a module is a block, or in one."""
    return not blocks.isdisjoint(ancestors(path))


def _built_alike(modules: dict[str, nn.Module], path: str) -> Iterator[str]:
    """Yield the modules beside one, of its class, whose Parameters have the shapes of its own."""
    around = path.rpartition(".")[0]

    def build(module: nn.Module) -> tuple[object, ...]:
        return type(module), *((name, p.shape) for name, p in module.named_parameters())

    for name, other in modules[around]._modules.items():
        beside = f"{around}.{name}".lstrip(".")
        if other is not None and beside != path and build(other) == build(modules[path]):
            yield beside


def _paths(flow: Flow, nodes: int) -> set[str]:
    """Return the paths of the innermost modules that ran these nodes."""
    calls = (flow.nodes[i].call for i in bits(nodes))
    return {call.path for call in calls if call is not None and call.path is not None}


def _union(masks: Iterable[int]) -> int:
    """Return the nodes in any of these sets."""
    return reduce(or_, masks, 0)
