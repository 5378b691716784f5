"""What does AdapterDrop save: time of inference, time of a training step, memory for the backward?

    python benchmarks/bench_drop.py            # BERT-base shape, 0 to 11 of its 12 lowest layers without adapters
    python benchmarks/bench_drop.py --quick    # a small model, in seconds

All in turn within one run: the base alone, full fine-tuning of a copy, and Pfeiffer adapters in the layers that are left.
Weights are random: neither time nor memory depends on them. Memory is what a forward in training mode keeps for backward,
without parameters and buffers. Time is that of the processor, in one thread: other work on the machine must not decide.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from report import write_json
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

import adapterkit as ak

FULL, BASE = "full fine-tuning", "base"


def kept_bytes(model: nn.Module, ids: Tensor) -> int:
    """What a forward in training mode keeps for backward, without the model's own parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(input_ids=ids)
    total = sum(kept.values())
    del output  # not before: its memory would be used twice
    return total


def median_seconds(work: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
    """Median seconds of each piece of work, all in turn."""
    taken: dict[Any, list[float]] = {name: [] for name in work}
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, task in work.items():
            started = time.process_time()
            task()
            if turn:  # the first is to warm up
                taken[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(config: BertConfig, drops: Sequence[int], batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds and bytes for each number of dropped layers, and for the base and full fine-tuning."""
    ids, labels = torch.randint(0, config.vocab_size, (batch, length)), torch.zeros(batch, dtype=torch.long)
    plain, adapted = BertForSequenceClassification(config), BertForSequenceClassification(config)
    kit = ak.wrap(adapted)
    kit.add("a", "pfeiffer", reduction_factor=16, heads=["classifier"])
    kit.train_adapter("a")
    models: dict[Any, nn.Module] = {BASE: adapted, FULL: plain, **dict.fromkeys(drops, adapted)}
    optimizers = {m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in (plain, adapted)}

    def scope(name: Any) -> Any:
        if name == FULL:
            return nullcontext()
        return kit.base() if name == BASE else kit.active(ak.Drop("a", layers=range(name)))

    @torch.no_grad()
    def infer(name: Any) -> None:
        with scope(name):
            models[name].eval()(input_ids=ids)

    def step(name: Any) -> None:
        with scope(name):
            models[name].train()(input_ids=ids, labels=labels).loss.backward()
        optimizers[models[name]].step()
        optimizers[models[name]].zero_grad()

    inference = median_seconds({name: lambda name=name: infer(name) for name in models}, rounds)
    training = median_seconds({name: lambda name=name: step(name) for name in models if name != BASE}, rounds)
    rows = []
    for name in tqdm(models, desc="memory", leave=False):
        with scope(name):
            kept = None if name == BASE else kept_bytes(models[name], ids)
        rows.append({"dropped": name, "inference_s": inference[name], "step_s": training.get(name), "kept_bytes": kept})
    return rows


def activation_seconds(config: BertConfig, rounds: int) -> float:
    """Median seconds to enter and leave a scope with another depth, as a robust training does in each step."""
    kit = ak.wrap(BertForSequenceClassification(config))
    kit.add("a", "pfeiffer")
    kit.activate("a")
    taken = []
    for step in range(rounds):
        started = time.process_time()
        with kit.active(ak.random_drop("a", most=config.num_hidden_layers - 1, step=step)):
            pass
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows, with their ratios to no drop."""
    none = next(row for row in rows if row["dropped"] == 0)
    print(f"{'dropped':<17} {'inference':>10} {'':>7} {'step':>9} {'':>7} {'kept':>10}")
    for row in rows:
        cells = [
            f"{row['dropped']!s:<17} {row['inference_s'] * 1e3:7.0f} ms {row['inference_s'] / none['inference_s']:6.2f}x"
        ]
        if row["step_s"] is not None:
            cells.append(f"{row['step_s'] * 1e3:6.0f} ms {row['step_s'] / none['step_s']:6.2f}x")
            cells.append(f"{row['kept_bytes'] / 2**20:6.0f} MiB {row['kept_bytes'] / none['kept_bytes']:6.2f}x")
        print(" ".join(cells))


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    small = BertConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=2, intermediate_size=128)
    config, drops, batch, length, rounds = (
        (small, (0, 2, 3), 2, 16, 2) if args.quick else (BertConfig(), (0, 3, 5, 8, 11), 2, 128, 3)
    )
    rows = measure(config, drops, batch, length, rounds)
    print_table(rows)
    activation = activation_seconds(config, 10 if args.quick else 50)
    print(f"a scope with another depth: {activation * 1e3:.1f} ms to enter and leave")
    sizes = {"layers": config.num_hidden_layers, "width": config.hidden_size, "batch": batch, "tokens": length}
    write_json("drop", {"rows": rows, "activation_s": activation, "sizes": sizes}, quick=args.quick)


if __name__ == "__main__":
    main()
