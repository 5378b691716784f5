"""All cases of compositions: each alone in several families, each setting of a fusion, and one composition in another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import adapterkit as ak

from ..explained import explanation
from ..families import families
from .case import BOTTLENECKS, METHODS, ComposedCase

__all__ = ["QUICK", "composed_cases"]

# What `--quick` leaves of the families.
QUICK = ("bert", "gpt2")
CORE = ("bert", "roberta", "distilbert", "gpt2", "llama", "t5", "vit", "bart")
_CONFIG: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}}
_SIZES = {"vit": (2, 3)}  # of the parts of a sequence
# Settings of a fusion, in our words, and what theirs takes beside them.
_SETTINGS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("the query reads the place", {"query_reads": "site"}, {}),
    ("the residual before the values", {"residual_before": True}, {}),
    ("values that start at random", {"value_init": "normal"}, {}),
    ("a temperature of 50", {"temperature": 50.0}, {}),
    ("no query", {"query": False}, {}),
    ("no key", {"key": False}, {}),
    ("neither query nor key nor value", {"query": False, "key": False, "value": False}, {}),
    ("values after the softmax", {}, {"value_before_softmax": False}),
)


def composed_cases(chosen: list[str]) -> list[ComposedCase]:
    """Every case of these families, those of one family and method together."""
    found = [case for case in (*_fusions(), *_alone(), *_nested(), *_dropped()) if case.host in chosen]
    return sorted(found, key=lambda case: (chosen.index(case.host), METHODS.index(case.method)))


def _case(kind: str, method: str, host: str, composition: ak.Composition, told: str = "", **more: Any) -> ComposedCase:
    setting = f"{composition!r}, {told}" if told else repr(composition)
    return ComposedCase(
        "adapters", method, host, setting, _CONFIG.get(method, {}), kind=kind, composition=composition, **more
    )


def _fuse(*children: Any, name: str = "fusion") -> ak.Fuse:
    return ak.Fuse(*children, name=name)


def _fusions() -> Iterator[ComposedCase]:
    static = {"value": False}
    for host in families():
        for method in BOTTLENECKS:
            # Where one adapter alone is not the same in both, several are not; DeBERTa's reason is put right.
            if explanation(host, method) is None or host == "deberta":
                yield _case("Fuse, dynamic", method, host, _fuse("a", "b"))
                yield _case("Fuse, static", method, host, _fuse("a", "b", "c"), fusion=static)
    for host in ("bert", "gpt2"):
        for method in BOTTLENECKS:
            for told, fusion, there in _SETTINGS:
                yield _case("Fuse, options", method, host, _fuse("a", "b", "c"), told, fusion=fusion, there=there)
            warm = {"temperature": 50.0}
            yield _case("Fuse, options", method, host, _fuse("a", "b"), "the second forward", fusion=warm, forwards=2)
            yield _case("Fuse with others", method, host, ak.Stack("c", _fuse("a", "b")))
            yield _case("Fuse with others", method, host, _fuse(ak.Stack("a", "b"), "c"))


def _alone() -> Iterator[ComposedCase]:
    for host in CORE:
        for method in METHODS:
            is_fused = host == "gpt2" and method in ("lora", "ia3")
            yield _case("Stack", method, host, ak.Stack("a", "b"))
            yield _case("Stack", method, host, ak.Stack("c", "a", "b"))
            yield _case("Average", method, host, ak.Average("a", "b"))
            yield _case("Average", method, host, ak.Average("a", "b", "c", weights=(0.5, 0.2, 0.9)))
            yield _case("BatchSplit", method, host, ak.BatchSplit("a", "b", sizes=(1, 2)))
            yield _case("BatchSplit", method, host, ak.BatchSplit("b", "c", "a", sizes=(1, 1, 1)))
            yield _case("Rows", method, host, ak.Rows(("b", "a", "a")))
            yield _case("Parallel", method, host, ak.Parallel("a", "b"))
            yield _case("Parallel", method, host, ak.Parallel("c", "a", "b"))
            if host in ("t5", "bart"):
                told, without = "no mask of the decoder", ("decoder_attention_mask",)
                yield _case("Parallel", method, host, ak.Parallel("a", "b"), told, without=without)
            if not is_fused:  # nothing to compare: theirs refuses, and the formula takes linear layers apart by token
                yield _case("Split", method, host, ak.Split("a", "b", sizes=_SIZES.get(host, (3, 4))))


def _nested() -> Iterator[ComposedCase]:
    split: dict[str, Any] = {"sizes": (3, 4)}
    batch: dict[str, Any] = {"sizes": (1, 2)}
    everywhere: tuple[ak.Composition, ...] = (
        ak.Stack("c", ak.BatchSplit("a", "b", **batch)),
        ak.Stack("c", ak.Average("a", "b")),
        ak.Stack("c", ak.Parallel("a", "b")),
        ak.Parallel(ak.Stack("a", "b"), "c"),
        ak.Parallel(ak.Average("a", "b"), "c"),
        ak.BatchSplit(ak.Stack("a", "b"), "c", **batch),
        ak.BatchSplit("a", ak.BatchSplit("b", "c", sizes=(1, 1)), **batch),
        ak.BatchSplit(ak.Average("a", "b"), "c", **batch),
        ak.Average(ak.Stack("a", "b"), "c"),
        ak.Average(ak.BatchSplit("a", "b", **batch), "c"),
    )
    in_sequences = (
        ak.Stack("c", ak.Split("a", "b", **split)),
        ak.Split(ak.Stack("a", "b"), "c", **split),
        ak.Split(ak.Split("a", "b", sizes=(1, 2)), "c", **split),
        ak.Split(ak.BatchSplit("a", "b", **batch), "c", **split),
        ak.Split(ak.Average("a", "b"), "c", **split),
        ak.BatchSplit(ak.Split("a", "b", **split), "c", **batch),
        ak.Average(ak.Split("a", "b", **split), "c"),
    )
    for hosts, methods, compositions in (
        (("bert", "gpt2"), BOTTLENECKS, everywhere + in_sequences),
        (("bert", "t5"), ("lora", "ia3"), everywhere),
    ):
        for host in hosts:
            for method in methods:
                yield from (_case("one in another", method, host, composition) for composition in compositions)


def _dropped() -> Iterator[ComposedCase]:
    for host in CORE:
        for method in METHODS:
            yield _case("Drop", method, host, ak.Drop("a", layers=(0,)))
    for method in METHODS:
        yield _case("Drop", method, "bert", ak.Drop(ak.BatchSplit("a", "b", sizes=(1, 2)), layers=(0, 2)))
