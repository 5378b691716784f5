"""Tell what a branch does: attention, cross-attention, feed-forward, convolution, or another way of mixing tokens.

Names of classes are not asked, only operations. A branch with softmax(Q @ K) @ V is an attention; one that mixes no tokens,
each position for itself, is a feed-forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..tracing.flow import MATMULS, Flow, bits
from ..tracing.graph import Operation
from .additions import Addition
from .attention_operands import Attentions
from .description import Kind
from .feature_axes import is_wide_convolution
from .token_mixing import TokenMixing

__all__ = ["Kinds"]

# Operations that choose experts for tokens.
_ROUTING = frozenset(("topk", "argmax", "one_hot", "_grouped_mm", "histc"))
# Operations that carry something from one token to others.
_MIXING = frozenset(("cumsum", "cumprod", "flip", "logcumsumexp", "roll", "scan", "lstm", "gru", "mkldnn_rnn_layer"))


class Kinds:
    """Tells what branches do."""

    def __init__(self, attentions: Attentions, mixing: TokenMixing) -> None:
        self.flow, self.axes, self.attentions, self.mixing = attentions.flow, attentions.axes, attentions, mixing

    def of(self, addition: Addition, inside: int, end: int, weighing: int) -> tuple[Kind, bool]:
        """Return what the branch of these nodes does, and whether it routes tokens to experts.

        Args:
            inside: The set of its nodes.
            end: Its last node.
            weighing: The set of its projections that only choose or weigh what others make.

        The order of the questions matters: an attention has products that mix tokens, a mixture of experts may sort them.
        """
        if inside & self.flow.attentions:
            return self._attention(addition, inside), False
        if _fills_slots(self.flow, inside, weighing):
            return "feedforward", True
        nodes = [self.flow.nodes[i] for i in bits(inside)]
        is_wide = any(is_wide_convolution(self.flow, node) for node in nodes)
        # What chooses, and is no router, chooses no experts: TimesNet's convolutions are told by which periods to run.
        routes = any(node.op in _ROUTING for node in nodes) and bool(weighing or not is_wide)
        named = None if routes else self._named(nodes, weighing, is_wide=is_wide)
        if named is not None:
            return named, False
        # What looks like a feed-forward so far may still sum over tokens, and what multiplies activations may not: each
        # token's weights by what experts make of it. A mixture of experts sorts tokens; a short convolution leaves it one.
        moves = None if is_wide else self.mixing.is_in(addition, inside, end, weighing)
        if moves is None:
            moves = not routes and self._multiplies(nodes)
        return ("mixer", False) if moves else ("feedforward", routes)

    def _attention(self, addition: Addition, inside: int) -> Kind:
        """Return which attention a branch is: a cross-attention if all that is in it attend to something else."""
        cores = bits(inside & self.flow.attentions)
        is_cross = all(self.attentions.is_cross(core, addition.stream, inside) for core in cores)
        return "crossattention" if is_cross else "attention"

    def _named(self, nodes: Sequence[Operation], weighing: int, *, is_wide: bool) -> Kind | None:
        """Return what a branch without experts does, as far as its operations tell by name; None if they do not."""
        unweighed = [node for node in nodes if not self.flow.ancestors[node.index] & weighing]
        if any(map(self._mixes_tokens, nodes)) or _is_recurrent(unweighed):
            return "mixer"
        if self._multiplies(nodes):
            return None
        if is_wide:  # some pool besides, to gate channels
            return "convolution"
        return "mixer" if any("pool" in node.op for node in nodes) else None

    def _multiplies(self, nodes: Sequence[Operation]) -> bool:
        """Tell whether activations are multiplied with activations by a matrix product."""
        return any(self.flow.products >> node.index & 1 and node.op in MATMULS for node in nodes)

    def _mixes_tokens(self, node: Operation) -> bool:
        """Tell whether an operation is a scan, a Fourier transform, or projects the tokens' axis."""
        return node.op in _MIXING or node.op.startswith("_fft") or self.axes.projects_tokens(node)


def _fills_slots(flow: Flow, inside: int, weighing: int) -> bool:
    """Tell whether one router mixes tokens for the experts, and what the experts return for the tokens (Soft-MoE).

    An attention has other weights on its way in than on its way out, and projects nothing between the two.
    """
    computing = inside & flow.projections & ~weighing

    def is_weighed(node: Operation) -> bool:
        before = (flow.ancestors[i] | 1 << i for i in flow.activations(node))
        return node.op in MATMULS and any(mask & weighing and not mask & computing for mask in before)

    weighed = [i for i in bits(inside & flow.products) if is_weighed(flow.nodes[i])]
    return any(flow.between(weighed[0], i) & computing for i in weighed)


def _is_recurrent(nodes: list[Operation]) -> bool:
    """Tell whether one position is read after another: the same tensor at three or more indices of one axis."""
    read = {(node.inputs[0], node.numbers) for node in nodes if node.op == "select" and len(node.inputs) == 1}
    # select(tensor, axis, index). Two are common without recurrence: the first token, the last.
    indices = Counter((source, numbers[0]) for source, numbers in read if len(numbers) == 2)
    return any(count > 2 for count in indices.values())
