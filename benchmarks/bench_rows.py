"""What does a batch cost whose rows run different adapters?

    python benchmarks/bench_rows.py            # a batch of 64 rows with 1, 8 and 64 different adapters
    python benchmarks/bench_rows.py --quick    # a small model, in seconds

Against it, in turn within one run: the base alone, one adapter for the whole batch, and a loop over the adapters, each on
its own rows, which is what one does without `ak.Rows`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from report import write_json
from torch import nn
from tqdm import tqdm

import adapterkit as ak

ROWS = 64
DISTINCT = (1, 8, 64)
METHODS: dict[str, Callable[[], Any]] = {
    "bottleneck": lambda: ak.BottleneckConfig(targets=["layers.*.dropout2"], bottleneck_size=16),
    "lora": lambda: ak.LoRAConfig(targets=["linear1", "linear2"], rank=8),
}


def model_of(hidden: int, layers: int) -> nn.Module:
    """A transformer encoder in eval mode."""
    layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def kit_of(model: nn.Module, method: str, x: torch.Tensor) -> ak.AdapterKit:
    """The model with 64 adapters that do something."""
    kit = ak.wrap(model, x)
    for index in tqdm(range(max(DISTINCT)), desc=f"{method} adapters", leave=False):
        kit.add(str(index), METHODS[method]())
        with torch.no_grad():
            for parameter in kit.parameters(str(index)):
                parameter.normal_(std=0.02)
    return kit


def seconds_of(work: dict[str, tuple[Any, Callable[[], Any]]], kit: ak.AdapterKit, rounds: int) -> dict[str, float]:
    """Median seconds of each piece of work, all in turn, each with its composition active before."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, (composition, task) in work.items():
            with kit.base() if composition is None else kit.active(composition):
                started = time.perf_counter()
                task()
                if turn:  # the first is to warm up
                    taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


@torch.no_grad()
def measure(method: str, hidden: int, layers: int, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of a forward of the batch in each way."""
    x = torch.randn(ROWS, tokens, hidden)
    kit = kit_of(model_of(hidden, layers), method, x[:2])

    def run() -> None:
        kit.model(x)

    def loop(distinct: int) -> None:
        for index in range(distinct):
            with kit.active(str(index)):
                kit.model(x[index::distinct])

    work: dict[str, tuple[Any, Callable[[], Any]]] = {"base": (None, run), "one adapter": ("0", run)}
    for distinct in DISTINCT:
        work[f"rows, {distinct} adapters"] = (ak.Rows([str(row % distinct) for row in range(ROWS)]), run)
        work[f"loop, {distinct} adapters"] = (None, lambda distinct=distinct: loop(distinct))
    return seconds_of(work, kit, rounds)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    args = parser.parse_args()
    torch.set_num_threads(2)
    sizes = (64, 2, 8, 3) if args.quick else (256, 4, 32, 9)
    result = {method: measure(method, *sizes) for method in METHODS}
    for method, seconds in result.items():
        print(f"\n{method}: {ROWS} rows of {sizes[2]} tokens, width {sizes[0]}, {sizes[1]} layers")
        for name, value in seconds.items():
            print(f"  {name:<18} {value * 1e3:8.1f} ms   {value / seconds['one adapter']:5.2f} x one adapter")
    named = dict(zip(("width", "layers", "tokens"), sizes[:3], strict=True))
    write_json("rows", {"seconds": result, "sizes": named}, quick=args.quick)


if __name__ == "__main__":
    main()
