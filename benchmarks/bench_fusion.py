"""Does fusing adapters of four sentiment domains help the one with few labels?

    python benchmarks/bench_fusion.py ARCHIVE --select    # settings of each arm, on validation sentences
    python benchmarks/bench_fusion.py ARCHIVE             # the chosen ones on the test split, five seeds

Both print a table and write it as JSON under benchmarks/results/. The arms are those of examples/fusion.py, which also
says where the archive is from. The source domains and multi-task, which see thousands of sentences, use what
benchmarks/bench_sentiment.py chose for an adapter on critics' sentences of another origin.
"""

import argparse
import shutil
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "examples"), str(Path(__file__).parent)]

import arms
import fusion
import sentiment
from report import RESULTS, write_json

RATES = {
    "single task": (1e-3, 3e-3, 1e-2),
    "full": (5e-5, 1e-4, 2e-4),
    "stack": (1e-3, 3e-3, 1e-2),
    "average": (3e-3, 1e-2, 3e-2),
    "fusion": (1e-4, 3e-4, 1e-3),
}
SELECTION_SEED = 100  # not one of the seeds that are reported
OUT = Path("runs/bench/fusion")


def seed_run(data: Path, seed: int, split: str, *, quick: bool) -> fusion.Run:
    """One seed."""
    sizes = (64, 32) if quick else (fusion.TRAIN_SIZE, fusion.TARGET_SIZE)
    return fusion.Run(data, sentiment.OFFLINE_MODEL, seed, *sizes, OUT / str(seed), OUT / str(seed), split)


def select(data: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Choose learning rate and epochs of each arm of the target domain on its validation sentences."""
    run = seed_run(data, SELECTION_SEED, "validation", quick=quick)
    own = {source: fusion.train_source(run, source, fusion.SETTINGS["source"]) for source in fusion.SOURCES}
    run = replace(run, nearest=fusion.find_nearest(run))
    print(f"sources on their own validation sentences: {own}; nearest: {run.nearest}", flush=True)
    rows = []
    for arm, rates in RATES.items():
        tried = arms.choose(partial(trial, run, arm), rates, *((1, 2, 3) if quick else (10, 20, 5)))
        rows += tried
        if arm == "single task":  # average and fusion hold this adapter
            chosen = next(row for row in tried if row["is_chosen"])
            trial(run, arm, chosen["learning_rate"], chosen["epochs"])
    return rows


def trial(run: fusion.Run, arm: str, learning_rate: float, epochs: int) -> dict[str, Any]:
    """One arm with one setting on the validation sentences."""
    settings = {"learning_rate": learning_rate, "epochs": epochs}
    result, _ = fusion.run_arm(run, arm, settings)
    print(f"{arm:<12} lr {learning_rate:<8g} epochs {epochs:<3} {result.accuracy:.2f}%", flush=True)
    return {"arm": arm, **settings, "validation_accuracy": result.accuracy}


def compare(data: Path, seeds: int, *, quick: bool) -> dict[str, Any]:
    """Each arm on the test split with each seed, and the sources on their own."""
    runs = [seed_run(data, seed, "test", quick=quick) for seed in range(seeds)]
    outcomes = sentiment.run_jobs(runs, workers=2, run=fusion.run_seed)
    rows = [{"seed": outcome["seed"], **row} for outcome in outcomes for row in outcome["arms"]]
    summary = arms.summarise(rows, fusion.ARMS, "fusion")
    arms.print_summary(summary, "fusion")
    own = {source: [outcome["own"][source] for outcome in outcomes] for source in fusion.SOURCES}
    for source, values in own.items():
        print(f"{source} on its own: {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %")
    seen = {key: [outcome[key] for outcome in outcomes] for key in ("nearest", "attention")}
    return {"summary": summary, "own": own, **seen, "rows": rows}


def main() -> None:
    """Select settings, or compare the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--select", action="store_true", help="choose settings on validation sentences")
    parser.add_argument("--quick", action="store_true", help="a few sentences and two seeds, to see that it runs")
    args = parser.parse_args()
    sizes = {"train_size": fusion.TRAIN_SIZE, "target_size": fusion.TARGET_SIZE}
    if args.select:
        rows = select(args.data, quick=args.quick)
        print(f"chosen: {[row for row in rows if row['is_chosen']]}")
        write_json("fusion_selection", {**sizes, "seed": SELECTION_SEED, "rows": rows}, quick=args.quick)
        return
    seeds = 2 if args.quick else 5
    content = compare(args.data, seeds, quick=args.quick)
    write_json("fusion", {**sizes, "seeds": seeds, **content}, quick=args.quick)
    if not args.quick:
        shutil.copy(OUT / "0" / "attention.png", RESULTS / "fusion.png")


if __name__ == "__main__":
    main()
