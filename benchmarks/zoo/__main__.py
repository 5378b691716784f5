"""`python -m benchmarks.zoo`: every architecture that builds offline through the gates; JSON, a table, a golden file.

`--shard 3/10` takes every tenth architecture, `--names bert llama` these; `--check` compares with the committed golden
file instead of writing it; `--catalogue` chooses whose architectures: those of transformers, if not given. A full run
writes docs/zoo.md, too. `--catalogue wild_models --help` tells of the models that a grammar generates.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .examine import OUTCOMES, examine_all
from .table import CATALOGUES, PAGE, RESULTS, load, page, summary


def main() -> int:
    """Run, print, write; 1 if something differs from the golden file."""
    if "wild_models" in sys.argv:  # judged by what is known of them, not through gates
        rest = [argument for argument in sys.argv[1:] if argument not in ("--catalogue", "wild_models")]
        return import_module("benchmarks.zoo.wild.run").main(rest)
    options = _options()
    names = options.names or import_module(_module(options.catalogue)).names()
    if options.shard:
        number, of = map(int, options.shard.split("/"))
        names = names[number % of :: of]
    began = time.monotonic()
    reports: dict[str, dict[str, Any]] = {}
    for name, report in zip(names, examine_all(options.catalogue, names, options.workers), strict=True):
        reports[name] = report
        if report["outcome"] != "passed" or options.verbose:
            print(f"{name:32} {report['outcome']:14} {report.get('reason', '')[:400]}", flush=True)
    seconds = time.monotonic() - began
    print(f"\n{summary(reports)}; {seconds:.0f} s")
    if options.check:
        return _compare(options.catalogue, reports)
    if not options.names and not options.shard:
        _write(options.catalogue, reports, seconds)
        PAGE.write_text(page(load()))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalogue", choices=CATALOGUES, default=next(iter(CATALOGUES)))
    parser.add_argument("--shard", help="NUMBER/OF: a part of the architectures")
    parser.add_argument("--names", nargs="*", help="these architectures only")
    parser.add_argument("--check", action="store_true", help="compare with the golden file instead of writing it")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--verbose", action="store_true", help="a line for each architecture")
    return parser.parse_args()


def _write(catalogue: str, reports: dict[str, dict[str, Any]], seconds: float) -> None:
    """The JSON of all reports, and the golden file of site templates."""
    from ..report import environment

    golden = {name: report.pop("templates") for name, report in reports.items() if "templates" in report}
    _golden(catalogue).write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    counts = Counter(report["outcome"] for report in reports.values())
    content = {
        "environment": {**environment(), **{name: version(name) for name in import_module(_module(catalogue)).LIBRARIES}},
        "seconds": round(seconds),
        "summary": {outcome: counts[outcome] for outcome in OUTCOMES},
        "types": reports,
    }
    (RESULTS / f"zoo_{catalogue}.json").write_text(json.dumps(content, indent=1) + "\n")


def _compare(catalogue: str, reports: dict[str, dict[str, Any]]) -> int:
    """Print what differs from the golden file; 1 if anything does, or if one that passed does not any more."""
    golden = json.loads(_golden(catalogue).read_text())
    differing = 0
    for name, report in reports.items():
        was, now = golden.get(name), report.get("templates")
        if was != now or (report["outcome"] == "failed" and was is not None):
            differing += 1
            print(f"{name}: sites were {was}, are {now} ({report['outcome']} {report.get('reason', '')})")
    return int(bool(differing))


def _module(catalogue: str) -> str:
    return f"benchmarks.zoo.{catalogue}"


def _golden(catalogue: str) -> Path:
    return RESULTS / f"zoo_{catalogue}_sites.json"


if __name__ == "__main__":
    sys.exit(main())
