"""Does swapping the language adapter carry a task over to another language, and is that more than noise?

    python benchmarks/bench_madx.py                  # three seeds, on test verses
    python benchmarks/bench_madx.py --seeds 5 --workers 2

It prints tables and writes them as JSON under benchmarks/results/. What is run is examples/madx.py.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "examples"), str(Path(__file__).parent)]

import madx
import torch
from report import write_json

Results = dict[str, dict[str, dict[str, float]]]
OUT = Path("runs/bench_madx")
QUICK = madx.Settings(head_steps=2, base_steps=2, language_steps=2, task_steps=2, task_verses=64, language_verses=32)


def one(settings: madx.Settings, seed: int, resume: bool) -> Results:
    """One seed on the test verses; or, to resume, what a run with these settings has written."""
    path = OUT / f"seed-{seed}" / "results.json"
    if resume and path.exists():
        written = json.loads(path.read_text())
        if (written["settings"], written["split"]) == (asdict(settings), "test"):
            return {kind: written[kind] for kind in ("words", "tasks")}
    results = madx.run(settings, seed, "test", OUT)
    print(f"seed {seed}: {results}", flush=True)
    return results


def run_seeds(settings: madx.Settings, seeds: int, workers: int, *, resume: bool) -> list[Results]:
    """Each seed in a process of its own, all on the base that is trained first."""
    madx.build(settings, OUT)
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, torch.set_num_threads, (threads,), maxtasksperchild=1) as pool:
        return pool.starmap(one, [(settings, seed, resume) for seed in range(seeds)], chunksize=1)


def summarise(runs: list[Results]) -> Results:
    """Mean and standard deviation over the seeds of each number."""
    return {
        kind: {
            row: {
                f"{language} {name}": measure([run[kind][row][language] for run in runs])
                for language in madx.LANGUAGES
                for name, measure in (("mean", statistics.mean), ("stdev", statistics.stdev))
            }
            for row in runs[0][kind]
        }
        for kind in runs[0]
    }


def differences(runs: list[Results]) -> dict[str, list[float]]:
    """Points of accuracy in the target that swapping gains, seed by seed, over the other ways."""
    _, target = madx.LANGUAGES
    tasks = [run["tasks"] for run in runs]
    return {
        other: [task["swapped (MAD-X)"][target] - task[other][target] for task in tasks]
        for other in tasks[0]
        if other != "swapped (MAD-X)"
    }


def tables(summary: Results, gains: dict[str, list[float]]) -> str:
    """The numbers as Markdown, as they stand in docs/madx.md."""
    forms = {"words": ("masked-LM loss, nats a word", "{:.3f} ± {:.3f}"), "tasks": ("accuracy, %", "{:.1f} ± {:.1f}")}
    lines = []
    for kind, (title, form) in forms.items():
        lines += [f"| {title} | {' | '.join(madx.LANGUAGES)} |", "|---" * (1 + len(madx.LANGUAGES)) + "|"]
        for row, values in summary[kind].items():
            cells = (form.format(values[f"{la} mean"], values[f"{la} stdev"]) for la in madx.LANGUAGES)
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"| swapped, minus in {madx.LANGUAGES[1]} | points, seed by seed |", "|---|---|"]
    lines += [f"| {other} | {', '.join(f'{value:+.1f}' for value in values)} |" for other, values in gains.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and two seeds, to see that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="seeds at a time")
    parser.add_argument("--resume", action="store_true", help="take the seeds that an interrupted run has finished")
    args = parser.parse_args()
    settings = QUICK if args.quick else madx.Settings()
    runs = run_seeds(settings, 2 if args.quick else args.seeds, args.workers, resume=args.resume)
    summary, gains = summarise(runs), differences(runs)
    print(tables(summary, gains))
    content = {"settings": asdict(settings), "summary": summary, "swapped_minus": gains, "runs": runs}
    write_json("madx", content, quick=args.quick)


if __name__ == "__main__":
    main()
