"""How do adapters compare with full fine-tuning on real text, over seeds?

    python benchmarks/bench_sentiment.py --select    # choose learning rate and epochs of each arm, on the validation split
    python benchmarks/bench_sentiment.py             # the chosen settings on the test split, five seeds, paired intervals

Both print a table and write it as JSON under benchmarks/results/. The arms are those of examples/sentiment.py.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "examples"), str(Path(__file__).parent)]

import sentiment
from report import write_json

RATES = {"head only": (3e-3, 1e-2, 3e-2), "full": (2e-5, 5e-5, 1e-4), "adapter": (1e-3, 3e-3, 5e-3)}
SELECTION_SEED = 100  # not one of the seeds that are reported
STUDENT_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by number of seeds


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
    """Choose learning rate and epochs of each arm on the validation split, by the same rule for all.

    Three learning rates with three epochs, and the next one if the best is the largest; then the best one with two
    epochs, and with five if two are no better than three.
    """
    rows = []
    for arm, rates in RATES.items():
        tried = [trial(arm, size, rate, 3) for rate in rates]
        if best_of(tried)["learning_rate"] == rates[-1]:
            tried.append(trial(arm, size, 2 * rates[-1], 3))
        best = best_of(tried)
        tried.append(trial(arm, size, best["learning_rate"], 2))
        if best_of(tried) is best:
            tried.append(trial(arm, size, best["learning_rate"], 5))
        rows += [{**row, "is_chosen": row is best_of(tried)} for row in tried]
    return rows


def trial(arm: str, size: int, learning_rate: float, epochs: int) -> dict[str, Any]:
    """One arm with one setting on the validation split."""
    [result] = sentiment.run_jobs([job(arm, SELECTION_SEED, "validation", size, learning_rate, epochs)])
    print(f"{arm:<10} lr {learning_rate:<8g} epochs {epochs}  {result.accuracy:.2f}%", flush=True)
    return {"arm": arm, "learning_rate": learning_rate, "epochs": epochs, "validation_accuracy": result.accuracy}


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the highest accuracy; the earlier one of equals."""
    return max(rows, key=lambda row: row["validation_accuracy"])


def compare(size: int, seeds: int) -> list[dict[str, Any]]:
    """Each arm on the test split with each seed."""
    jobs = [job(arm, seed, "test", size, **s) for seed in range(seeds) for arm, s in sentiment.SETTINGS.items()]
    results = sentiment.run_jobs(jobs, workers=2)  # timings are the demo's affair, which runs one arm at a time
    return [{"arm": j.arm, "seed": j.seed, "accuracy": r.accuracy} for j, r in zip(jobs, results, strict=True)]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread of each arm, and its paired difference to full fine-tuning with a 95 % interval."""
    scores = {arm: [row["accuracy"] for row in rows if row["arm"] == arm] for arm in sentiment.SETTINGS}
    summary = []
    for arm, values in scores.items():
        differences = [a - b for a, b in zip(values, scores["full"], strict=True)]
        n = len(values)
        half = STUDENT_T_95[n] * statistics.stdev(differences) / n**0.5
        summary.append(
            {
                "arm": arm,
                "mean": statistics.mean(values),
                "stdev": statistics.stdev(values),
                "minus_full": statistics.mean(differences),
                "interval": [statistics.mean(differences) - half, statistics.mean(differences) + half],
            }
        )
    return summary


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
    summary = summarise(rows)
    print(f"\n{'arm':<10} {'accuracy':>8} {'± sd':>6} {'minus full (95 % interval)':>30}")
    for row in summary:
        low, high = row["interval"]
        print(
            f"{row['arm']:<10} {row['mean']:>7.2f}% {row['stdev']:>6.2f} "
            f"{row['minus_full']:>+10.2f} [{low:+.2f}, {high:+.2f}]"
        )
    write_json("sentiment", {"train_size": size, "seeds": seeds, "summary": summary, "rows": rows}, quick=args.quick)


if __name__ == "__main__":
    main()
