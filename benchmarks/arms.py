"""What benchmarks that compare arms share: the choice of settings on validation data, and differences over seeds."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["best_of", "choose", "print_summary", "summarise"]

STUDENT_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by number of seeds

Row = dict[str, Any]


def choose(trial: Callable[[float, int], Row], rates: Sequence[float], epochs: int, other: int, third: int) -> list[Row]:
    """All that was tried for one arm, the chosen setting marked, by one rule for all arms.

    The learning rates with so many epochs, and twice the largest or half the smallest if that is the best; then the best
    rate with another number of epochs, and with a third if that is no better.

    Args:
        trial: Runs one learning rate with one number of epochs; gives a row with its validation accuracy.
        rates: In ascending order.
        epochs: For all rates.
        other: Tried with the best rate.
        third: Likewise, if the other is no better.
    """
    tried = [trial(rate, epochs) for rate in rates]
    beyond = {rates[-1]: 2 * rates[-1], rates[0]: rates[0] / 2}.get(best_of(tried)["learning_rate"])
    if beyond is not None:
        tried.append(trial(beyond, epochs))
    best = best_of(tried)
    tried.append(trial(best["learning_rate"], other))
    if best_of(tried) is best:
        tried.append(trial(best["learning_rate"], third))
    return [{**row, "is_chosen": row is best_of(tried)} for row in tried]


def best_of(rows: Iterable[Row]) -> Row:
    """The row with the highest accuracy; the earlier one of equals."""
    return max(rows, key=lambda row: row["validation_accuracy"])


def summarise(rows: Sequence[Row], arms: Iterable[str], baseline: str) -> list[Row]:
    """Mean and spread of each arm, and its paired difference to the baseline with a 95 % interval.

    Args:
        rows: The accuracy of each arm with each seed.
        arms: In the order of the table.
        baseline: One of them.
    """
    scores = {arm: [row["accuracy"] for row in rows if row["arm"] == arm] for arm in arms}
    summary = []
    for arm, values in scores.items():
        differences = [a - b for a, b in zip(values, scores[baseline], strict=True)]
        n = len(values)
        half = STUDENT_T_95[n] * statistics.stdev(differences) / n**0.5
        summary.append(
            {
                "arm": arm,
                "mean": statistics.mean(values),
                "stdev": statistics.stdev(values),
                f"minus_{baseline}": statistics.mean(differences),
                "interval": [statistics.mean(differences) - half, statistics.mean(differences) + half],
            }
        )
    return summary


def print_summary(summary: Sequence[Row], baseline: str) -> None:
    """The summary as a table."""
    print(f"\n{'arm':<15} {'accuracy':>8} {'± sd':>6} {f'minus {baseline} (95 % interval)':>32}")
    for row in summary:
        low, high = row["interval"]
        print(
            f"{row['arm']:<15} {row['mean']:>7.2f}% {row['stdev']:>6.2f} "
            f"{row[f'minus_{baseline}']:>+12.2f} [{low:+.2f}, {high:+.2f}]"
        )
