"""Tell a router from what computes values: what it makes chooses experts, and weighs what they return.

    weights, chosen = softmax(router(x)).topk(2)
    out = sum(weights[:, i] * experts[chosen[i]](x) for i in range(2))

Of the projections here only the experts' make numbers that arrive at the end of the branch. The router's arrive as an index
(`chosen`), or as a factor that is one number for all features of a token (`weights`). So a projection's product is followed
to the end of its branch; no name of a module is asked.
"""

from __future__ import annotations

from torch import Tensor

from ..tracing.flow import MATMULS, SOFTMAX, Flow, bits
from ..tracing.graph import Operation

__all__ = ["only_weighs", "routers", "weighs_by_softmax"]

_FACTORS = frozenset(("mul", "mul_", "div", "div_", "addcmul", "addcmul_"))
# From here on a product's numbers say which, or how much of it: they weigh, also in a matrix product (tokens to experts).
_CHOOSING = SOFTMAX | {"topk", "sigmoid", "sort", "max", "one_hot", "sigmoid_", "softplus"}


def routers(flow: Flow, inside: int, end: int) -> int:
    """Return the set of projections of a branch that reach its end as an index or a weight of whole tokens alone.

    Args:
        inside: The set of nodes of the branch.
        end: Its last node.
    """
    found = 0
    for i in reversed(list(bits(inside & flow.projections))):  # from the last: a router may have two layers
        if i != end and only_weighs(flow, i, inside, end, found):
            found |= 1 << i
    return found


def weighs_by_softmax(flow: Flow, weighing: int, inside: int) -> bool:
    """Tell whether one of the routers weighs by a softmax, as between experts: a gate by a sigmoid chooses nothing.

    Args:
        weighing: The set of routers of the branch.
    """
    softmax = [i for i in bits(inside) if flow.nodes[i].op in SOFTMAX]
    return any(flow.ancestors[i] & weighing for i in softmax)


def only_weighs(flow: Flow, start: int, inside: int, end: int, found: int = 0) -> bool:
    """Tell whether nothing that a projection makes reaches the end as a value.

    Args:
        found: The routers that come after it.
    """
    seen, todo = set[tuple[int, bool]](), [(start, flow.nodes[start].op in _CHOOSING)]
    while todo:
        i, chooses = todo.pop()
        if (i, chooses) in seen:
            continue
        seen.add((i, chooses))
        for reader in {*flow.readers[i]}:
            node = flow.nodes[reader]
            if not inside >> reader & 1:
                continue
            if (reader, i) in flow.coded:
                return False
            if found >> reader & 1 or not _is_value(node, i):
                continue
            is_product = node.op in MATMULS or bool(flow.attentions >> reader & 1)
            if is_product and chooses and not flow.projections >> reader & 1:
                continue  # weights that put tokens into experts, or the experts' outputs together
            if is_product or reader == end:
                return False
            todo.append((reader, chooses or node.op in _CHOOSING))
    return True


def _is_value(node: Operation, index: int) -> bool:
    """Tell whether an operation takes a node's numbers as values, and neither as weights nor to choose by."""
    return _reads_numbers(node, index) and not _is_weight(node, index)


def _reads_numbers(node: Operation, index: int) -> bool:
    """Tell whether an operation takes a node's numbers and makes numbers: not its indices, and no comparison."""
    # `topk` has one node and makes two tensors, so it is asked of the tensors that are taken.
    taken = [t for i, t in zip(node.inputs, node.taken, strict=False) if i == index]
    return any(map(_is_numbers, node.made)) and (not taken or any(map(_is_numbers, taken)))


def _is_numbers(tensor: Tensor) -> bool:
    """Tell whether a tensor holds no indices and no truth values."""
    return tensor.is_floating_point() or tensor.is_complex()


def _is_weight(node: Operation, index: int) -> bool:
    """Tell whether a node's numbers are a factor here, one for all features of a token, or a mask of an attention."""
    at = [(n, t) for n, (i, t) in enumerate(zip(node.inputs, node.taken, strict=False)) if i == index]
    if "scaled_dot_product" in node.op:
        return all(n > 2 for n, _ in at)  # after queries, keys and values
    if node.op not in _FACTORS or not node.shape or node.shape[-1] == 1:
        return False
    return bool(at) and all(t.dim() == 0 or t.shape[-1] == 1 or t.stride(-1) == 0 for _, t in at)
