"""Find where hidden states become logits over the tokens that an embedding of the model knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..tracing.flow import VIEWS, Flow, bits
from ..tracing.graph import ModuleCall

__all__ = ["output_calls"]


def output_calls(flow: Flow, streams: Iterable[int]) -> list[ModuleCall]:
    """List the calls of linear maps with one feature for each token of an embedding that feeds these streams.

    Nothing is projected after them. Where some share the embedding's weight, it is those alone.

    Example: for an embedding of 30522 tokens, the calls of the `Linear(768, 30522)` that BERT ends in.
    """
    tables = {table for stream in streams for table in _token_tables(flow, stream)}
    weights = {_origin(flow, flow.nodes[i].inputs[0]) for i in tables}
    sizes = {flow.nodes[flow.nodes[i].inputs[0]].shape[0] for i in tables}
    last = [i for i in _linear(flow) if not flow.descendants[i] & flow.projections]
    found = [
        i for i in last if sizes.intersection(flow.nodes[i].shape[-1:]) and any(flow.leads_to(table, i) for table in tables)
    ]
    # A head may classify into as many classes as there are tokens by chance; one that shares the weight cannot.
    tied = [i for i in found if weights & {_origin(flow, j) for j in flow.nodes[i].inputs if flow.is_constant[j]}]
    calls = (flow.nodes[i].call for i in tied or found)
    return list({call.path: call for call in calls if call is not None and call.path is not None}.values())


def _token_tables(flow: Flow, stream: int) -> Iterator[int]:
    """Yield the look-ups in the largest table among those by inputs of the model that a stream is made of.

    Smaller tables hold positions and types of tokens.
    """
    made = flow.ancestors[stream] | 1 << stream
    looked_up = [i for i in bits(made) if flow.nodes[i].op == "embedding" and _is_given(flow, flow.nodes[i].inputs[1])]
    sizes = {i: flow.nodes[flow.nodes[i].inputs[0]].shape[0] for i in looked_up}
    yield from (i for i in looked_up if sizes[i] == max(sizes.values()))


def _is_given(flow: Flow, index: int) -> bool:
    """Tell whether a node is an input of the model, or a view of one: positions are counted, not given."""
    return flow.nodes[_origin(flow, index)].op == "input"


def _origin(flow: Flow, index: int) -> int:
    """Return the node that one is a view of: of weights and integers, too, which `Flow.source` does not follow."""
    while flow.nodes[index].op in VIEWS:
        index = flow.nodes[index].inputs[0]
    return index


def _linear(flow: Flow) -> Iterator[int]:
    """Yield the projections that are all that a module does: it takes hidden states and returns their product."""
    for i in bits(flow.projections):
        node, call = flow.nodes[i], flow.nodes[i].call
        if call is None or "convolution" in node.op or not _has_matrix(flow, i):
            continue
        taken = {flow.source(j) for j in _operands(flow, i)}
        # The module takes what is projected, and returns it, whatever it casts or scales on the way.
        takes = any(flow.nodes[j].is_floating and flow.source(j) in taken for _, j in call.inputs)
        if takes and any(flow.unscaled(j) == i for _, j in call.outputs):
            yield i


def _has_matrix(flow: Flow, index: int) -> bool:
    """Tell whether a projection multiplies by a matrix; that of one which numbers showed need not be a tensor."""
    inputs = flow.nodes[index].inputs
    return index in flow.evidence or any(flow.is_constant[j] and len(flow.nodes[j].shape) == 2 for j in inputs)


def _operands(flow: Flow, index: int) -> list[int]:
    """List what a projection multiplies."""
    shown = flow.evidence.get(index)
    read = [flow.nodes[reader].inputs[at] for reader, at in shown.operands] if shown else []
    return read or flow.activations(flow.nodes[index])
