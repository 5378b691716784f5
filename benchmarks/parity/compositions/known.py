"""Where the `adapters` library composes otherwise than the definitions say, or refuses, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import adapterkit as ak

from .case import ComposedCase

__all__ = ["Fault", "faults", "refusal"]


@dataclass(frozen=True)
class Fault:
    """A known difference.

    Attributes:
        reason: What differs and why, for the docs.
        applies: To which cases.
        name: What `formula.outputs` calls it; None where it has no such fault, as of a refusal.
    """

    reason: str
    applies: Callable[[ComposedCase], bool]
    name: str | None = None


def faults(case: ComposedCase) -> list[Fault]:
    """What is known to be wrong in a case; the formula with all of it is what that library computes."""
    return [fault for fault in _FAULTS if fault.applies(case)]


def refusal(case: ComposedCase) -> Fault | None:
    """Why that library does not run a case."""
    return next((fault for fault in _REFUSALS if fault.applies(case)), None)


def _blocks(composition: Any) -> Iterator[ak.Composition]:
    """A composition and all in it."""
    if not isinstance(composition, str):
        yield composition
        for child in composition.children:
            yield from _blocks(child)


def _has(case: ComposedCase, *kinds: type[Any]) -> bool:
    return any(isinstance(block, kinds) for block in _blocks(case.composition))


def _is_nested(case: ComposedCase) -> bool:
    """Whether a composition stands in another that prepares what its children read: any but a Stack."""
    return any(
        not isinstance(block, (ak.Stack, ak.Drop)) and not all(isinstance(child, str) for child in block.children)  # type: ignore[union-attr]  # a block, not a name
        for block in _blocks(case.composition)
    )


def _weighs_stack(case: ComposedCase) -> bool:
    return any(
        isinstance(block, ak.Fuse) and any(isinstance(child, ak.Stack) for child in block.children)
        for block in _blocks(case.composition)
    )


def _reads_elsewhere(case: ComposedCase) -> bool:
    is_other = case.fusion.get("query_reads") == "site" or bool(case.fusion.get("residual_before"))
    return case.method == "seq_bn" and _has(case, ak.Fuse) and is_other


def _stacks(case: ComposedCase) -> bool:
    """Whether several adapters are one after the other."""
    return any(isinstance(block, ak.Stack) and len(block.children) > 1 for block in _blocks(case.composition))


_FAULTS = (
    Fault(
        "`Average` takes the mean of children that it has multiplied by normalised weights: all is divided by their "
        "number once too often, with bottlenecks the branch itself, too; the average of an adapter with itself is not it",
        lambda case: _has(case, ak.Average),
        "mean",
    ),
    Fault(
        "of parallel bottlenecks one after the other, only the last counts",
        lambda case: case.method == "par_bn" and _stacks(case),
        "last",
    ),
    Fault(
        "a fusion of parallel bottlenecks adds the stream once too often (and with `residual_before` through Wv), and "
        "`query_before_ln` does nothing there",
        lambda case: case.method == "par_bn" and _has(case, ak.Fuse),
        "stream",
    ),
    Fault(
        "a composition within another, and `MultiTask`, prepares what its adapters read a second time: the stream is "
        "added, and in BERT the norm taken, twice",
        lambda case: case.method == "seq_bn" and (_is_nested(case) or _has(case, ak.Rows)),
        "twice",
    ),
    Fault(
        "a fusion over a Stack weighs what its last adapter adds, and loses what those before did",
        _weighs_stack,
        "last weighed",
    ),
    Fault(
        "`query_before_ln` and `residual_before` take the branch without the stream, although the adapters read their sum; "
        "ours takes the tensor at the adapters' place, which is the sum",
        _reads_elsewhere,
        "branch",
    ),
    Fault(
        "the temperature falls with every forward, in evaluation, too; ours when `kit.anneal_fusion` says so",
        lambda case: case.forwards > 1,
        "cooling",
    ),
    Fault(
        "LoRAs one after the other each read what the one before made of the input, B2 A2 B1 A1, instead of their sum",
        lambda case: case.method == "lora" and _stacks(case),
        "serial",
    ),
    Fault(
        "in ViT, `Parallel` of IA3 lays the repeated rows of keys and values one after another, as tokens of the rows that "
        "there were",
        lambda case: case.method == "ia3" and case.host == "vit" and _has(case, ak.Parallel),
    ),
)
_REFUSALS: tuple[Fault, ...] = (
    Fault(
        "under `Parallel`, T5 and BART fail if the decoder has a padding mask, which is not repeated",
        lambda case: case.host in ("t5", "bart") and _has(case, ak.Parallel) and not case.without,
    ),
    Fault(
        "`Parallel` of parallel bottlenecks adds repeated rows to rows that were not repeated, and fails",
        lambda case: case.method == "par_bn" and _has(case, ak.Parallel),
    ),
    Fault(
        "GPT-2's fused projection of queries, keys and values takes one LoRA or IA3, and no composition",
        lambda case: not case.is_bottleneck and case.host == "gpt2",
    ),
    Fault(
        "in ViT, `Parallel` of LoRA fails, since the repeated rows are taken for tokens",
        lambda case: case.method == "lora" and case.host == "vit" and _has(case, ak.Parallel),
    ),
    Fault(
        "LoRAs one after the other fail at a layer whose output is not as wide as its input (Llama's grouped values), "
        "since each reads what the one before made",
        lambda case: case.method == "lora" and case.host == "llama" and _stacks(case),
    ),
    Fault("there is no `Split` of LoRA and IA3", lambda case: not case.is_bottleneck and _has(case, ak.Split)),
)
