"""One architecture through all gates, to a report; and many of them, in processes that can die without loss."""

from __future__ import annotations

import re
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from typing import Any

__all__ = ["OUTCOMES", "examine_all", "examine_one"]

_LIBRARIES = re.compile(r"/[^'\"\s]*/site-packages/")  # where this machine has its packages is nobody's business
SECONDS = 120
CHUNK = 80  # architectures for each set of workers: memory of the models before is given back
OUTCOMES = ("passed", "failed", "convolutional", "no sub-layers", "does not run", "does not build")
Report = dict[str, Any]


def examine_all(catalogue: str, names: Sequence[str], workers: int = 2) -> Iterator[Report]:
    """Reports in the order of the names. Workers are renewed now and then; one that dies takes one architecture with it."""
    names = list(names)
    while names:
        done = 0
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(examine_one, catalogue, name) for name in names[:CHUNK]]
            try:
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenProcessPool:
                pass
        names = names[done:]
        if done < len(futures):  # alone, to tell whether it is the one that died
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    yield pool.submit(examine_one, catalogue, names[0]).result()
                except BrokenProcessPool:
                    yield {"outcome": "failed", "reason": "the process died"}
            names = names[1:]


def examine_one(catalogue: str, name: str) -> Report:
    """Build an architecture, run it, and put it through the gates."""
    import torch

    from .gates import GateError, examine, outputs
    from .rows import check_rows

    models = import_module(f"benchmarks.zoo.{catalogue}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    outcome, began = "does not build", time.monotonic()
    try:
        models.check_builds(name)
        outcome = "does not run"
        model, inputs = models.build(name)
        outputs(model, inputs)
        outcome = "failed"
        report = examine(model, inputs, models.IRREGULAR.get(name), getattr(models, "KINDS", {}).get(name))
        if "epsilon" in report:
            report["rows"] = check_rows(model, inputs)
        outcome = _outcome(report)
    except GateError as error:
        report = {"reason": str(error)}
    except Exception as error:  # whatever a model raises is its report
        report = {"reason": _LIBRARIES.sub("", f"{type(error).__name__}: {error}")[:600]}
    finally:
        signal.alarm(0)
    if outcome == "failed" and name in getattr(models, "EXPLAINED", {}):
        report["explained"] = models.EXPLAINED[name]
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 2), **report}


def _outcome(report: Report) -> str:
    """What a model is that gave this report, having passed the gates for what it is."""
    if not report["sublayers"]:
        return "no sub-layers"
    return "passed" if "epsilon" in report else "convolutional"


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")
