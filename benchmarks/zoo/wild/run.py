"""`python -m benchmarks.zoo --catalogue wild_models`: curated models, then many that are drawn, judged by their truth.

`--count` models are drawn with `--seed`; `--shard 3/10` takes a tenth of all; `--only SPEC …` judges these and says all
about them; `--check` compares with the committed results instead of writing them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...report import environment
from .curated import curated
from .judge import OUTCOMES, Verdict
from .spec import Spec, grown, parse

__all__ = ["main"]

RESULTS = Path(__file__).parents[2] / "results" / "zoo_wild_models.json"
COUNT, SEED = 1500, 0
CHUNK = 40  # models for one call of a worker
RENEWED = 400  # models after which the workers are renewed
Verdicts = dict[Spec, Verdict]


def main(arguments: list[str] | None = None) -> int:
    """Judge, print, write; 1 if any is wrong, or differs from the committed results."""
    options = _options(arguments)
    if options.only:
        verdicts = dict(_judged([parse(text) for text in options.only], 1))
        _print_all(verdicts)
        return int(any(outcome_of(verdict) == "wrong" for verdict in verdicts.values()))
    fixed, others = curated(), draw_many(options.count, options.seed)
    specs = [*fixed, *(spec for spec in others if spec not in {*fixed})]
    if options.shard:
        number, of = map(int, options.shard.split("/"))
        specs = specs[number % of :: of]
    began, verdicts = time.monotonic(), {}
    for spec, verdict in _judged(specs, options.workers):
        verdicts[spec] = verdict
        _print_wrong(spec, verdict)
    seconds = time.monotonic() - began
    print(f"\n{table(verdicts)}\n\n{summary(verdicts)}; {seconds:.0f} s")
    wrong = [spec for spec, verdict in verdicts.items() if outcome_of(verdict) == "wrong"]
    if options.check:
        return int(bool(wrong) or bool(_moved(verdicts)))
    if not options.shard:
        RESULTS.write_text(json.dumps(_content(verdicts, {*fixed}, options, seconds), indent=1) + "\n")
    return int(bool(wrong))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help="how many are drawn, beside the curated ones")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--shard", help="NUMBER/OF: a part of them")
    parser.add_argument("--only", nargs="*", metavar="SPEC", help="judge these, and say all about them")
    parser.add_argument("--check", action="store_true", help="compare with the committed results instead of writing them")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    return parser.parse_args(arguments)


def draw_many(count: int, seed: int) -> list[Spec]:
    """Draw so many specs, each once."""
    draw, found = random.Random(seed), dict[Spec, None]()
    while len(found) < count:
        found[grown(draw.choice)] = None
    return list(found)


def _judged(specs: list[Spec], workers: int) -> Iterator[tuple[Spec, Verdict]]:
    """Judge specs, in their order, in processes that are renewed now and then."""
    if workers == 1:
        yield from zip(specs, _judge_some([str(spec) for spec in specs]), strict=True)
        return
    for start in range(0, len(specs), RENEWED):
        some = specs[start : start + RENEWED]
        chunks = [some[i : i + CHUNK] for i in range(0, len(some), CHUNK)]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for chunk, verdicts in zip(chunks, pool.map(_judge_some, [list(map(str, c)) for c in chunks]), strict=True):
                yield from zip(chunk, verdicts, strict=True)


def _judge_some(specs: list[str]) -> list[Verdict]:
    import torch

    from .judge import judge

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return [judge(parse(spec)) for spec in specs]


# --- what came of it --------------------------------------------------------------------------------------------------


def outcome_of(verdict: Verdict) -> str:
    """The worst outcome of a model's questions."""
    return max((outcome for outcome, _ in verdict.values()), key=OUTCOMES.index)


def table(verdicts: Verdicts) -> str:
    """How many models are right, refused in something and wrong in something; by each of their parts, and by question."""
    parts: dict[str, Counter[str]] = {}
    for spec, verdict in verdicts.items():
        for row, part in list(spec.parts()) or [("plain", "")]:
            parts.setdefault(f"{row}={part}".rstrip("="), Counter())[outcome_of(verdict)] += 1
    lines = [_line("models with", *OUTCOMES), *(_line(part, *_counts(parts[part])) for part in sorted(parts))]
    lines += ["", _line("questions", *OUTCOMES)]
    return "\n".join(lines + [_line(name, *_counts(found)) for name, found in by_question(verdicts).items()])


def by_question(verdicts: Verdicts) -> dict[str, Counter[str]]:
    """Count the outcomes of each question."""
    found: dict[str, Counter[str]] = {}
    for verdict in verdicts.values():
        for question, (outcome, _) in verdict.items():
            found.setdefault(question, Counter())[outcome] += 1
    return found


def _line(name: str, *numbers: object) -> str:
    return f"{name:28}" + "".join(f"{number!s:>10}" for number in numbers)


def _counts(found: Counter[str]) -> Iterable[int]:
    return (found[outcome] for outcome in OUTCOMES)


def summary(verdicts: Verdicts) -> str:
    """The numbers of models and of questions, in a sentence."""
    models = Counter(map(outcome_of, verdicts.values()))
    asked: Counter[str] = sum(by_question(verdicts).values(), Counter())
    of = ", ".join(f"{models[outcome]} {outcome}" for outcome in OUTCOMES)
    share = asked["refused"] / max(sum(asked.values()), 1)
    return f"{len(verdicts)} models: {of}; of {sum(asked.values())} questions {asked['wrong']} wrong, {share:.1%} refused"


def _print_wrong(spec: Spec, verdict: Verdict) -> None:
    for question, (outcome, reason) in verdict.items():
        if outcome == "wrong":
            print(f"WRONG  --only {spec}  {question}: {reason}", flush=True)


def _print_all(verdicts: Verdicts) -> None:
    for spec, verdict in verdicts.items():
        print(spec)
        for question, (outcome, reason) in verdict.items():
            print(f"  {question:22} {outcome:8} {reason}")


def _content(verdicts: Verdicts, fixed: set[Spec], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What is committed: of curated models the outcome by question; of all, numbers, and what is wrong."""
    models = Counter(map(outcome_of, verdicts.values()))
    return {
        "environment": environment(),
        "seed": options.seed,
        "count": options.count,
        "seconds": round(seconds),
        "summary": {outcome: models[outcome] for outcome in OUTCOMES},
        "questions": {name: {o: found[o] for o in OUTCOMES} for name, found in by_question(verdicts).items()},
        "wrong": {str(spec): wrong for spec, verdict in verdicts.items() if (wrong := _only(verdict, "wrong"))},
        "curated": {str(s): {o: _only(v, o) for o in OUTCOMES[1:]} for s, v in verdicts.items() if s in fixed},
    }


def _only(verdict: Verdict, wanted: str) -> dict[str, str]:
    """The questions of one outcome, with the reasons."""
    return {question: reason for question, (outcome, reason) in verdict.items() if outcome == wanted}


def _moved(verdicts: Verdicts) -> list[str]:
    """Print and list which questions of curated models were right in the committed results, and are not now."""
    before = json.loads(RESULTS.read_text())["curated"] if RESULTS.exists() else {}
    moved = []
    for spec, verdict in verdicts.items():
        if str(spec) not in before:
            continue
        known = {question for questions in before[str(spec)].values() for question in questions}
        now = ((question, *found) for question, found in verdict.items())
        moved += [f"{spec}: {q} was right, is {o}: {why}" for q, o, why in now if o != "right" and q not in known]
    print("\n".join(moved))
    return moved
