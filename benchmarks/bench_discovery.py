"""What does it cost to find an adapter's places?

    python benchmarks/bench_discovery.py            # three real shapes, a minute
    python benchmarks/bench_discovery.py --quick    # one, in seconds

Each model is run forward on the tiny inputs that are made for it, traced for its structure, asked for the sites of a
preset (its structure known and not), adapted and verified, in turn, round after round: compare within a row.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from report import write_json
from torch import nn
from tqdm import tqdm
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, T5Config, T5Model

import adapterkit as ak
from adapterkit.structure.anatomy import discover as discovery
from adapterkit.structure.tracing.forward import call_with
from adapterkit.structure.tracing.inputs import tiny_inputs

MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT-base": lambda: BertModel(BertConfig()),
    "GPT-2": lambda: GPT2Model(GPT2Config()),
    "T5-base": lambda: T5Model(T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, d_kv=64)),
}
STEPS = ("forward", "discover", "sites, first", "sites, again", "verify")


def measure(model: nn.Module, rounds: int) -> dict[str, float]:
    """Median seconds of each step."""
    model.eval()
    inputs = tiny_inputs(model)
    kit = ak.wrap(model)

    def anew(run: Callable[[], object]) -> Callable[[], object]:
        def forgotten() -> object:
            discovery._REMEMBERED.clear()
            return run()

        return forgotten

    kit.add("a", "pfeiffer")
    kit.train_adapter("a")
    steps: tuple[Callable[[], object], ...] = (
        lambda: call_with(model, inputs),
        anew(lambda: discovery.discover(model)),
        anew(lambda: kit.sites("pfeiffer")),
        lambda: kit.sites("pfeiffer"),
        kit.verify,
    )
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, step in zip(STEPS, steps, strict=True):
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    names = ["BERT-base"] if quick else list(MODELS)
    found = {name: measure(MODELS[name](), 2 if quick else 9) for name in tqdm(names, desc="models")}
    print("".join(f"{head:>22}" for head in ("model", *STEPS)))
    for name, seconds in found.items():
        base = seconds["forward"]
        cells = (f"{1000 * s:.0f} ms ({s / base:.1f} x)" for s in seconds.values())
        print("".join(f"{cell:>22}" for cell in (name, *cells)))
    write_json("discovery", {"seconds": found}, quick=quick)


if __name__ == "__main__":
    main()
