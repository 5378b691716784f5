"""How do adapters compare with full fine-tuning on real text, over seeds?

    python benchmarks/bench_sentiment.py --select    # choose learning rate and epochs of each arm, on the validation split
    python benchmarks/bench_sentiment.py             # the chosen settings on the test split, five seeds, paired intervals

Both print a table and write it as JSON under benchmarks/results/. The arms are those of examples/sentiment.py.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "examples"), str(Path(__file__).parent)]

import arms
import sentiment
from report import write_json

RATES = {"head only": (3e-3, 1e-2, 3e-2), "full": (2e-5, 5e-5, 1e-4), "adapter": (1e-3, 3e-3, 5e-3)}
SELECTION_SEED = 100  # not one of the seeds that are reported


def job(arm: str, seed: int, split: str, size: int, learning_rate: float, epochs: int) -> sentiment.Job:
    """One run of one arm."""
    return sentiment.Job(
        arm,
        sentiment.OFFLINE_MODEL,
        sentiment.OFFLINE_TEXT,
        seed,
        size,
        learning_rate,
        epochs,
        Path("runs/bench"),
        split,
    )


def select(size: int) -> list[dict[str, Any]]:
    """Choose learning rate and epochs of each arm on the validation split."""
    return [row for arm, rates in RATES.items() for row in arms.choose(partial(trial, arm, size), rates, 3, 2, 5)]


def trial(arm: str, size: int, learning_rate: float, epochs: int) -> dict[str, Any]:
    """One arm with one setting on the validation split."""
    [result] = sentiment.run_jobs([job(arm, SELECTION_SEED, "validation", size, learning_rate, epochs)])
    print(f"{arm:<10} lr {learning_rate:<8g} epochs {epochs}  {result.accuracy:.2f}%", flush=True)
    return {"arm": arm, "learning_rate": learning_rate, "epochs": epochs, "validation_accuracy": result.accuracy}


def compare(size: int, seeds: int) -> list[dict[str, Any]]:
    """Each arm on the test split with each seed."""
    jobs = [job(arm, seed, "test", size, **s) for seed in range(seeds) for arm, s in sentiment.SETTINGS.items()]
    results = sentiment.run_jobs(jobs, workers=2)  # timings are the demo's affair, which runs one arm at a time
    return [{"arm": j.arm, "seed": j.seed, "accuracy": r.accuracy} for j, r in zip(jobs, results, strict=True)]


def main() -> None:
    """Select settings, or compare the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select", action="store_true", help="choose settings on the validation split")
    parser.add_argument("--quick", action="store_true", help="a few sentences and two seeds, to see that it runs")
    args = parser.parse_args()
    size, seeds = (64, 2) if args.quick else (3000, 5)
    if args.select:
        rows = select(size)
        print(f"chosen: {[row for row in rows if row['is_chosen']]}")
        write_json("sentiment_selection", {"train_size": size, "rows": rows}, quick=args.quick)
        return
    rows = compare(size, seeds)
    summary = arms.summarise(rows, sentiment.SETTINGS, "full")
    arms.print_summary(summary, "full")
    write_json("sentiment", {"train_size": size, "seeds": seeds, "summary": summary, "rows": rows}, quick=args.quick)


if __name__ == "__main__":
    main()
