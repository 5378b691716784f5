"""Compare adapterkit with the `adapters` and `peft` libraries: `nox -s parity`, or `python -m benchmarks.parity --help`.

It has three parts, the presets of bottlenecks in all families of models, every other method, and compositions; the page is
of all.

Exits with 1 if any case differs for a reason that is not known.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from ..report import RESULTS, write_json
from .compare import TOLERANCE, Case, Outcome, compare
from .compositions.cases import QUICK as QUICK_COMPOSED
from .compositions.cases import composed_cases
from .compositions.peer import values_start
from .compositions.run import run_composed
from .compositions.table import table as compositions_table
from .defaults import differing_defaults
from .families import build, families
from .methods.cases import QUICK as QUICK_FAMILIES
from .methods.cases import cases
from .methods.places import default_places
from .methods.run import run
from .methods.table import table as methods_table
from .peer import PRESETS, Factor
from .table import page, table

FACTORS: tuple[Factor, ...] = (4, {"default": 4, "1": 2}, {"default": 16, "0": 3, "1": 0.5})
QUICK = ("bert", "gpt2", "t5")
PARTS = ("parity", "parity_methods", "parity_compositions")
PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


def main() -> int:
    """Run, print, write, and say how it went."""
    arguments = _arguments()
    _quiet()
    torch.set_num_threads(1)
    do_all = not (arguments.presets or arguments.methods or arguments.compositions)
    found = []
    if do_all or arguments.presets:
        found += _presets(arguments.families or (QUICK if arguments.quick else families()))
    if do_all or arguments.methods:
        found += _methods(arguments.families or (QUICK_FAMILIES if arguments.quick else families()))
    if do_all or arguments.compositions:
        found += _compositions(arguments.families or (QUICK_COMPOSED if arguments.quick else families()))
    if not arguments.quick and not arguments.families:
        parts = [json.loads((RESULTS / f"{name}.json").read_text()) for name in PARTS]
        PAGE.write_text(page(*parts))
        print(f"wrote {PAGE}")
    return 1 if "differs" in found else 0


def _presets(chosen: Sequence[str]) -> list[str]:
    """Every preset of bottlenecks in these families; the verdicts."""
    outcomes = _run(list(chosen))
    told = [_as_json(outcome) for outcome in outcomes]
    print(table(told))
    for outcome in outcomes:
        if outcome.verdict == "differs":
            print(f"{outcome.case}: {outcome.message or outcome.difference}; {outcome.reason}: {outcome.check}")
    result = {
        "peer": {name: version(name) for name in ("adapters", "transformers")},
        "tolerance": TOLERANCE,
        "defaults": differing_defaults(),
        "cases": told,
    }
    write_json("parity", result, quick=list(chosen) != families())
    return _counted([outcome.verdict for outcome in outcomes], ("equal", "explained", "differs"))


def _methods(chosen: Sequence[str]) -> list[str]:
    """Every other method, in these families and in the layers of plain torch; the verdicts."""
    outcomes = [run(case) for case in tqdm(cases(list(chosen)), unit="case")]
    told = [outcome.as_json() for outcome in outcomes]
    print(methods_table(told))
    for outcome in outcomes:
        if outcome.verdict() == "differs":
            print(f"{outcome.case}: {outcome.as_json()}")
    result = {
        "peers": {name: version(name) for name in ("adapters", "peft", "transformers")},
        "cases": told,
        "places": default_places(list(chosen)),
    }
    write_json("parity_methods", result, quick=list(chosen) != families())
    return _counted([outcome.verdict() for outcome in outcomes], ("equal", "explained", "n.a.", "differs"))


def _compositions(chosen: Sequence[str]) -> list[str]:
    """Every composition, in these families; the verdicts."""
    outcomes = [run_composed(case) for case in tqdm(composed_cases(list(chosen)), unit="case")]
    told = [outcome.as_json() for outcome in outcomes]
    print(compositions_table(told))
    for outcome in outcomes:
        if outcome.verdict() == "differs":
            print(f"{outcome.case}: {outcome.as_json()}")
    start = values_start()
    result = {
        "peer": {name: version(name) for name in ("adapters", "transformers")},
        "cases": told,
        "values_start": float((start - torch.eye(len(start))).abs().max()),
    }
    write_json("parity_compositions", result, quick=list(chosen) != families())
    return _counted([outcome.verdict() for outcome in outcomes], ("equal", "explained", "differs"))


def _counted(verdicts: list[str], kinds: Sequence[str]) -> list[str]:
    """Print how many there are of each verdict, and return them."""
    print(", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds))
    return verdicts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK_FAMILIES)}")
    parser.add_argument("--families", nargs="+", choices=families(), metavar="FAMILY", help="only these: %(choices)s")
    parser.add_argument("--presets", action="store_true", help="only the presets of bottlenecks")
    parser.add_argument("--methods", action="store_true", help="only the other methods")
    parser.add_argument("--compositions", action="store_true", help="only compositions")
    return parser.parse_args()


def _quiet() -> None:
    """No warnings: that library says at every `add_adapter` that none is active, torch that scripting is old."""
    warnings.filterwarnings("ignore")
    logging.getLogger("adapters").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()


def _run(chosen: list[str]) -> list[Outcome]:
    """Every case of these families."""
    outcomes = []
    with tqdm(total=len(chosen) * len(PRESETS) * len(FACTORS), unit="case") as bar:
        for family in chosen:
            bar.set_description(family)
            model = build(family)
            for case in (Case(family, preset, factor) for preset in PRESETS for factor in FACTORS):
                outcomes.append(compare(case, model))
                bar.update()
    return outcomes


def _as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome in plain values."""
    case, difference, check = outcome.case, outcome.difference, outcome.check
    return {
        "family": case.family,
        "preset": case.preset,
        "factor": case.factor,
        "verdict": outcome.verdict,
        "base": outcome.base,
        "outputs": difference and difference.outputs,
        "gradients": difference and difference.gradients,
        "reason": outcome.reason,
        "message": outcome.message,
        "check": check and {"outputs": check.outputs, "gradients": check.gradients},
        "dtype": outcome.dtype,
    }


if __name__ == "__main__":
    sys.exit(main())
